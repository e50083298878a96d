"""``deit-kd train``: from photos in folders to a distilled student whose heads are measured apart."""

from __future__ import annotations

from typing import Any

from deit_kd.config import Config
from deit_kd.distributed import finish, start
from deit_kd.jobs.course import Run
from deit_kd.jobs.fit import online_teacher
from deit_kd.jobs.run import claimed, execute, prepare
from deit_kd.jobs.stored import recording, stored_teacher
from deit_kd.store import StoredTeacher
from deit_kd.teachers import NetworkTeacher


def train(config: Config) -> dict[str, Any]:
    """Train the student of `config`, its teacher first where the recipe says so; return ``heads.json``.

    Raises:
        InputError: anything that cannot work; nothing is written then.
    """
    processes = start(config.train.device, config.train.timeout_seconds)
    try:
        run = prepare(config, processes)
        with claimed(run):
            heads = _learn(run)
            if config.evaluate.report:
                # Imported here so that training need not wait for the plotting library.
                from deit_kd.jobs.report import write_report

                write_report([run.folder], None, processes)
        return heads
    finally:
        finish()


def _learn(run: Run) -> dict[str, Any]:
    teacher, source = ready_teacher(run)
    if teacher is None or isinstance(teacher, StoredTeacher) or run.config.teacher.store is None:
        return execute(run, teacher, source)
    with recording(run, teacher, source) as (recorder, after_epoch):
        return execute(run, recorder, source, after_epoch)


def ready_teacher(run: Run) -> tuple[NetworkTeacher | StoredTeacher | None, str | None]:
    """Return the run's teacher, and where its weights or its answers come from."""
    config = run.config
    if config.distill.kind == "none":
        return None, None
    if config.teacher.store is not None and config.teacher.store_mode == "read":
        return stored_teacher(run), config.teacher.store
    return online_teacher(config, run.processes, run.splits)
