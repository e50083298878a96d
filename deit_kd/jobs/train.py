"""``deit-kd train``: from photos in folders to a distilled student whose heads are measured apart."""

from __future__ import annotations

from typing import Any

from deit_kd.config import Config
from deit_kd.distributed import finish, start
from deit_kd.jobs import parts
from deit_kd.jobs.fit import fitted_teacher
from deit_kd.jobs.run import execute, prepare


def train(config: Config) -> dict[str, Any]:
    """Train the student of `config`, its teacher first where the recipe says so; return ``heads.json``.

    Raises:
        InputError: anything that cannot work; nothing is written then.
    """
    processes = start(config.train.device)
    try:
        run = prepare(config, processes)
        if config.distill.kind == "none":
            return execute(run, None)
        checkpoint = config.teacher.checkpoint
        if config.teacher.fit.epochs:
            checkpoint = str(fitted_teacher(config, processes, run.splits))
        return execute(run, parts.build_teacher(config, run.classes, processes, checkpoint), checkpoint)
    finally:
        finish()
