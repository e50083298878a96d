"""The teacher of a run: none, a network, one that is fitted first, a label store, and a guide beside it."""

from __future__ import annotations

from dataclasses import replace

from deit_kd.runs.lesson import Lesson, match_features
from deit_kd.runs.prepared import Run
from deit_kd.teachers import FrozenTeacher
from deit_kd.teaching.fit import guide_config, is_unfitted, online_teacher, unfitted_teacher
from deit_kd.teaching.stored import stored_teacher


def ready_lesson(run: Run, may_fit: bool = True) -> Lesson:
    """Return the teachers of the run, fitted first if the recipe says so.

    Args:
        run: a prepared run.
        may_fit: otherwise a network that has not been fitted yet is replaced by one with random weights.

    Raises:
        InputError: a teacher cannot be built, or does not provide the features that the recipe compares.
    """
    config, splits, processes = run.config, run.splits, run.processes
    distill, guide = config.distill, guide_config(config)
    is_stored = guide is None and config.teacher.reads_store
    if may_fit and distill.needs_features and not is_stored and is_unfitted(guide or config, splits):
        match_features(run, ready_lesson(run, may_fit=False))  # a wrong stage is refused before hours of fitting
    lesson = Lesson()
    if config.teacher.kind == "network" and (distill.has_token or (distill.needs_features and guide is None)):
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
