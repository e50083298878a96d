"""``deit-kd train --dry-run``: what a run will need, measured on two steps and one batch; nothing is left behind."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from deit_kd.checkpoint import checkpoint_bytes
from deit_kd.config import Config, Fit
from deit_kd.distributed import Processes, finish, start
from deit_kd.engine import StepResult, Trainer, evaluate, train
from deit_kd.interfaces import Batch, Teacher
from deit_kd.jobs import parts
from deit_kd.jobs.course import Run
from deit_kd.jobs.fit import teacher_folder
from deit_kd.jobs.run import average_line, build_trainer, prepare
from deit_kd.jobs.stored import logits_kept
from deit_kd.jobs.train import ready_teacher
from deit_kd.store import Record
from deit_kd.tracking import HEADS_FILE, duration_text, say, size_text

STEPS = 2  # the first pays for what happens once


@dataclass(frozen=True)
class Needs:
    """What a run will need.

    Args:
        memory: bytes that a process holds at its peak, on the device where that is a GPU.
        step_seconds: an optimiser step.
        evaluation_seconds: one evaluation batch, its photos read.
        epoch_seconds: an epoch's steps and its evaluation.
        checkpoint: bytes of one.
        store: bytes of the label store that the run fills; 0 where it fills none.
    """

    memory: int
    step_seconds: float
    evaluation_seconds: float
    epoch_seconds: float
    checkpoint: int
    store: int


def dry_run(config: Config) -> Needs:
    """Build everything, do two steps and one batch of evaluation, and say what the whole run will need.

    Raises:
        InputError: anything that a run would be refused for before its first step.
    """
    processes = start(config.train.device)
    try:
        run = prepare(config, processes)
        trainer = build_trainer(run, _teacher(run))
        step_seconds = _time_steps(run, trainer)
        evaluation_seconds = _time_evaluation(run, trainer)
        batches = -(-len(run.splits.validation) // (config.evaluate.batch_size * processes.count))
        needs = Needs(
            memory=max(processes.gather(_peak(processes.device))),
            step_seconds=step_seconds,
            evaluation_seconds=evaluation_seconds,
            epoch_seconds=run.loader.steps_per_epoch * step_seconds + batches * evaluation_seconds,
            checkpoint=checkpoint_bytes(trainer.state()),
            store=_store_bytes(run),
        )
        if processes.is_main:
            _tell(run, trainer, needs)
        return needs
    finally:
        finish()


def _teacher(run: Run) -> Teacher | None:
    config, section = run.config, run.config.teacher
    folder = teacher_folder(config, run.splits)
    is_asked = config.distill.kind != "none" and (section.store is None or section.store_mode == "record")
    if not is_asked or not section.fit.epochs or (folder / HEADS_FILE).is_file():
        return ready_teacher(run)[0]
    if run.processes.is_main:
        say(
            f"teacher: {section.name} is not fitted yet, which {section.fit.epochs} epochs will do first, not counted "
            "here; unfitted weights stand in for it"
        )
    unfitted = section.model_copy(update={"fit": Fit(), "pretrained": False, "random_weights": True})
    trial = config.model_copy(update={"teacher": unfitted})
    return parts.build_teacher(trial, run.classes, run.processes, None)


def _time_steps(run: Run, trainer: Trainer) -> float:
    ends = [time.perf_counter()]

    def note(step: int, result: StepResult) -> None:
        result.terms.tolist()  # waits for the device
        ends.append(time.perf_counter())

    steps = min(STEPS, run.loader.total_steps)
    train(trainer, run.loader.batches(0), first_step=0, total_steps=steps, after_step=note)
    return ends[-1] - ends[-2]


def _time_evaluation(run: Run, trainer: Trainer) -> float:
    models: dict[str, nn.Module] = {"model": run.student}
    if trainer.ema is not None:
        models["ema"] = trainer.ema.module
    one: Iterable[Batch] = islice(run.validation, 1)
    since = time.perf_counter()
    evaluate(
        models,
        one,
        classes=len(run.classes),
        total=len(run.splits.validation),
        processes=run.processes,
        precision=run.config.train.precision,
        fusion=run.config.evaluate.fusion,
    )
    return time.perf_counter() - since


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _store_bytes(run: Run) -> int:
    section = run.config.teacher
    if run.config.distill.kind == "none" or section.store is None or section.store_mode == "read":
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
        f"time: about {duration_text(needs.epoch_seconds)} an epoch ({run.loader.steps_per_epoch} steps of "
        f"{needs.step_seconds:.3g} s, evaluation {needs.evaluation_seconds:.3g} s a batch), "
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
    return f"{what}, each of {processes.count} processes" if processes.count > 1 else what
