"""``deit-kd data confusions``: which classes a network confuses, and the specialists that would know them apart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from deit_kd.config import Config
from deit_kd.console import console, say
from deit_kd.distributed import process_group
from deit_kd.evaluation.examine import Examination, examine
from deit_kd.evaluation.sources import Source
from deit_kd.figures import as_png, matrix
from deit_kd.files import new_folder, write_atomically, write_json
from deit_kd.interfaces import InputError, printable
from deit_kd.metrics.confusions import clusters, correlation, counts, most_confused, share_within

CONFUSIONS = Path("runs/confusions")  # of networks that have no run
CONFUSIONS_FILE, PICTURE_FILE = "confusions.json", "confusions.png"
MOST_PAIRS = 10  # in the table
LARGEST_PICTURE = 60  # classes


def tell_confusions(source: Source, config: Config, split: str, count: int | None, folder: Path | None) -> None:
    """Print the pairs of classes that a network confuses most, clusters of them, and a recipe's lines for each cluster.

    The fused head speaks for a network with two. ``confusions.json`` holds the counts and correlations of all pairs,
    ``confusions.png`` draws the correlations of up to `LARGEST_PICTURE` classes, cluster by cluster.

    Args:
        source: the network.
        config: its recipe, with command-line overrides.
        split: of photos, see `examine`.
        count: of clusters; None is the root of the number of classes, at least 2.
        folder: where the files go; None is ``RUN/confusions``, or ``runs/confusions/NAME`` where there is no run, and
            in it a folder for any split but the validation's.

    Raises:
        InputError: there are fewer classes than clusters, or one cluster; see also `examine`.
    """
    with process_group(config.train.device) as processes:
        alone = config.model_copy(update={"teacher": type(config.teacher)()})
        examination = examine(source, alone, split, processes)
        found = _confusions(examination, count)
        if processes.is_main:
            place = folder or _default_folder(examination)
            with new_folder(place):
                write_json(place / CONFUSIONS_FILE, found)
            _tell(found)
            say(f"numbers: {place / CONFUSIONS_FILE}{_draw(found, place)}")


def _default_folder(examination: Examination) -> Path:
    source, split = examination.source, examination.split
    place = CONFUSIONS / source.name if source.run is None else source.run / "confusions"
    return place if split == "validation" else place / ("root" if split == "." else split.replace("/", "-"))


def _confusions(examination: Examination, count: int | None) -> dict[str, Any]:
    classes, answers = examination.photos.classes, examination.answers
    count = count or max(2, round(math.sqrt(len(classes))))
    if not 2 <= count <= len(classes):
        raise InputError(f"--clusters: {count} clusters of {len(classes)} classes; use 2 to {len(classes)}")
    probabilities = examination.heads()[examination.speaker]
    correlations = correlation(probabilities)
    confusion = counts(answers.labels, probabilities.argmax(-1), len(classes))
    groups = clusters(correlations, count, examination.config.seed)
    pairs = most_confused(confusion, correlations, len(classes) ** 2)
    return {
        "student": examination.source.name,
        "head": examination.speaker,
        "split": examination.split,
        "n": len(answers.labels),
        "classes": list(classes),
        "rest": examination.config.data.rest,
        "pairs": [{**pair._asdict(), "classes": [classes[label] for label in pair.classes]} for pair in pairs],
        "clusters": [[classes[label] for label in group] for group in groups],
        "mistakes_within": share_within(confusion, groups),
        "pairs_within": share_within(torch.ones_like(confusion), groups),
        "counts": confusion.tolist(),
        "correlations": correlations.tolist(),
    }


def _tell(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['student']}: {found['n']} photos of {found['split']}, most confused classes")
    for column in ("classes", "first taken for second", "second for first", "correlation"):
        table.add_column(column, justify="left" if column == "classes" else "right")
    for pair in found["pairs"][:MOST_PAIRS]:
        names = ", ".join(map(printable, pair["classes"]))
        table.add_row(names, *map(str, pair["photos"]), f"{pair['correlation']:+.2f}")
    console.print(table)
    if not found["pairs"]:
        say("no photo is taken for another class; ask for harder photos, such as --split validation")
    alone = [group[0] for group in found["clusters"] if len(group) == 1]
    if found["mistakes_within"] is not None:
        shares = (f"{100 * found[key]:.0f} %" for key in ("mistakes_within", "pairs_within"))
        say("{} of the mistakes stay within a cluster, and so do {} of all pairs of classes".format(*shares))
    if alone:
        say(f"without a cluster: {', '.join(map(printable, alone))}")
    named = [[name for name in group if name != found["rest"]] for group in found["clusters"]]
    specialists = [group for group in named if len(group) > 1]
    for number, group in enumerate(specialists, start=1):
        say(f"specialist {number}: data: {{classes: {json.dumps(group, ensure_ascii=False)}, rest: rest}}")
    if not specialists:
        say("every class is on its own, so there is no specialist to train; use fewer --clusters")


def _draw(found: dict[str, Any], place: Path) -> str:
    """Draw the correlations of different classes, cluster by cluster; return where, for the last line."""
    classes = found["classes"]
    if len(classes) > LARGEST_PICTURE:
        return ""
    names = [name for group in found["clusters"] for name in group]
    order = [classes.index(name) for name in names]
    values = [[max(0.0, found["correlations"][a][b]) if a != b else 0.0 for b in order] for a in order]
    figure = matrix("Which classes are likely together?", names, names, values, digits=2)
    write_atomically(place / PICTURE_FILE, as_png(figure))
    return f"   picture: {place / PICTURE_FILE}"
