"""``deit-kd train --dry-run``: what a run will need, measured on two steps and one batch; nothing is left behind."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from deit_kd.asking import evaluate
from deit_kd.checkpoint import checkpoint_bytes
from deit_kd.config import Config
from deit_kd.console import duration_text, say, size_text
from deit_kd.distributed import Processes, process_group
from deit_kd.engine import StepResult, Trainer, train
from deit_kd.interfaces import Batch
from deit_kd.memory import peak_memory
from deit_kd.runs.lesson import Lesson, connect
from deit_kd.runs.prepared import Run
from deit_kd.runs.run import average_line, build_trainer, prepare
from deit_kd.store import Record
from deit_kd.teaching.fit import guide_config, is_unfitted
from deit_kd.teaching.ready import ready_lesson
from deit_kd.teaching.recording import logits_kept

STEPS = 2  # the first includes one-time costs


@dataclass(frozen=True)
class Needs:
    """What a run will need.

    Args:
        memory: bytes that a process holds at its peak; on the GPU if there is one.
        step_seconds: of an optimiser step.
        evaluation_seconds: of one evaluation batch, reading its photos included.
        epoch_seconds: of an epoch's steps and its evaluation.
        checkpoint: bytes of one.
        store: bytes of the label store that the run fills; 0 if it fills none.
    """

    memory: int
    step_seconds: float
    evaluation_seconds: float
    epoch_seconds: float
    checkpoint: int
    store: int


def dry_run(config: Config) -> Needs:
    """Build everything, do two steps and one batch of evaluation, and print what the whole run will need.

    Raises:
        InputError: anything for which a run would be refused before its first step.
    """
    with process_group(config.train.device) as processes:
        run = prepare(config, processes)
        lesson = _lesson(run)
        run = connect(run, lesson)
        trainer = build_trainer(run, lesson)
        step_seconds = _time_steps(run, trainer)
        evaluation_seconds = _time_evaluation(run, trainer)
        batches = -(-len(run.splits.validation) // (config.evaluate.batch_size * processes.count))
        needs = Needs(
            memory=max(processes.gather(peak_memory(processes.device))),
            step_seconds=step_seconds,
            evaluation_seconds=evaluation_seconds,
            epoch_seconds=run.loader.steps_per_epoch * step_seconds + batches * evaluation_seconds,
            checkpoint=checkpoint_bytes(trainer.state()),
            store=_store_bytes(run),
        )
        if processes.is_main:
            _tell(run, trainer, needs)
        return needs


def _lesson(run: Run) -> Lesson:
    config = run.config
    for role, recipe in (
        ("teacher", config if config.distill.needs_teacher else None),
        ("guide", guide_config(config)),
    ):
        if recipe is None or recipe.teacher.reads_store:
            continue
        if is_unfitted(recipe, run.splits) and run.processes.is_main:
            say(
                f"{role}: {recipe.teacher.name} is not fitted yet; a fit of {recipe.teacher.fit.epochs} epochs comes "
                "first and is not counted here; measured with untrained weights"
            )
    return ready_lesson(run, may_fit=False)


def _time_steps(run: Run, trainer: Trainer) -> float:
    ends = [time.perf_counter()]

    def note(step: int, result: StepResult) -> None:
        result.terms.tolist()  # waits for the device
        ends.append(time.perf_counter())

    steps = min(STEPS, run.loader.total_steps)
    train(trainer, run.loader.batches(0), first_step=0, total_steps=steps, after_step=note)
    return ends[-1] - ends[-2]


def _time_evaluation(run: Run, trainer: Trainer) -> float:
    one: Iterable[Batch] = islice(run.validation, 1)
    since = time.perf_counter()
    evaluate(
        trainer.weights(),
        one,
        classes=len(run.classes),
        total=len(run.splits.validation),
        processes=run.processes,
        precision=run.config.train.precision,
        fusion=run.config.evaluate.fusion,
    )
    return time.perf_counter() - since


def _store_bytes(run: Run) -> int:
    section = run.config.teacher
    if not run.config.distill.has_token or section.store is None or section.store_mode == "read":
        return 0
    record = Record(len(run.classes), logits_kept(run.config))
    views = run.loader.views_per_epoch * run.config.train.epochs + len(run.splits.validation)
    return views * record.bytes_per_view


def _tell(run: Run, trainer: Trainer, needs: Needs) -> None:
    config = run.config.train
    place = next(folder for folder in (run.folder.absolute(), *run.folder.absolute().parents) if folder.is_dir())
    copies = config.keep_checkpoints + 2
    say(f"memory: {size_text(needs.memory)} at the peak, {_of_what(run.processes)}")
    say(
        f"time: about {duration_text(needs.epoch_seconds)} per epoch ({run.loader.steps_per_epoch} steps of "
        f"{needs.step_seconds:.3g} s, evaluation {needs.evaluation_seconds:.3g} s per batch), "
        f"{duration_text(config.epochs * needs.epoch_seconds)} for {config.epochs} epochs"
    )
    say(
        f"disk: {size_text(copies * needs.checkpoint)} for checkpoints ({config.keep_checkpoints} kept, the "
        f"best, and one being written, {size_text(needs.checkpoint)} each)"
        + (f", {size_text(needs.store)} for the label store" if needs.store else "")
        + f"; {size_text(shutil.disk_usage(place).free)} are free in {place}"
    )
    if trainer.ema is not None:
        say(average_line(trainer.ema, run.loader.total_steps))
    say("dry run: everything was built, nothing was written")


def _of_what(processes: Processes) -> str:
    what = "on the GPU" if processes.device.type == "cuda" else "resident, without the loader's workers"
    return f"{what}, for each of {processes.count} processes" if processes.count > 1 else what
