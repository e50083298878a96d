"""``deit-kd eval``: everything that a split says about a student's heads, whoever trained it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
from torch import Tensor

from deit_kd import data
from deit_kd.config import Config, build_parser, parse_config
from deit_kd.data import Photos, Portion
from deit_kd.distributed import Processes, finish, start
from deit_kd.engine import Answers, collect
from deit_kd.files import read_json, write_json
from deit_kd.interfaces import Batch, InputError
from deit_kd.jobs import parts
from deit_kd.jobs.sources import Source, check_classes, load_student, open_source
from deit_kd.metrics import every_head, judge
from deit_kd.models import choose_attention
from deit_kd.students import TimmStudent
from deit_kd.teachers import FrozenTeacher
from deit_kd.tracking import HEADS_FILE, console, print_comparison, print_scores, say

PREDICTIONS_FILE = "predictions.parquet"
EVALUATIONS = Path("runs/eval")  # of students that have no run


@dataclass(frozen=True)
class Examination:
    """A student, a split, and what the student and its teacher said about it."""

    source: Source
    config: Config
    photos: Photos
    student: TimmStudent
    teacher: FrozenTeacher | None
    answers: Answers
    unreadable: dict[int, str]  # the reason, by index in the split

    @property
    def fused(self) -> str:
        """Which head speaks for the student: its fused one, or the class head where it has no other."""
        return "cls" if self.answers.output.dist_logits is None else f"fused_{self.config.evaluate.fusion}"

    def predictions(self) -> Tensor:
        """Return the student's classes [n]."""
        return every_head(self.answers.output)[self.fused].argmax(-1)


def evaluate_source(text: str, config: Config, split: str, against: str | None, folder: Path | None) -> dict[str, Any]:
    """Score a student on a split; print the tables, write ``heads.json`` and ``predictions.parquet``.

    Args:
        text: a run, an exported folder, a file of weights or a timm model.
        config: what `text` stands for, with what a person overrode.
        split: ``train``, ``validation``, or another folder under ``data.root`` (``.`` is the root itself).
        against: a second student, in the same words as `text`.
        folder: where the files go; None is ``RUN/eval/<split>``, or ``runs/eval/<name>-<split>``.

    Returns:
        What ``heads.json`` holds.

    Raises:
        InputError: the student cannot be had, the photos are of other classes, or none can be read.
    """
    processes = start(config.train.device)
    try:
        source = open_source(text)
        examination = examine(source, config, split, processes)
        other = None if against is None else open_source(against)
        others = {} if other is None else {other.name: examine_other(other, examination, split, processes)}
        heads = judge_heads(examination, others)
        if processes.is_main:
            folder = folder or default_folder(source, split)
            write_evaluation(folder, examination, heads)
            tell(heads, examination, folder)
        return heads
    finally:
        finish()


def default_folder(source: Source, split: str) -> Path:
    """Return where the files of an evaluation go."""
    split = "root" if split == "." else split.replace("/", "-")
    return EVALUATIONS / f"{source.name}-{split}" if source.run is None else source.run / "eval" / split


def examine(source: Source, config: Config, split: str, processes: Processes) -> Examination:
    """Ask a student, and its teacher where there is one, about every readable image of a split.

    Raises:
        InputError: the student cannot be had, the photos are of other classes, or none can be read.
    """
    choose_attention(config.train.attention, processes.device)
    photos = _photos(config, split)
    check_classes(source, photos.classes)
    student = load_student(source, config, photos.classes, processes)
    teacher = _teacher(source, config, photos, processes)
    portions = data.build_portion_loader(
        photos,
        parts.build_evaluation_transform(config),
        batch_size=config.evaluate.batch_size,
        rank=processes.rank,
        processes=processes.count,
        workers=config.data.workers,
        pin_memory=processes.device.type == "cuda",
    )
    mine: dict[int, str] = {}
    answers = collect(
        student,
        teacher,
        _readable(portions, mine),
        classes=len(photos.classes),
        processes=processes,
        precision=config.train.precision,
    )
    unreadable = dict(sorted(pair for share in processes.gather(mine) for pair in share.items()))
    if not len(answers.labels):
        raise InputError(f"data.root: not one of {len(photos)} images of {split!r} can be read; {_first(unreadable)}")
    return Examination(source, config, photos, student, teacher, answers, unreadable)


def _readable(portions: Iterable[Portion], unreadable: dict[int, str]) -> Iterator[tuple[Tensor, Batch]]:
    for portion in portions:
        unreadable.update(portion.unreadable)
        if portion.batch is not None:
            yield portion.indices, portion.batch


def _first(unreadable: dict[int, str]) -> str:
    return next(iter(unreadable.values()), "there are none")


def _photos(config: Config, split: str) -> Photos:
    if split in ("train", "validation"):
        photos: Photos = getattr(parts.build_splits(config), split)
        return photos
    if config.data.name != "folder":
        raise InputError(f"--split: {config.data.name} has no split {split!r}; use train or validation")
    return data.one_split(config.data.root, split)


def _teacher(source: Source, config: Config, photos: Photos, processes: Processes) -> FrozenTeacher | None:
    of_the_run = source.facts.get("teacher") or {}
    checkpoint = config.teacher.checkpoint or of_the_run.get("source")
    if config.teacher.name is None or (source.run is not None and not of_the_run):
        return None
    try:
        return parts.build_teacher(config, photos.classes, processes, checkpoint)
    except InputError as error:
        if source.run is None:
            raise
        if processes.is_main:
            say(f"without the teacher: {error}")
        return None


def examine_other(source: Source, first: Examination, split: str, processes: Processes) -> Tensor:
    """Return what a second student predicts [n] for the images that the first has seen.

    Its own recipe says how it sees them; where they lie is the first one's.

    Raises:
        InputError: as `examine` does.
    """
    own, _ = parse_config(source.recipe, build_parser("deit-kd eval"))
    place = ("name", "root", "train_split", "validation_split", "validation_fraction", "workers")
    photos = own.data.model_copy(update={key: getattr(first.config.data, key) for key in place})
    train = own.train.model_copy(update={"device": first.config.train.device})
    config = own.model_copy(update={"data": photos, "train": train, "teacher": type(own.teacher)()})
    return examine(source, config, split, processes).predictions()


def judge_heads(examination: Examination, others: dict[str, Tensor]) -> dict[str, Any]:
    """Return what the evaluation's ``heads.json`` holds: that of a training run, and all that `judge` finds."""
    config, source, answers = examination.config, examination.source, examination.answers
    weights = "given" if source.run is None else read_json(source.run / HEADS_FILE)["weights"]
    judged = judge(
        answers.output,
        answers.labels,
        teacher_logits=answers.teacher_logits,
        others=others,
        fusion=config.evaluate.fusion,
        seed=config.seed,
    )
    return {
        "n": len(answers.labels),
        "weights": weights,
        "fusion": config.evaluate.fusion,
        "student": source.name,
        "classes": list(examination.photos.classes),
        "unreadable": {examination.photos.names[index]: reason for index, reason in examination.unreadable.items()},
        **judged,
    }


def write_evaluation(folder: Path, examination: Examination, heads: dict[str, Any]) -> None:
    """Write ``heads.json`` and ``predictions.parquet``.

    The table has a row for each readable image: ``path``, ``label``, by head ``<head>_top5`` (classes, best first)
    and ``<head>_top5_probability``, and ``teacher_top1``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / HEADS_FILE, heads)
    answers, photos = examination.answers, examination.photos
    classes = photos.classes

    def names(labels: Tensor) -> Any:
        return arrow.array([classes[label] for label in labels.tolist()])

    columns: dict[str, Any] = {
        "path": arrow.array([photos.names[index] for index in answers.indices.tolist()]),
        "label": names(answers.labels),
    }
    for head, probabilities in every_head(answers.output).items():
        best = probabilities.topk(min(5, len(classes)))
        columns[f"{head}_top5"] = arrow.array([[classes[label] for label in row] for row in best.indices.tolist()])
        columns[f"{head}_top5_probability"] = arrow.array(best.values.tolist(), arrow.list_(arrow.float32()))
    if answers.teacher_logits is not None:
        columns["teacher_top1"] = names(answers.teacher_logits.argmax(-1))
    parquet.write_table(arrow.table(columns), folder / PREDICTIONS_FILE)


def tell(heads: dict[str, Any], examination: Examination, folder: Path) -> None:
    """Print the tables of an evaluation and where its files are."""
    if heads["heads"]["dist"] is None:
        say(f"{heads['student']} has no distillation head: its class head alone is scored")
    if examination.unreadable:
        say(
            f"{len(examination.unreadable)} of {len(examination.photos)} images cannot be read and are left out: "
            f"{_first(examination.unreadable)}"
        )
    print_scores(heads)
    print_comparison(heads)
    console.print()
    say(f"numbers: {folder / HEADS_FILE}   predictions: {folder / PREDICTIONS_FILE}")
