"""``deit-kd train``: from photos in folders to a distilled student whose heads are measured apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deit_kd.config import Config
from deit_kd.distributed import finish, start
from deit_kd.files import refusal
from deit_kd.interfaces import InputError
from deit_kd.runs.lesson import Lesson, match_features
from deit_kd.runs.prepared import Run
from deit_kd.runs.run import claimed, execute, prepare
from deit_kd.teachers import FrozenTeacher, NetworkTeacher
from deit_kd.teaching.fit import guide_config, is_unfitted, online_teacher, unfitted_teacher
from deit_kd.teaching.stored import recording, stored_teacher
from deit_kd.tracking import say


def train(config: Config) -> dict[str, Any]:
    """Train the student of `config`, its teacher first where the recipe says so; return ``heads.json``.

    Raises:
        InputError: anything that cannot work; nothing is written then.
    """
    processes = start(config.train.device, config.train.timeout_seconds)
    try:
        run = prepare(config, processes)
        with claimed(run.folder, processes):
            heads = _learn(run)
            if config.evaluate.report:
                _report(run)
        return heads
    finally:
        finish()


def _report(run: Run) -> None:
    """Write the report of a finished run, which stays whole where that fails, whatever the reason."""
    try:
        # Imported here so that training need not wait for the plotting library.
        from deit_kd.jobs.report import write_report

        write_report([run.folder], None, run.processes)
    except Exception as error:
        told = (refusal(error) if isinstance(error, OSError) else error) or error
        reason = str(told) if isinstance(told, InputError) else f"{type(told).__name__}: {told}"
        if run.processes.is_main:
            reason = " ".join(reason.split())
            say(f"warning: the run is whole, but its report failed ({reason}); deit-kd report {run.folder} tries again")


def _learn(run: Run) -> dict[str, Any]:
    lesson = ready_lesson(run)
    if run.config.teacher.store is None or not isinstance(lesson.answers, NetworkTeacher):
        return execute(run, lesson)
    with recording(run, lesson.answers, lesson.source) as (recorder, after_epoch):
        return execute(run, replace(lesson, answers=recorder), after_epoch)


def ready_lesson(run: Run, may_fit: bool = True) -> Lesson:
    """Return who teaches the run, fitted first where the recipe says so.

    Args:
        run: a prepared run.
        may_fit: otherwise a network with random weights stands in for one that is still to be fitted.

    Raises:
        InputError: a teacher cannot be had, or cannot give the features that the recipe compares.
    """
    config, splits, processes = run.config, run.splits, run.processes
    distill, guide = config.distill, guide_config(config)
    if may_fit and distill.needs_features and is_unfitted(guide or config, splits):
        match_features(run, ready_lesson(run, may_fit=False))  # a wrong stage is told before hours of fitting
    lesson = Lesson()
    if distill.has_token or (distill.needs_features and guide is None):
        if config.teacher.reads_store:
            lesson = Lesson(stored_teacher(run), config.teacher.store)
        elif is_unfitted(config, splits) and not may_fit:
            lesson = Lesson(unfitted_teacher(config, run.classes, processes))
        else:
            lesson = Lesson(*online_teacher(config, processes, splits))
    if guide is not None:
        if is_unfitted(guide, splits) and not may_fit:
            network, source = unfitted_teacher(guide, run.classes, processes), None
        else:
            network, source = online_teacher(guide, processes, splits)
        assert isinstance(network, FrozenTeacher)  # a guide has no members
        lesson = replace(lesson, guide=network, guide_source=source)
    return lesson
