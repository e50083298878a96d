"""``deit-kd train``: from photos in folders to a distilled student whose heads are measured apart."""

from __future__ import annotations

from typing import Any

from deit_kd.config import Config
from deit_kd.distributed import finish, start
from deit_kd.jobs import parts
from deit_kd.jobs.fit import fitted_teacher
from deit_kd.jobs.run import Run, execute, prepare
from deit_kd.teachers import FrozenTeacher


def train(config: Config) -> dict[str, Any]:
    """Train the student of `config`, its teacher first where the recipe says so; return ``heads.json``.

    Raises:
        InputError: anything that cannot work; nothing is written then.
    """
    processes = start(config.train.device)
    try:
        run = prepare(config, processes)
        heads = execute(run, *ready_teacher(run))
        if config.evaluate.report:
            # Imported here so that training need not wait for the plotting library.
            from deit_kd.jobs.report import write_report

            write_report([run.folder], None, processes)
        return heads
    finally:
        finish()


def ready_teacher(run: Run) -> tuple[FrozenTeacher | None, str | None]:
    """Return the run's teacher, fitted first where the recipe says so, and where its weights come from."""
    config = run.config
    if config.distill.kind == "none":
        return None, None
    checkpoint = config.teacher.checkpoint
    if config.teacher.fit.epochs:
        checkpoint = str(fitted_teacher(config, run.processes, run.splits))
    return parts.build_teacher(config, run.classes, run.processes, checkpoint), checkpoint
