"""The curves of a run, from its records: what the report and ``deit-kd plot`` draw."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, with_config
from typing_extensions import NotRequired, TypedDict

from deit_kd.console import score_text
from deit_kd.figures import Chart, Key, Mark, Series, colour_of
from deit_kd.files import checked
from deit_kd.interfaces import ANSWERS, InputError, counted
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
TERM_DASHES = ("-", "--", "-.")


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


class _Lines:
    """The lines of one chart: with one run each part has a colour; with several each run has one, and a part a dash."""

    def __init__(self, runs: Collection[str]) -> None:
        self.colours = {run: colour_of("", position) for position, run in enumerate(runs)} if len(runs) > 1 else {}
        self.series: list[Series] = []
        self.marks: list[Mark] = []
        self.dashes: dict[str, str] = {}  # of the parts that are drawn

    def add(self, run: str, part: str, x: Sequence[float], y: Sequence[float], colour: str, dash: str) -> None:
        """Draw a part of a run: in this colour if there is one run, with this dash if there are several."""
        if self.colours:
            self.series.append(Series(f"{run}: {part}", x, y, self.colours[run], dash))
        else:
            self.series.append(Series(part, x, y, colour))
        self.dashes[part] = dash

    def mark_end(self, weights: Sequence[float]) -> None:
        """Mark the last record in which the line that was drawn last has a weight, unless that is its end."""
        line, last = self.series[-1], max((place for place, weight in enumerate(weights) if weight > 0), default=-1)
        if 0 <= last < len(weights) - 1:
            self.marks.append(Mark(f"{line.name} ends", line.x[last], line.colour))

    def chart(self, title: str, x_label: str, y_label: str, levels: Sequence[tuple[str, float]] = ()) -> Chart:
        """Return the chart of the lines drawn so far."""
        keys: list[Key] = []
        if self.colours:
            drawn = {line.colour for line in self.series}
            keys += [Key(run, colour) for run, colour in self.colours.items() if colour in drawn]
            keys += [Key(part, dash=dash) for part, dash in self.dashes.items()] if len(self.dashes) > 1 else []
            keys += [Key("ends", dash=":")] if self.marks else []
        return Chart(title, x_label, y_label, self.series, levels, self.marks, keys)


def charts_of(runs: Mapping[str, Records]) -> dict[str, Chart]:
    """Return the charts ``loss``, ``heads``, ``learning_rate`` and ``images_per_second`` of one or several runs.

    Runs whose objective has further terms also have ``terms`` and, if features are compared, ``connectors``; runs in
    which a weight changes have ``weights``. A mark in the colour of a line says where its term ends.

    With one run each head has a colour, with several each run has one and each head a dash. Heads are scored with the
    averaged weights if the run keeps them.
    """
    loss, heads, rate, speed = (_Lines(runs) for _ in range(4))
    levels: dict[str, float] = {}
    for run, records in runs.items():
        steps = [record for record in records if record["kind"] == "step"]
        epochs = [record for record in records if record["kind"] == "epoch"]
        at = [record["step"] for record in steps]
        for term, head, dash in (("classification", "cls", "-"), ("distillation", "dist", "--")):
            if any(record[term] for record in steps):
                loss.add(run, term, at, [_number(record[term]) for record in steps], colour_of(head), dash)
                if head == "dist" and all("alpha" in record for record in steps):
                    loss.mark_end([record["alpha"] for record in steps])
        rate.add(run, "learning rate", at, [record["lr"] for record in steps], colour_of(""), "-")
        speed.add(run, "images/s", at, [record["images_per_second"] for record in steps], colour_of(""), "-")
        for head, dash in DASHES.items():
            scored = [(record["epoch"] + 1, scores_of(record)["heads"].get(head)) for record in epochs]
            points = [(epoch, score["top1"]) for epoch, score in scored if score is not None]
            if points:
                x, y = zip(*points, strict=True)
                heads.add(run, head, x, y, colour_of(head), dash)
        teacher = epochs[-1]["teacher"] if epochs else None
        if teacher is not None:
            name = score_text(teacher, 1).removeprefix("top-1 ")
            levels[f"teacher {name}"] = teacher["knn"] if "knn" in teacher else teacher["top1"]
    return {
        **({"loss": loss.chart(f"Loss: {' and '.join(loss.dashes)}", "step", "nats")} if loss.series else {}),
        **_term_charts(runs),
        "heads": heads.chart("Heads on the validation split", "epoch", "top-1 %", list(levels.items())),
        "learning_rate": rate.chart("Learning rate", "step", ""),
        "images_per_second": speed.chart("Speed", "step", "images/s"),
    }


def _term_charts(runs: Mapping[str, Records]) -> dict[str, Chart]:
    losses, cosines, weights = (_Lines(runs) for _ in range(3))
    looks: dict[str, tuple[str, str]] = {}
    for run, records in runs.items():
        steps = [record for record in records if record["kind"] == "step"]
        at = [step["step"] for step in steps]
        kinds = dict.fromkeys(kind for step in steps for kind in step.get("terms", {}))
        for kind in (*kinds, *(("alpha",) if any("alpha" in step for step in steps) else ())):
            look = looks.setdefault(kind, (colour_of("", len(looks)), TERM_DASHES[len(looks) % len(TERM_DASHES)]))
            if kind not in kinds:
                weights.add(run, kind, at, [_number(step.get("alpha")) for step in steps], *look)
                continue
            live = [step.get("terms", {}).get(kind, {}) for step in steps]
            weight = [term.get("weight", 0.0) for term in live]
            weights.add(run, kind, at, weight, *look)
            weights.mark_end(weight)
            for lines, value in ((losses, "loss"), (cosines, "cosine")):
                values = [_number(term.get(value)) for term in live]
                if not all(map(math.isnan, values)):
                    lines.add(run, kind, at, values, *look)
                    lines.mark_end(weight)
    charts = {
        "terms": losses.chart("Further terms, unweighted", "step", ""),
        "connectors": cosines.chart("Compared features: student and teacher", "step", "cosine"),
    }
    if any(len(set(line.y)) > 1 for line in weights.series):
        charts["weights"] = weights.chart("Weights in the loss", "step", "")
    return {name: chart for name, chart in charts.items() if chart.series}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def troubles_of(records: Records) -> str:
    """Return a sentence about the steps that were left out and the teacher's answers that were not finite."""
    steps = [record for record in records if record["kind"] == "step"]
    left_out, wrong = (sum(record.get(key, 0) for record in steps) for key in ("bad_steps", "teacher_not_finite"))
    return (
        f"{counted(left_out, 'step')} left out because the gradient was not finite; "
        f"{counted(wrong, 'teacher answer')} not finite"
    )


def scores_of(epoch: Mapping[str, Any]) -> Any:
    """Return an epoch's result of the weights that the run will keep."""
    return epoch[kept_weights(epoch)]


def rows_of(chart: Chart) -> list[dict[str, Any]]:
    """Return the points of a chart as rows of a table."""
    return [{"series": line.name, "x": x, "y": y} for line in chart.series for x, y in zip(line.x, line.y, strict=True)]
