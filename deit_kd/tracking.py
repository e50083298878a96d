"""The run folder and what is said about a run: records, TensorBoard, progress and tables."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from deit_kd.distributed import Processes
from deit_kd.files import write_atomically
from deit_kd.interfaces import Batch, InputError, printable
from deit_kd.run_folder import CHECKPOINTS as CHECKPOINTS
from deit_kd.run_folder import CONFIG_FILE as CONFIG_FILE
from deit_kd.run_folder import FACTS_FILE as FACTS_FILE
from deit_kd.run_folder import HEADS_FILE as HEADS_FILE
from deit_kd.run_folder import Facts as Facts
from deit_kd.run_folder import HeadScores as HeadScores
from deit_kd.run_folder import ScoreRecord as ScoreRecord
from deit_kd.run_folder import TeacherFacts as TeacherFacts
from deit_kd.run_folder import read_facts as read_facts
from deit_kd.run_folder import read_head_scores as read_head_scores

METRICS_FILE = "metrics.jsonl"
DATA_ERRORS_FILE = "data_errors.jsonl"  # views that are missing, since their photos cannot be read
SECONDS_BETWEEN_LINES = 30


def next_free_folder(parent: Path, recipe: str) -> Path:
    """Return ``parent/<recipe>-<n>`` with the first n above every one that is there."""
    return parent / f"{recipe}-{1 + max(_numbers(parent, recipe), default=0)}"


def newest_folder(parent: Path, recipe: str) -> Path | None:
    """Return the ``parent/<recipe>-<n>`` with the largest n, if there is one."""
    numbers = _numbers(parent, recipe)
    return parent / f"{recipe}-{max(numbers)}" if numbers else None


def _numbers(parent: Path, recipe: str) -> list[int]:
    names = os.listdir(parent) if parent.is_dir() else []
    matches = (re.fullmatch(rf"{re.escape(recipe)}-(\d+)", name) for name in names)
    return [int(match[1]) for match in matches if match]


def check_tracking(wandb: bool) -> None:
    """Raise an InputError where Weights & Biases is asked for and not installed."""
    if wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("tracking.wandb: true, but wandb is not installed; pip install wandb, or set it false")


class WandbBoard:
    """Weights & Biases, as if it were TensorBoard; a run that is resumed goes on there, too."""

    def __init__(self, folder: Path, project: str, recipe: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        identity = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
        self._run = wandb.init(
            project=project, name=folder.name, id=identity, resume="allow", dir=str(folder), config=dict(recipe)
        )

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Log one number."""
        self._run.log({name: value}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class Journal:
    """Writes ``metrics.jsonl`` and ``tensorboard/``, and tells the person; silent where it is not the main process.

    Args:
        folder: of the run.
        title: of the progress line.
        total_steps: of the run.
        first_step: steps already done; records after it, of a run that was cut short, are dropped.
        is_main: whether this process writes and talks.
        wandb_project: log to this project of Weights & Biases, too; None does not.
        recipe: what is kept there of the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        title: str,
        total_steps: int,
        first_step: int,
        is_main: bool,
        wandb_project: str | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self._is_main = is_main
        self._metrics = folder / METRICS_FILE
        self._progress: Progress | None = None
        if not is_main:
            return
        write_atomically(self._metrics, "".join(_lines_until(self._metrics, first_step)).encode())
        self._boards: list[Any] = [SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)]
        if wandb_project is not None:
            self._boards.append(WandbBoard(folder, wandb_project, recipe or {}))
        self._first_step, self._total_steps, self._since = first_step, total_steps, time.perf_counter()
        if console.is_terminal:
            self._progress = _progress()
            self._task = self._progress.add_task(printable(title), total=total_steps, completed=first_step, note="")
            self._progress.start()

    def record(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        """Append one record, and its numbers to TensorBoard."""
        if not self._is_main:
            return
        with open(self._metrics, "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **fields}) + "\n")
        for name, value in _numbers_of(fields):
            for board in self._boards:
                board.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, note: str) -> None:
        """Move the bar; where there is no terminal, print a line."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, note=note)
        elif self._is_main:
            per_step = (time.perf_counter() - self._since) / max(1, step - self._first_step)
            left = datetime.timedelta(seconds=round(per_step * (self._total_steps - step)))
            say(f"{note}  {left} left")

    def close(self) -> None:
        """Stop the bar and flush the files."""
        if self._progress is not None:
            self._progress.stop()
        if self._is_main:
            for board in self._boards:
                board.close()


def _lines_until(file: Path, step: int) -> list[str]:
    """Return the whole lines of a file of records that belong to the first `step` steps."""
    lines = file.read_text(errors="replace").splitlines(keepends=True) if file.is_file() else []
    return [line for line in lines if line.endswith("\n") and _step_of(line) <= step]


class DataErrors:
    """``data_errors.jsonl``: a line for each view that is missing, since its photo cannot be read.

    Every process notes what its own batches lack; `tell`, which all of them call, brings the notes together, so that
    one process writes and all of them stop alike when there are too many.

    Args:
        folder: of the run, or of the label store.
        names: of the photos, by split.
        most: photos that may be unreadable.
        processes: of the run.
        first_step: steps already done; lines after it, of a run that was cut short, are dropped.
        skips: whether anything can be missing; where not, nothing is told nor written.
    """

    def __init__(
        self,
        folder: Path,
        names: Mapping[str, Sequence[str]],
        *,
        most: int,
        processes: Processes,
        first_step: int = 0,
        skips: bool = True,
    ) -> None:
        self.step = first_step  # that what is noted belongs to
        self._file = folder / DATA_ERRORS_FILE
        self._names, self._most, self._processes, self._skips = names, most, processes, skips
        self._lines: dict[tuple[Any, ...], dict[str, Any]] = {}  # by what they are about
        self._photos: dict[str, str] = {}  # the reason, by split and name
        self._keep(map(json.loads, processes.share(_lines_until(self._file, first_step))))
        self._is_cut_back = False
        self._noted: list[dict[str, Any]] = []

    def watch(self, split: str, batches: Iterable[Batch], epoch: int | None = None) -> Iterator[Batch]:
        """Yield `batches` and note what they lack; `epoch` is the one that is evaluated, where they are no views."""
        for batch in batches:
            self.note(split, batch, epoch)
            yield batch

    def note(self, split: str, batch: Batch, epoch: int | None = None) -> None:
        """Note what one batch of a split lacks."""
        for view in batch.missing:
            of_view = epoch if view.epoch is None else view.epoch
            self._noted.append(
                {
                    "step": 0 if of_view is None else self.step,  # a teacher is scored before the first step
                    "split": split,
                    "epoch": of_view,
                    "position": view.position,
                    "path": self._names[split][view.photo],
                    "reason": view.reason,
                }
            )

    def tell(self) -> None:
        """Write what all processes have noted since.

        Raises:
            InputError: more photos than allowed cannot be read; on every process.
        """
        if not self._skips:
            return
        noted = [line for share in self._processes.gather(self._noted) for line in share]
        self._noted = []
        known = len(self._photos)
        new = self._keep(sorted(noted, key=_subject))
        if self._processes.is_main:
            self._write(new)
        found, last = len(self._photos), next(reversed(self._photos.values()), None)
        if found > self._most:
            raise InputError(
                f"data.max_errors: {found} photos are unreadable, more than {self._most}; the last: {last}"
            )
        if found > known and self._processes.is_main:
            say(f"left out: {found} photos so far, the last: {last}")

    def views(self, split: str) -> int:
        """Return how many views of a split were missing, as far as it was told."""
        return sum(line["split"] == split for line in self._lines.values())

    def unreadable(self, split: str, step: int) -> dict[str, str]:
        """Return why photos of a split could not be read at one step, by name, as far as it was told."""
        return {
            line["path"]: line["reason"]
            for line in self._lines.values()
            if (line["split"], line["step"]) == (split, step)
        }

    def _keep(self, lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Remember those of `lines` that are about something new, and return them."""
        new = [line for line in lines if _subject(line) not in self._lines]
        for line in new:
            self._lines[_subject(line)] = line
            self._photos[f"{line['split']}/{line['path']}"] = line["reason"]
        return new

    def _write(self, new: list[dict[str, Any]]) -> None:
        if not self._file.parent.is_dir():
            return  # a dry run has no folder
        if self._is_cut_back:
            with open(self._file, "a") as file:
                file.write(_as_text(new))
        elif self._lines or self._file.is_file():
            write_atomically(self._file, _as_text(self._lines.values()).encode())
        self._is_cut_back = True


def _subject(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a line is about, in the order of the file."""
    return line["step"], line["split"], -1 if line["epoch"] is None else line["epoch"], line["position"]


def _as_text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _step_of(line: str) -> float:
    """Return the step of a record; one that a power cut has damaged comes after all others."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


class ViewMeter:
    """Tells how many of many views are done, how fast, and the time left; silent where it is not the main process.

    Args:
        total: views.
        is_main: whether this process talks.
    """

    def __init__(self, total: int, is_main: bool) -> None:
        self._total, self._is_main = total, is_main
        self._done = self._asked = 0
        self._since = self._said = time.perf_counter()
        self._progress = _progress() if is_main and console.is_terminal else None
        if self._progress is not None:
            self._task = self._progress.add_task("views", total=total, note="")

    def __enter__(self) -> ViewMeter:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, views: int) -> None:
        """Count views that were just asked for; where there is no terminal, print a line now and then."""
        self._asked += views
        self._done = min(self._total, self._done + views)
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)
        elif time.perf_counter() - self._said > SECONDS_BETWEEN_LINES:
            self._say(f"{self._done}/{self._total} views")

    def reach(self, done: int, note: str) -> None:
        """Say that `done` views are done, those included that were there before."""
        self._done = done
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)
        else:
            self._say(note)

    def _say(self, note: str) -> None:
        self._said = time.perf_counter()
        if self._is_main and self._asked:
            rate = self._asked / (self._said - self._since)
            left = timedelta(seconds=round((self._total - self._done) / rate))
            say(f"{note}, {rate:.0f} views/s, {left} left")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
        console=console,
    )


def _numbers_of(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    numbers: list[tuple[str, float]] = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            numbers += _numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            numbers.append((prefix + name, value))
    return numbers


class _PlainConsole(Console):
    """Names of folders and classes are text here: neither markup nor anything that a terminal obeys."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


# Into a file, rich would fold every table to 80 columns.
_width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
console = _PlainConsole(highlight=False, soft_wrap=True, markup=False, emoji=False, width=_width)


def say(line: str) -> None:
    """Print one line, as it stands."""
    console.print(line)


def score_text(score: Mapping[str, Any], digits: int) -> str:
    """Return what a teacher scored, in percent: its top-1 or, without a head, that of its k-NN."""
    return f"k-NN {score['knn']:.{digits}f}" if "knn" in score else f"top-1 {score['top1']:.{digits}f}"


def size_text(count: float) -> str:
    """Return bytes for a person."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def duration_text(seconds: float) -> str:
    """Return seconds for a person."""
    return str(timedelta(seconds=round(seconds)))


def print_heads(result: Mapping[str, Any]) -> None:
    """Print the table of a ``heads.json``."""
    unreadable = f" ({len(result['unreadable'])} more cannot be read)" if result["unreadable"] else ""
    table = Table(title=f"{result['n']} images{unreadable}, weights: {result['weights']}")
    for column in ("head", "top-1 %", "top-5 %", "NLL", "agrees with teacher"):
        table.add_column(column, justify="left" if column == "head" else "right")
    agreement = result["agreement"]
    rows = {**result["heads"], "teacher": result["teacher"]}
    for name, score in rows.items():
        if score is not None:
            agrees = agreement.get(f"{name}_teacher")
            table.add_row(
                name,
                f"{score['top1']:.2f}",
                "-" if score["top5"] is None else f"{score['top5']:.2f}",
                f"{score['nll']:.4f}",
                "-" if agrees is None else f"{agrees:.3f}",
            )
    console.print(table)


def print_scores(result: Mapping[str, Any]) -> None:
    """Print every head's scores of an evaluation, with their 95 % intervals, and what calibration mends."""
    table = Table(title=f"{result['student']}: {result['n']} images, weights: {result['weights']}; [95 % interval]")
    columns = {"top-1 %": "top1", "top-5 %": "top5", "NLL": "nll", "Brier": "brier", "ECE": "ece"}
    for column in ("head", *columns, "T", "NLL at T"):
        table.add_column(column, justify="left" if column == "head" else "right")
    rows = {**{head: score for head, score in result["heads"].items() if head != "fused"}, "teacher": result["teacher"]}
    for name, score in rows.items():
        if score is not None:
            scaled = result["temperature"].get(name)
            table.add_row(
                name.replace("_", ", "),
                *(_with_interval(score, key) for key in columns.values()),
                *(("-", "-") if scaled is None else (f"{scaled['temperature']:.2f}", f"{scaled['after']['nll']:.4f}")),
            )
    console.print(table)


def print_probe(result: Mapping[str, Any]) -> None:
    """Print what the features of a student are worth, beside those of its architecture with random weights."""
    probe = result["probe"]
    table = Table(title=f"features, from {probe['images']} training images to {result['n']}; top-1 % [95 % interval]")
    for column in ("weights", f"{probe['student']['knn']['neighbours']}-NN", "linear probe"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for name, weights in (("student", result["student"]), ("random", "random")):
        table.add_row(weights, *(_with_interval(probe[name][kind], "top1") for kind in ("knn", "linear")))
    console.print(table)


def _with_interval(score: Mapping[str, Any], key: str) -> str:
    if score[key] is None:
        return "-"
    digits = 2 if key.startswith("top") else 3
    if key not in score["intervals"]:  # measured elsewhere, image by image unknown
        return f"{score[key]:.{digits}f}"
    low, high = score["intervals"][key]
    return f"{score[key]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_students(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the scores of several students, and the first one's against each of the others' heads on the same images.

    Args:
        results: of evaluations, by the name of the student.
    """
    base, *_ = results
    table = Table(title=f"{results[base]['n']} images; [95 % interval]; differences in points, paired, from {base}")
    columns = {"top-1 %": "top1", "NLL": "nll", "ECE": "ece"}
    for column in ("student", "head", *columns, f"over {base}", "alone right", "p"):
        table.add_column(column, justify="left" if column in ("student", "head") else "right")
    for name, result in results.items():
        compared = {row["first"]: row for row in result["comparisons"] if row["second"].split(", ")[0] == base}
        for head in ("cls", "dist", "fused"):
            score, row = result["heads"][head], compared.get(head)
            if score is None:
                continue
            table.add_row(
                name if head == "cls" else "",
                head,
                *(_with_interval(score, key) for key in columns.values()),
                *(("", "", "") if row is None else _compared(row)),
            )
        if result["teacher"] is not None:
            table.add_row("", "teacher", *(_with_interval(result["teacher"], key) for key in columns.values()))
    console.print(table)


def _compared(row: Mapping[str, Any]) -> tuple[str, str, str]:
    low, high = row["interval"]
    difference = f"{row['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"
    return difference, f"{row['only_first']} : {row['only_second']}", f"{row['p']:.3g}"


def print_comparison(result: Mapping[str, Any]) -> None:
    """Print McNemar's test of each two heads, who disagrees with whom, and the best weight of the fusion."""
    if result["comparisons"]:
        table = Table(title="the same images: who alone is right, and McNemar's test")
        for column in ("first", "second", "alone right", "difference, points", "p"):
            table.add_column(column, justify="left" if column in ("first", "second") else "right")
        for row in result["comparisons"]:
            difference, alone, p = _compared(row)
            table.add_row(row["first"], row["second"], alone, difference, p)
        console.print(table)
    names, matrix = result["disagreement"]["names"], result["disagreement"]["matrix"]
    table = Table("disagreement", *names, title="share of the images on which two differ")
    for name, row in zip(names, matrix, strict=True):
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.print(table)
    for fusion, found in (result["fusion_weight"] or {}).items():
        say(
            f"fused by {fusion}: the best weight of cls on one half is {found['weight_of_cls']:.2f}; on the other it "
            f"gives {found['weighted']['top1']:.2f} % and NLL {found['weighted']['nll']:.4f}, equal weights "
            f"{found['equal']['top1']:.2f} % and {found['equal']['nll']:.4f}"
        )
