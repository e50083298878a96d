"""The curves of a run, from its records: what the report and ``deit-kd plot`` draw."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, with_config
from typing_extensions import NotRequired, TypedDict

from deit_kd.console import score_text
from deit_kd.figures import Chart, Mark, Series, colour_of
from deit_kd.files import checked
from deit_kd.interfaces import ANSWERS, InputError
from deit_kd.run_folder import METRICS_FILE, FeatureRecord, ScoreRecord, kept_weights, name_of_run, record_of_peer

Step = Annotated[int, Field(ge=0, lt=2**63)]


class TermRecord(TypedDict):
    """A further term of the objective, unweighted."""

    loss: float | None
    weight: float
    temperature: NotRequired[float]  # if it changes over the run, like mix
    mix: NotRequired[float]
    cosine: NotRequired[float | None]  # between the outputs of its connectors and their targets


@with_config(ConfigDict(extra="allow"))
class StepRecord(TypedDict):
    """A line of ``metrics.jsonl`` about some steps."""

    step: Step
    classification: float | None  # None if no step had a finite loss
    distillation: float | None  # None also once the term has ended
    alpha: NotRequired[float]  # if it changes over the run, like temperature
    temperature: NotRequired[float]
    lr: float
    images_per_second: float
    terms: NotRequired[dict[str, TermRecord]]


class HeadTable(TypedDict):
    """What the heads scored."""

    cls: ScoreRecord | None
    dist: ScoreRecord | None
    patch: NotRequired[ScoreRecord | None]
    fused: ScoreRecord | None


@with_config(ConfigDict(extra="allow"))
class Result(TypedDict):
    """What the heads of a model scored."""

    heads: HeadTable


@with_config(ConfigDict(extra="allow"))
class EpochRecord(TypedDict):
    """A line of ``metrics.jsonl`` about an epoch."""

    step: Step
    epoch: Step
    model: Result
    ema: NotRequired[Result]
    teacher: ScoreRecord | FeatureRecord | None


@with_config(ConfigDict(extra="allow"))
class BadStepRecord(TypedDict):
    """A line of ``metrics.jsonl`` about a step that was left out."""

    step: Step


Records = list[dict[str, Any]]
KINDS = {"step": StepRecord, "epoch": EpochRecord, "bad_step": BadStepRecord}
COLUMNS = {
    "step": ("step", "classification", "distillation", "lr", "images_per_second"),
    "epoch": ("step", "epoch", "model", "teacher"),
    "bad_step": ("step",),
}
DASHES: dict[str, str] = dict(zip(ANSWERS, (":", "--", "-.", "-"), strict=True))


def names_of(folders: Sequence[Path]) -> dict[str, Path]:
    """Return runs by their names, see `name_of_run`.

    Raises:
        InputError: two have the same name.
    """
    names: dict[str, Path] = {}
    for folder in folders:
        name = name_of_run(folder)
        if name in names:
            raise InputError(f"{folder}: {names[name]} has the same name; rename one of the two folders")
        names[name] = folder
    return names


def read_records(folder: Path) -> Records:
    """Return the records of a run, finished or not; a line that is still being written is left out.

    Raises:
        InputError: there are none, or one lacks a column.
    """
    file = folder / METRICS_FILE
    lines = file.read_text(errors="replace").splitlines(keepends=True) if file.is_file() else []
    records = [_record(line, f"{file}, line {n}") for n, line in enumerate(lines, start=1) if line.endswith("\n")]
    if not records:
        raise InputError(f"{folder}: has no records (no line in {METRICS_FILE}); name the folder of a run")
    return records


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        missing = [column for column in COLUMNS[record["kind"]] if column not in record]
        if not missing:
            return dict(checked(record, KINDS[record["kind"]]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{place}: is not a record of a run ({error}); name a run of deit_kd") from error
    raise InputError(f"{place}: has no column {missing[0]!r}; name a run of this version of deit_kd")


def with_peers(name: str, records: Records) -> dict[str, Records]:
    """Return the records of a run by its name, and those of each of its peers by ``<name>-<peer>``."""
    peers = dict.fromkeys(peer for record in records for peer in record.get("peers", {}))
    apart = {f"{name}-{peer}": [record_of_peer(record, peer) for record in records] for peer in peers}
    return {name: records, **apart}


def charts_of(runs: Mapping[str, Records]) -> dict[str, Chart]:
    """Return the charts ``loss``, ``heads``, ``learning_rate`` and ``images_per_second`` of one or several runs.

    Runs whose objective has further terms also have ``terms`` and, if features are compared, ``connectors``; those, and
    runs whose alpha changes, have ``weights``. A mark in the colour of a line says where its term ends.

    With one run each head has a colour, with several each run. Heads are scored with the averaged weights if the run
    keeps them.
    """
    several = len(runs) > 1
    loss: list[Series] = []
    ends: list[Mark] = []
    heads: list[Series] = []
    rate: list[Series] = []
    speed: list[Series] = []
    levels: dict[str, float] = {}
    for position, (run, records) in enumerate(runs.items()):
        steps = [record for record in records if record["kind"] == "step"]
        epochs = [record for record in records if record["kind"] == "epoch"]
        prefix = f"{run}: " if several else ""
        colour = colour_of("", position)
        at = [record["step"] for record in steps]
        for term, head in (("classification", "cls"), ("distillation", "dist")):
            if any(record[term] for record in steps):
                line = colour if several else colour_of(head)
                dash = DASHES["dist"] if several and head == "dist" else "-"
                loss.append(Series(f"{prefix}{term}", at, [_number(record[term]) for record in steps], line, dash))
                if head == "dist" and all("alpha" in record for record in steps):
                    ends += _ends(loss[-1], [record["alpha"] for record in steps])
        rate.append(Series(run, at, [record["lr"] for record in steps], colour))
        speed.append(Series(run, at, [record["images_per_second"] for record in steps], colour))
        for head, dash in DASHES.items():
            scored = [(record["epoch"] + 1, scores_of(record)["heads"].get(head)) for record in epochs]
            points = [(epoch, score["top1"]) for epoch, score in scored if score is not None]
            if points:
                line = colour if several else colour_of(head)
                x, y = zip(*points, strict=True)
                heads.append(Series(f"{prefix}{head}", x, y, line, dash if several else "-"))
        teacher = epochs[-1]["teacher"] if epochs else None
        if teacher is not None:
            name = score_text(teacher, 1).removeprefix("top-1 ")
            levels[f"teacher {name}"] = teacher["knn"] if "knn" in teacher else teacher["top1"]
    return {
        **({"loss": Chart("Both terms of the loss", "step", "nats", loss, marks=ends)} if loss else {}),
        **_term_charts(runs),
        "heads": Chart("Heads on the validation split", "epoch", "top-1 %", heads, list(levels.items())),
        "learning_rate": Chart("Learning rate", "step", "", rate),
        "images_per_second": Chart("Speed", "step", "images/s", speed),
    }


def _term_charts(runs: Mapping[str, Records]) -> dict[str, Chart]:
    losses: list[Series] = []
    cosines: list[Series] = []
    weights: list[Series] = []
    ends: list[Mark] = []
    of_features: list[Mark] = []
    for run, records in runs.items():
        steps = [record for record in records if record["kind"] == "step"]
        at, prefix = [step["step"] for step in steps], f"{run}: " if len(runs) > 1 else ""
        for kind in dict.fromkeys(kind for step in steps for kind in step.get("terms", {})):
            name, colour = prefix + kind, colour_of("", len(weights))
            live = [step.get("terms", {}).get(kind, {}) for step in steps]
            for lines, value in ((losses, "loss"), (cosines, "cosine")):
                values = [_number(term.get(value)) for term in live]
                if not all(map(math.isnan, values)):
                    lines.append(Series(name, at, values, colour))
            weights.append(Series(name, at, [term.get("weight", 0.0) for term in live], colour))
            end = _ends(weights[-1], weights[-1].y)
            ends += end
            of_features += end if cosines and cosines[-1].name == name else []
        if any("alpha" in step for step in steps):
            alphas = [_number(step.get("alpha")) for step in steps]
            weights.append(Series(f"{prefix}alpha", at, alphas, colour_of("", len(weights))))
    charts = {
        "terms": Chart("Further terms, unweighted", "step", "", losses, marks=ends),
        "connectors": Chart("Compared features: student and teacher", "step", "cosine", cosines, marks=of_features),
        "weights": Chart("Weights in the loss", "step", "", weights, marks=ends),
    }
    return {name: chart for name, chart in charts.items() if chart.series}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _ends(line: Series, weights: Sequence[float]) -> list[Mark]:
    """Return the mark of the last record in which what `line` draws had a weight, unless that is the line's end."""
    last = max((place for place, weight in enumerate(weights) if weight > 0), default=len(weights) - 1)
    return [] if last == len(weights) - 1 else [Mark(f"{line.name} ends", line.x[last], line.colour)]


def troubles_of(records: Records) -> str:
    """Return a sentence about the steps that were left out and the teacher's answers that were not finite."""
    steps = [record for record in records if record["kind"] == "step"]
    left_out, wrong = (sum(record.get(key, 0) for record in steps) for key in ("bad_steps", "teacher_not_finite"))
    return f"{left_out} steps left out because the gradient was not finite; {wrong} teacher answers were not finite"


def scores_of(epoch: Mapping[str, Any]) -> Any:
    """Return an epoch's result of the weights that the run will keep."""
    return epoch[kept_weights(epoch)]


def rows_of(chart: Chart) -> list[dict[str, Any]]:
    """Return the points of a chart as rows of a table."""
    return [{"series": line.name, "x": x, "y": y} for line in chart.series for x, y in zip(line.x, line.y, strict=True)]
