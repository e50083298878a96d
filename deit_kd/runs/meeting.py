"""A run meets its teachers: scores, gates, and the same weights in every process and after a resume."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from torch import Tensor

from deit_kd.asking import score_teacher
from deit_kd.config import Guide, TeacherSection, in_keys_of, keys_of
from deit_kd.console import say, score_text
from deit_kd.distributed import on_main
from deit_kd.interfaces import InputError, counted
from deit_kd.models.state import tensors_hash
from deit_kd.run_folder import TeacherFacts, read_facts
from deit_kd.runs import parts
from deit_kd.runs.average import AverageTeacher
from deit_kd.runs.lesson import Answers, Lesson
from deit_kd.runs.prepared import Run
from deit_kd.runs.vectors import score_headless
from deit_kd.store import RecordingTeacher, StoredTeacher
from deit_kd.teachers import FrozenTeacher, check_columns, check_features, check_score


def meet_teachers(run: Run, lesson: Lesson) -> tuple[TeacherFacts | None, Tensor | None]:
    """Score the teachers before the first step; refuse one that cannot be right or differs between processes."""
    answers = None if isinstance(lesson.answers, AverageTeacher) else lesson.answers  # it has no score before a step
    if answers is None and lesson.guide is None:
        return None, None
    if answers is None:
        assert lesson.guide is not None
        facts, predictions = _met_guide(run, lesson.guide, lesson.guide_source)
        return cast(TeacherFacts, facts), predictions
    facts, predictions = _met(run, "teacher", answers, lesson.source, run.config.teacher)
    if lesson.guide is not None:
        facts["guide"], _ = _met_guide(run, lesson.guide, lesson.guide_source)
    return cast(TeacherFacts, facts), predictions


def _met_guide(run: Run, guide: FrozenTeacher, source: str | None) -> tuple[dict[str, Any], Tensor | None]:
    """Check the guide by the section that names it: its own or, beside a store, the teacher's."""
    section = run.config.guide if run.config.guide.is_named else run.config.teacher
    with keys_of(section.role):
        return _met(run, "guide", guide, source, section)


def _met(
    run: Run, role: str, teacher: Answers, source: str | None, section: TeacherSection | Guide
) -> tuple[dict[str, Any], Tensor | None]:
    """Check one teacher; return what the run records about it, and its predictions on validation."""
    facts: dict[str, Any] = {
        "name": section.name,
        **teacher.facts,
        "source": source,
        "random_weights": parts.has_random_weights(section),
    }
    if isinstance(teacher, StoredTeacher):
        facts["random_weights"] = teacher.facts["random_weights"]
    else:
        facts["weights"] = tensors_hash(teacher.state_dict())
    if not run.processes.same_everywhere([facts["weights"], facts.get("store")]):
        raise InputError(f"{role}: its weights differ between processes; give every process the same file")
    if run.checkpoint is not None:
        on_main(run.processes, lambda: _refuse_other_teacher(run, role, facts))
    if isinstance(teacher, FrozenTeacher) and not teacher.has_head:
        return _met_headless(run, role, facts, teacher, section), None
    if isinstance(teacher, StoredTeacher | RecordingTeacher):
        facts["score"] = teacher.store.score()
        predictions = teacher.store.predictions(run.processes.rank, run.processes.count).to(run.processes.device)
    else:
        facts["score"], predictions = score_teacher(
            teacher,
            run.processes.busy_over("runs the teacher", run.errors.watch("validation", run.validation)),
            classes=len(run.classes),
            total=len(run.splits.validation),
            processes=run.processes,
        )
        run.errors.tell()
    score, labels = facts["score"], run.splits.validation.labels
    shares = run.processes.gather(predictions.cpu().numpy())
    whole = np.empty(len(labels), dtype=np.int64)
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    seen = labels[whole >= 0]
    if not facts["random_weights"]:
        if section.min_top1 != 0:
            check_columns(facts, run.classes, labels, whole)
        check_score(facts["name"], score["top1"], score["nll"], seen, section.min_top1, bool(section.fit.epochs))
    _say_met(run, role, teacher, facts, section.role, len(seen))
    return facts, predictions


def _met_headless(
    run: Run, role: str, facts: dict[str, Any], teacher: FrozenTeacher, section: TeacherSection | Guide
) -> dict[str, Any]:
    """Check the features of a teacher without a head; return what the run records about it."""
    facts["score"], seen = score_headless(run, teacher)
    if not facts["random_weights"]:
        check_features(facts["name"], facts["score"], seen, section.min_top1, bool(section.fit.epochs))
    _say_met(run, role, teacher, facts, section.role, len(seen))
    return facts


def _say_met(run: Run, role: str, teacher: Answers, facts: dict[str, Any], keys: str, images: int) -> None:
    if run.processes.is_main:
        for line in teacher.lines(role):
            say(in_keys_of(keys, line))
        known = f", from {facts['score']['images']} of training" if "images" in facts["score"] else ""
        seen = counted(images, "image")
        say(f"{role}: {facts['name']}, {score_text(facts['score'], 2)} % on {seen}{known}")
        if facts["random_weights"]:
            say(f"warning: the {role} has random weights and teaches nothing")


def _refuse_other_teacher(run: Run, role: str, facts: dict[str, Any]) -> None:
    before: Any = read_facts(run.folder)["teacher"] or {}
    if role == "guide" and "guide" in before:
        before = before["guide"]
    if before.get("weights") != facts.get("weights"):
        raise InputError(f"resume: {run.folder} was started with other weights for the {role}; name the same ones")
    if before.get("store") != facts.get("store"):
        raise InputError(
            f"resume: {run.folder} was started with another label store; read the same one (teacher.store)"
            if before.get("store")
            else f"resume: {run.folder} was started with a teacher that answers itself, not from a label store; leave "
            "out teacher.store, or fill it with teacher.store_mode record"
        )
