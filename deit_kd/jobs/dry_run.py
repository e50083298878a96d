"""``deit-kd train --dry-run``: what a run will need, measured on two steps and one batch; nothing is left behind.

For ``--train.device cuda`` on a machine without CUDA, the steps are rehearsed on tensors without values, and the memory
that they would take is an estimate.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch

from deit_kd.asking import evaluate
from deit_kd.checkpoint import checkpoint_bytes
from deit_kd.config import Config
from deit_kd.console import duration_text, say, size_text
from deit_kd.distributed import Processes, process_group
from deit_kd.engine import StepResult, Trainer, train
from deit_kd.interfaces import DENSE, POOLED, Batch, InputError, Teacher, TeacherOutput, counted
from deit_kd.machine import seconds_of
from deit_kd.memory import peak_memory
from deit_kd.rehearsal import Rehearsal
from deit_kd.runs.average import average_line
from deit_kd.runs.lesson import Lesson, connect
from deit_kd.runs.prepared import Run
from deit_kd.runs.run import build_trainer, prepare
from deit_kd.store import Record, RecordingTeacher, StoredTeacher
from deit_kd.teachers import GuidedTeacher, NetworkTeacher
from deit_kd.teaching.fit import guide_config, is_unfitted
from deit_kd.teaching.ready import ready_lesson
from deit_kd.teaching.recording import columns_of, logits_kept

STEPS = 2  # the first includes one-time costs


@dataclass(frozen=True)
class Needs:
    """What a run will need.

    Args:
        memory: bytes that a process holds at its peak; on the GPU if there is one, or is to be one.
        checkpoint: bytes of one.
        store: bytes of the label store that the run fills; 0 if it fills none.
        time: None if the GPU is not here.
    """

    memory: int
    checkpoint: int
    store: int
    time: Time | None = None


@dataclass(frozen=True)
class Time:
    """How long a run will take.

    Args:
        step_seconds: of an optimiser step.
        evaluation_seconds: of one evaluation batch, reading its photos included.
        epoch_seconds: of an epoch's steps and its evaluation.
    """

    step_seconds: float
    evaluation_seconds: float
    epoch_seconds: float


def dry_run(config: Config) -> Needs:
    """Build everything, do two steps and one batch of evaluation, and print what the whole run will need.

    Raises:
        InputError: anything for which a run would be refused before its first step.
    """
    if _is_for_absent_cuda(config):
        return _estimate(config)
    with process_group(config.train.device) as processes:
        run = prepare(config, processes)
        lesson = _lesson(run)
        run = connect(run, lesson)
        trainer = build_trainer(run, lesson)
        step_seconds = _time_steps(run, trainer)
        evaluation_seconds = _time_evaluation(run, trainer)
        batches = -(-len(run.splits.validation) // (config.evaluate.batch_size * processes.count))
        epoch_seconds = run.loader.steps_per_epoch * step_seconds + batches * evaluation_seconds
        needs = Needs(
            memory=max(processes.gather(peak_memory(processes.device))),
            checkpoint=checkpoint_bytes(trainer.state()),
            store=_store_bytes(run, lesson),
            time=Time(step_seconds, evaluation_seconds, epoch_seconds),
        )
        if processes.is_main:
            say(f"memory: {size_text(needs.memory)} at the peak, {_of_what(run.processes)}")
            _tell(run, trainer, needs)
        return needs


def _is_for_absent_cuda(config: Config) -> bool:
    return config.train.device.partition(":")[0] == "cuda" and not torch.cuda.is_available()


def _estimate(config: Config) -> Needs:
    """Build everything on the CPU, rehearse two steps and one batch of evaluation, and print what a GPU will need.

    Raises:
        InputError: as `dry_run` does, or a step reads values.
    """
    with process_group("cpu") as processes:
        run = prepare(_as_on_cuda(config), processes)
        lesson = _lesson(run)
        run = replace(connect(run, lesson), processes=replace(processes, rank=0, count=1))  # DDP adds no memory
        trainer = build_trainer(run, lesson)
        trainer.distiller.teacher = _without_files(trainer.distiller.teacher, len(run.classes))
        # Optimisers that cannot leave out a step on the device would read whether to.
        for learner in trainer.learners:
            learner.optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        rehearsal = Rehearsal(trainer)
        try:
            stays = _rehearse(rehearsal, config, processes.count, len(run.classes))
        except RuntimeError as error:  # what reads values raises it; muon does, for one
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"train.device: {config.train.device!r}, but this machine has no CUDA device, and a step with "
                f"optim.name {config.optim.name!r} cannot be rehearsed without values ({reason}); "
                "try it where the GPU is"
            ) from error
        photos = run.splits.train.bytes_when_decoded() if config.data.cache == "device" else 0
        stays += photos
        needs = Needs(rehearsal.peak_bytes + photos, checkpoint_bytes(rehearsal.state()), _store_bytes(run, lesson))
        if processes.is_main:
            stay = "weights, moments, average, teacher" + ", photos" * bool(photos)
            whose = f", for each of {processes.count} processes" if processes.count > 1 else ""
            say(
                f"memory: about {size_text(needs.memory)} at the peak on the GPU{whose}: {size_text(stays)} stay "
                f"between steps ({stay}), {size_text(needs.memory - stays)} come and go "
                "(activations, gradients, the teacher's work)"
            )
            say(
                "memory: estimated from the shapes of all tensors, since this machine has no CUDA device; its context "
                "(about 0.5 GB), spare blocks of the allocator and workspaces of kernels come on top"
                + ("; train.compile usually takes less" if config.train.compile else "")
            )
            _tell(run, trainer, needs)
        return needs


def _as_on_cuda(config: Config) -> Config:
    """Return the recipe with what CUDA would choose, as far as the size of a tensor depends on it."""
    attention = "fused" if config.train.attention == "auto" else config.train.attention
    precision = "bf16" if config.train.precision == "fp16" else config.train.precision  # also two bytes
    train = {"attention": attention, "precision": precision, "compile": False}
    return config.with_keys(train=train, teacher={"compile": False}, data={"cache": "none", "workers": 0})


def _without_files(teacher: Teacher | None, classes: int) -> Teacher | None:
    """Return a teacher that takes the same memory of the device, and neither reads nor fills a label store."""
    if isinstance(teacher, GuidedTeacher):
        return GuidedTeacher(_without_files(teacher.answers, classes), teacher.guide)
    if isinstance(teacher, StoredTeacher):
        grid, width = teacher.grid, teacher.store.record.width

        def answer(batch: Batch) -> TeacherOutput:
            views = len(batch.images)
            features = None if width is None else {POOLED: batch.images.new_zeros(views, width)}
            places = None if grid is None else batch.labels.new_zeros(views, *grid)
            return TeacherOutput(batch.images.new_zeros(views, classes), features, dense_labels=places)

        return answer
    return teacher.teacher if isinstance(teacher, RecordingTeacher) else teacher


def _rehearse(rehearsal: Rehearsal, config: Config, processes: int, classes: int) -> int:
    """Rehearse two steps and one batch of evaluation; return the bytes that stay between steps."""
    steps = config.train.accumulation_steps
    views, size = config.train.batch_size // (processes * steps), config.data.image_size
    for step in range(STEPS):
        rehearsal.step((rehearsal.batch(views, size, classes) for _ in range(steps)), step)
    stays = rehearsal.bytes_now
    rehearsal.evaluate(rehearsal.batch(config.evaluate.batch_size, size, classes))
    return stays


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
                f"{role}: {recipe.teacher.name} is not fitted yet; a fit of "
                f"{counted(recipe.teacher.fit.epochs, 'epoch')} comes first and is not counted here; "
                "measured with untrained weights"
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
    answer = partial(
        evaluate,
        trainer.weights(),
        one,
        classes=len(run.classes),
        total=len(run.splits.validation),
        processes=run.processes,
        precision=run.config.train.precision,
        fusion=run.config.evaluate.fusion,
    )
    return seconds_of(answer, run.processes.device)


def _store_bytes(run: Run, lesson: Lesson) -> int:
    section = run.config.teacher
    if not isinstance(lesson.answers, NetworkTeacher) or section.store is None:
        return 0
    columns = columns_of(run.config, lesson.answers)
    grid = lesson.answers.grid if DENSE in columns else None
    record = Record(len(run.classes), logits_kept(run.config), grid, columns.get(POOLED))
    views = run.loader.views_per_epoch * run.config.train.epochs + len(run.splits.validation)
    return views * record.bytes_per_view


def _tell(run: Run, trainer: Trainer, needs: Needs) -> None:
    config = run.config.train
    place = next(folder for folder in (run.folder.absolute(), *run.folder.absolute().parents) if folder.is_dir())
    copies = config.keep_checkpoints + 2
    if needs.time is None:
        say("time: not measured, since this machine has no CUDA device")
    else:
        say(
            f"time: about {duration_text(needs.time.epoch_seconds)} per epoch ({run.loader.steps_per_epoch} steps of "
            f"{needs.time.step_seconds:.3g} s, evaluation {needs.time.evaluation_seconds:.3g} s per batch), "
            f"{duration_text(config.epochs * needs.time.epoch_seconds)} for {counted(config.epochs, 'epoch')}"
        )
    say(
        f"disk: {size_text(copies * needs.checkpoint)} for checkpoints ({config.keep_checkpoints} kept, the "
        f"best, and one being written, {size_text(needs.checkpoint)} each)"
        + (f", {size_text(needs.store)} for the label store" if needs.store else "")
        + f"; {size_text(shutil.disk_usage(place).free)} are free in {place}"
    )
    if trainer.student.ema is not None:
        say(average_line(trainer.student.ema, run.loader.total_steps))
    say("dry run: everything was built, nothing was written")


def _of_what(processes: Processes) -> str:
    what = "on the GPU" if processes.device.type == "cuda" else "resident, without the loader's workers"
    return f"{what}, for each of {processes.count} processes" if processes.count > 1 else what
