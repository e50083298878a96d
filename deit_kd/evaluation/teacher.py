"""Which teacher a student is compared with: the one that taught it, its stored answers, or one that was named."""

from __future__ import annotations

from typing import Any

from deit_kd.config import Config, TeacherSection
from deit_kd.console import say
from deit_kd.data import Photos
from deit_kd.distributed import Processes
from deit_kd.evaluation.sources import Source
from deit_kd.interfaces import InputError
from deit_kd.places import TEACHER_OF_RUN
from deit_kd.runs import parts
from deit_kd.runs.lesson import Lesson
from deit_kd.runs.memory_format import lay_out
from deit_kd.teachers import NetworkTeacher
from deit_kd.teaching.stored import StoredAnswers, stored_validation

# What a run records of its teacher; a changed value comes from the command line.
DESCRIBED = ("pretrained", "label_set", "class_map", "args", "image_size", "mean", "std")


def teacher_of(
    source: Source, config: Config, photos: Photos, processes: Processes
) -> NetworkTeacher | StoredAnswers | None:
    """Return the teacher that a student is compared with, None for none.

    A run whose own teacher cannot be had is scored without it, which is said.

    Raises:
        InputError: the teacher of anything else cannot be had.
    """
    section = config.teacher
    if not (section.name or section.members or section.checkpoint or section.store):
        return None
    if source.run is None:
        return _network(config, photos, processes) if section.store is None else stored_validation(config, photos)
    own = source.own_config().teacher
    if whose(section) != whose(own):
        return _network(config, photos, processes)
    recorded = source.facts["teacher"]
    if recorded is None:
        return None
    try:
        if section.store is not None and "store" in recorded:
            return stored_validation(config, photos)
        if section.members or section.random_weights:
            network = _network(config, photos, processes)
        else:
            network = _recorded(source, config, own, photos, processes)
    except InputError as error:
        if processes.is_main:
            say(f"scored without the teacher: {error}")
        return None
    if section.channels_last is None:
        lay_out(Lesson(network), source.facts.get("memory_format"))
    return network


def whose(teacher: TeacherSection) -> tuple[Any, ...]:
    """Return what distinguishes one teacher from another."""
    return teacher.name, teacher.pretrained, teacher.checkpoint, teacher.random_weights, teacher.members


def _network(
    config: Config, photos: Photos, processes: Processes, checkpoint: str | None = None, **changes: Any
) -> NetworkTeacher:
    # A compiled network does not call the hooks of its layers.
    config = config.with_keys(teacher={"compile": False, **changes})
    return parts.build_teacher(config, photos.classes, processes, checkpoint or config.teacher.checkpoint)


def _recorded(
    source: Source, config: Config, own: TeacherSection, photos: Photos, processes: Processes
) -> NetworkTeacher:
    """Return the teacher as the run's record describes it, but for what the command line changes."""
    default = TeacherSection()
    unchanged = {key: getattr(default, key) for key in DESCRIBED if getattr(config.teacher, key) == getattr(own, key)}
    return _network(config, photos, processes, f"{source.run}{TEACHER_OF_RUN}", **unchanged)
