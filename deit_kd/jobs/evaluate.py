"""``deit-kd eval``: score a run's heads apart and fused, on its own data or on other photos of its classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from deit_kd.config import Config
from deit_kd.data import Photos
from deit_kd.distributed import Processes, finish, start
from deit_kd.engine import evaluate, score_teacher
from deit_kd.files import read_json, write_json
from deit_kd.interfaces import InputError
from deit_kd.jobs import parts
from deit_kd.jobs.run import head_scores
from deit_kd.jobs.stored import stored_validation
from deit_kd.models import STUDENT_FOLDER, choose_attention
from deit_kd.students import TimmStudent
from deit_kd.tracking import FACTS_FILE, HEADS_FILE, print_heads, say


def evaluate_run(folder: Path, config: Config, split: str) -> dict[str, Any]:
    """Score the weights in ``folder/student``; print and return what ``heads.json`` holds.

    The numbers also go to ``folder/eval/<split>.json``.

    Args:
        folder: of a finished run.
        config: the run's, with what a person overrode.
        split: ``train`` or ``validation``.

    Raises:
        InputError: the run is not finished, or the photos are of other classes.
    """
    processes = start(config.train.device)
    try:
        choose_attention(config.train.attention, processes.device)
        facts, student = load_student(folder, config, processes)
        photos: Photos = getattr(parts.build_splits(config), split)
        _check_classes(tuple(facts["classes"]), photos.classes)
        batches = parts.build_evaluation_loader(config, photos, processes)
        teacher_score, predictions = _score_teacher(config, facts, photos, batches, processes)
        result = evaluate(
            {"student": student},
            batches,
            classes=len(photos.classes),
            total=len(photos),
            processes=processes,
            precision=config.train.precision,
            fusion=config.evaluate.fusion,
            teacher_predictions=predictions,
        )["student"]
        weights = read_json(folder / HEADS_FILE)["weights"]
        heads = head_scores(len(photos), weights, result, teacher_score)
        if processes.is_main:
            (folder / "eval").mkdir(exist_ok=True)
            write_json(folder / "eval" / f"{split}.json", heads)
            print_heads(heads)
            say(f"numbers: {folder / 'eval' / f'{split}.json'}")
        return heads
    finally:
        finish()


def load_student(folder: Path, config: Config, processes: Processes) -> tuple[dict[str, Any], TimmStudent]:
    """Return the facts of a finished run, and its student in eval.

    Raises:
        InputError: the run is not finished.
    """
    if not (folder / HEADS_FILE).is_file():
        raise InputError(f"{folder}: is no finished run (it has no {HEADS_FILE}); finish it with --resume auto")
    facts = read_json(folder / FACTS_FILE)
    student = parts.build_student(config, tuple(facts["classes"]), checkpoint=str(folder / STUDENT_FOLDER))
    return facts, student.to(processes.device).eval()


def _score_teacher(
    config: Config, facts: dict[str, Any], photos: Photos, batches: Any, processes: Processes
) -> tuple[Any, Tensor | None]:
    if facts["teacher"] is None:
        return None, None
    try:
        if "store" in facts["teacher"]:
            return stored_validation(config, photos, processes)
        teacher = parts.build_teacher(config, photos.classes, processes, facts["teacher"]["source"])
    except InputError as error:
        if processes.is_main:
            say(f"without the teacher: {error}")
        return None, None
    return score_teacher(teacher, batches, classes=len(photos.classes), total=len(photos), processes=processes)


def _check_classes(theirs: tuple[str, ...], ours: tuple[str, ...]) -> None:
    if theirs == ours:
        return
    first = next(
        (
            f"class {i} is {a!r} in the run and {b!r} here"
            for i, (a, b) in enumerate(zip(theirs, ours, strict=False))
            if a != b
        ),
        f"the run has {len(theirs)} classes, the data {len(ours)}",
    )
    raise InputError(f"data.root: other classes than the run's ({first}); name photos of the same classes")
