"""``deit-kd train``: from photos in folders to a distilled student whose heads are scored separately."""

from __future__ import annotations

from dataclasses import replace

from deit_kd.config import Config
from deit_kd.console import say
from deit_kd.distributed import process_group
from deit_kd.files import refusal
from deit_kd.interfaces import InputError
from deit_kd.interrupts import raise_pending
from deit_kd.run_folder import HeadScores
from deit_kd.runs.opening import claimed
from deit_kd.runs.prepared import Run
from deit_kd.runs.run import execute, prepare
from deit_kd.teachers import NetworkTeacher
from deit_kd.teaching.ready import ready_lesson
from deit_kd.teaching.recording import recording


def train(config: Config) -> HeadScores:
    """Train the student of `config`, its teacher first if the recipe says so; return ``heads.json``.

    Raises:
        InputError: anything that cannot work; nothing is written then.
    """
    with process_group(config.train.device, config.train.timeout_seconds) as processes:
        run = prepare(config, processes)
        with claimed(run.folder, processes):
            heads = _learn(run)
            if config.evaluate.report:
                _report(run)
        return heads


def _report(run: Run) -> None:
    """Write the report of a finished run; if that fails for any reason, the run stays complete."""
    raise_pending()
    try:
        # Imported here so that training does not wait for the plotting library.
        from deit_kd.evaluation.page import write_report

        write_report([run.folder], None, run.processes)
    except Exception as error:
        told = (refusal(error) if isinstance(error, OSError) else error) or error
        reason = str(told) if isinstance(told, InputError) else f"{type(told).__name__}: {told}"
        if run.processes.is_main:
            reason = " ".join(reason.split())
            say(
                f"warning: the run is complete, but its report failed ({reason}); try again with deit-kd report "
                f"{run.folder}"
            )


def _learn(run: Run) -> HeadScores:
    lesson = ready_lesson(run)
    if run.config.teacher.store is None or not isinstance(lesson.answers, NetworkTeacher):
        return execute(run, lesson)
    with recording(run, lesson.answers, lesson.source) as (recorder, after_epoch):
        return execute(run, replace(lesson, answers=recorder), after_epoch)
