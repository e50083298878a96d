"""``deit-kd bench``: the training loop with each kind of teacher, compared with the floors that its parts set."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from deit_kd.config import Config
from deit_kd.console import say
from deit_kd.data import Photos, Splits
from deit_kd.data.sharing import PREFETCHED
from deit_kd.distributed import Processes, process_group
from deit_kd.engine import Distiller, StepResult, Trainer, train
from deit_kd.interfaces import Batch, InputError, Teacher, counted
from deit_kd.kernels import preferred_attention
from deit_kd.losses import Objective
from deit_kd.machine import kind, seconds_of
from deit_kd.memory import peak_memory
from deit_kd.runs import parts
from deit_kd.runs.attention import attention_kernel
from deit_kd.runs.lesson import Answers, Lesson, build_distiller, connect
from deit_kd.runs.memory_format import lay_out_teachers
from deit_kd.runs.photos import build_splits
from deit_kd.runs.prepared import Run
from deit_kd.runs.progress import Progress
from deit_kd.runs.run import build_trainer, prepare
from deit_kd.store import RecordingTeacher, StoredTeacher
from deit_kd.teachers import NetworkTeacher
from deit_kd.teaching.ready import ready_lesson
from deit_kd.teaching.recording import fill_epoch, shares_of_dense, writing

STEP = "student's step"
TIMMS_STEP = "student's step as timm gives it"
COMPILED, NOT_COMPILED = "student's step, compiled", "student's step, not compiled"
ANSWER = "teacher's answer"
LOADER = "loader"
ALONE, ONLINE, STORED = "loop, no teacher", "loop, teacher online", "loop, label store"
SETTLING_STEPS = 2  # of a loop, before its clock starts: by then its workers are as far ahead as they will stay

# What is compared with the parts whose times add up to its floor.
RATIOS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (ALONE, (STEP,)),
    (ONLINE, (STEP, ANSWER)),
    (STORED, (STEP,)),
    (STORED, (ALONE,)),
    (STORED, (ONLINE,)),
    (STEP, (TIMMS_STEP,)),
    (COMPILED, (STEP,)),
    (NOT_COMPILED, (STEP,)),
)


def bench(config: Config, rounds: int, steps: int, photos: int, other_compile: bool, json_file: Path | None) -> None:
    """Time the loop of a recipe and its parts, taking turns in one process; print images/s, shares and their spread.

    The student's step and the teacher's answer are timed on a batch that stays in memory; a loop has its loader,
    mixing and meters. The store is filled with the views that the loops see, in a temporary folder, before any
    clock starts. Parts that need no loader are timed while the workers are idle. Evaluation and checkpoints are not
    timed, and no run folder is written.

    Args:
        config: a recipe; its teacher may have random weights. A store that it names is not touched.
        rounds: how often each part is timed; the median counts.
        steps: optimiser steps per timing.
        photos: how many of the training set to use, evenly spread; at least a batch.
        other_compile: time the student's step with the other choice of ``train.compile``, too.
        json_file: where to write the numbers as well.

    Raises:
        InputError: the recipe cannot work, or has peers.
    """
    if rounds < 1 or steps < 1:
        raise InputError(f"bench: --rounds {rounds} and --steps {steps} must be above 0")
    if config.peers:
        raise InputError("peers: bench times one student; time each alone with --peers [], or use train --dry-run")
    with process_group(config.train.device) as processes:
        splits = build_splits(config)
        with open_parts(config, processes, splits, rounds, steps, photos, other_compile) as timed:
            clock = _measure(timed, processes.device, rounds)
        views = len(splits.train) // config.augment.repeats * config.augment.repeats
        _report(clock, config, timed.taught_by, processes, views, json_file)


def _measure(timed: Parts, device: torch.device, rounds: int) -> Clock:
    """Return the rates of all parts; every other round runs them in reverse order."""
    clock = Clock(device)
    timed.warm_up()
    for turn in range(rounds):
        forwards = 1 if turn % 2 == 0 else -1
        for name in timed.streamed[::forwards]:
            timed.settle(name)
            clock.take(name, timed.images, partial(timed.run, name))
        time.sleep(1.5 * timed.prefetched * timed.batch_size / clock.rates[LOADER][-1])
        for name in timed.resting[::forwards]:
            clock.take(name, timed.images, partial(timed.run, name))
    return clock


def print_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as in ``docs/``, numbers aligned to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for cells in (header, ["-" * width for width in widths], *rows):
        first, *others = zip(cells, widths, strict=True)
        say(" | ".join(["| " + first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |")


def print_rates(what: str, measured: Mapping[str, Sequence[float]], digits: int) -> None:
    """Print median, lowest and highest of the values of all rounds, by name."""
    rows = [
        [name, *(f"{pick(values):.{digits}f}" for pick in (statistics.median, min, max))]
        for name, values in measured.items()
    ]
    print_markdown([what, "median", "lowest", "highest"], rows)


def _report(
    clock: Clock, config: Config, taught_by: str, processes: Processes, views: int, json_file: Path | None
) -> None:
    ratios = clock.ratios(RATIOS)
    peaks = clock.peaks or _process_peak()
    say(
        f"{config.student.name}, {config.data.image_size} px, {taught_by}, batch "
        f"{config.train.batch_size}, {config.train.precision}, {kind(processes.device)} with "
        f"{counted(torch.get_num_threads(), 'thread')} and {counted(config.data.workers, 'worker')}"
    )
    print_rates("images/s", clock.rates, 1)
    say("")
    print_rates("share", ratios, 3)
    say("")
    seconds = {name: views / statistics.median(clock.rates[name]) for name in clock.rates if name.startswith("loop")}
    say(f"an epoch of {views} views, from images/s: " + ", ".join(f"{n} {s:.0f} s" for n, s in seconds.items()))
    say("peak memory: " + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in peaks.items()))
    result = {
        "rates": clock.rates,
        "ratios": ratios,
        "epoch_seconds": seconds,
        "peak_memory": peaks,
        "machine": kind(processes.device),
        "threads": torch.get_num_threads(),
        "recipe": config.model_dump(mode="json"),
        "torch": torch.__version__,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def _process_peak() -> dict[str, int]:
    return {} if sys.platform == "win32" else {"the process, all parts": peak_memory(torch.device("cpu"))}


class Clock:
    """Images per second of parts that are timed in turns and, on CUDA, the peak memory of each."""

    def __init__(self, device: torch.device) -> None:
        self.rates: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}
        self._device = device

    def take(self, name: str, images: int, part: Callable[[], object]) -> None:
        """Time `part`, which handles `images`, once more."""
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        seconds = seconds_of(part, self._device)
        if on_cuda:
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self._device))
        self.rates.setdefault(name, []).append(images / seconds)

    def ratios(self, wanted: Iterable[tuple[str, Sequence[str]]]) -> dict[str, list[float]]:
        """Return, by round, the rate of a part over that of its floor's parts one after another, if all were timed."""
        return {
            f"{part} / {' + '.join(floor)}": self._ratio(part, floor)
            for part, floor in wanted
            if all(name in self.rates for name in (part, *floor))
        }

    def _ratio(self, part: str, floor: Sequence[str]) -> list[float]:
        rounds = zip(self.rates[part], *(self.rates[name] for name in floor), strict=True)
        return [rate * sum(1 / own for own in floors) for rate, *floors in rounds]


@contextmanager
def open_parts(
    config: Config,
    processes: Processes,
    splits: Splits,
    rounds: int,
    steps: int,
    photos: int,
    other_compile: bool = False,
) -> Iterator[Parts]:
    """Yield everything of a recipe that can be timed, with a temporary store; see `bench`.

    Raises:
        InputError: the recipe cannot work, or there are several processes.
    """
    if processes.count > 1:
        raise InputError(f"bench: {processes.count} processes cannot be timed; run it without torchrun")
    config = _with_epochs_enough(config, rounds, steps)
    a_batch = config.train.batch_size + config.augment.repeats
    run = prepare(config, processes, splits._replace(train=some_photos(splits.train, max(photos, a_batch))))
    run.loader.cycle_views(1)
    with TemporaryDirectory(prefix="deit-kd-bench-") as folder:
        lessons = _lessons(run, folder)
        online = lessons.get(ONLINE, Lesson())
        run = connect(run, online)
        lay_out_teachers(run, online)
        yield Parts(run, lessons, steps, other_compile)


def _with_epochs_enough(config: Config, rounds: int, steps: int) -> Config:
    """Return the recipe with an epoch for each step that a bench can take."""
    prefetched = PREFETCHED * config.data.workers + 1
    epochs = rounds * 4 * (prefetched + SETTLING_STEPS + steps) + 1
    return config.with_keys(train={"epochs": max(config.train.epochs, epochs)}, data={"prefetch_mb": None})


def some_photos(photos: Photos, count: int) -> Photos:
    """Return `count` of `photos`, evenly spread, or all if there are fewer."""
    count = min(count, len(photos))
    return photos.subset([index * len(photos) // count for index in range(count)])


def _lessons(run: Run, folder: str) -> dict[str, Lesson]:
    """Return the lesson of each loop that has a teacher; fill a store in `folder`."""
    config, processes = run.config, run.processes
    if not config.distill.needs_teacher:
        return {}
    online = ready_lesson(run)
    is_storable = config.distill.dense is None or config.distill.stores_dense
    if not config.distill.has_token or not isinstance(online.answers, NetworkTeacher) or not is_storable:
        return {ONLINE: online}
    with writing(config, folder, run.splits, run.loader, processes, online.answers, online.source) as store:
        recorder = RecordingTeacher(online.answers, store, shares_of_dense(config, run.loader))
        batch_size = config.train.batch_size
        fill_epoch(store, recorder, run.loader, 0, processes, batch_size, run.errors)
    guide = online.feature_giver if config.distill.needs_features else None
    return {ONLINE: online, STORED: Lesson(StoredTeacher(store, 1), guide=guide)}


class Parts:
    """Everything that is timed, of one run.

    Args:
        run: its loader repeats one epoch of views.
        lessons: of the loops that have a teacher.
        steps: optimiser steps per timing.
        other_compile: whether to time the student's step with the other choice of ``train.compile``, too.
    """

    def __init__(self, run: Run, lessons: Mapping[str, Lesson], steps: int, other_compile: bool) -> None:
        self._run, self._steps, self._lessons = run, steps, lessons
        device, micro_steps = run.processes.device, run.config.train.accumulation_steps
        self._progress, self._attention = Progress(device, run.objective.further_terms), attention_kernel(run)
        self._held = [batch.to(device) for batch in itertools.islice(run.loader.batches(0), micro_steps)]
        self._stream, self._place = iter(run.loader.batches(0, lent=True)), 0  # the next step of the stream
        lesson = lessons.get(ONLINE, Lesson())
        self.taught_by = _in_words(run.config, lesson)
        timms = as_timm_gives_it(run, lesson)
        own = build_trainer(run, lesson)
        self._teacher = own.distiller.teacher
        known = None if self._teacher is None else known_answers(self._teacher, self._held)
        self._in_memory = {STEP: _taught_by(own, known), TIMMS_STEP: _taught_by(timms, known)}
        if other_compile:
            other = not run.config.train.compile
            changed = replace(run, config=run.config.with_keys(train={"compile": other}))
            self._in_memory[COMPILED if other else NOT_COMPILED] = _taught_by(build_trainer(changed, lesson), known)
        alone = replace(run, objective=Objective("none"), connectors=None)
        self._loops = {ALONE: replace(own, distiller=build_distiller(alone, Lesson(), 0))}
        needs = run.objective.needs
        self._loops |= {name: _taught_by(own, lesson.teacher_for(needs)) for name, lesson in lessons.items()}

        self.streamed = (*self._loops, LOADER)
        self.resting = (*self._in_memory, *([] if self._teacher is None else [ANSWER]))
        self.batch_size = run.config.train.batch_size
        self.images = steps * self.batch_size

    def warm_up(self) -> None:
        """Run every step once."""
        for trainer in (*self._in_memory.values(), *self._loops.values()):
            self._train(trainer, itertools.cycle(self._held), 1)

    def settle(self, name: str) -> None:
        """Bring a part, and the workers of one that has some, to its steady pace."""
        if name in self.streamed:
            self._use_up(self.prefetched)
        if name in self._loops:
            self._go_on(name, SETTLING_STEPS)
        elif name in self._in_memory:
            self._train(self._in_memory[name], itertools.cycle(self._held), SETTLING_STEPS)

    def run(self, name: str) -> None:
        """Run one part, over `images` images."""
        if name in self._loops:
            self._go_on(name, self._steps)
        elif name in self._in_memory:
            self._train(self._in_memory[name], itertools.cycle(self._held), self._steps)
        elif name == LOADER:
            self._use_up(self._steps)
        else:
            self._ask()

    @property
    def prefetched(self) -> int:
        """One more than the batches that workers may be ahead."""
        return PREFETCHED * self._run.config.data.workers + 1

    def _use_up(self, batches: int) -> None:
        for _ in itertools.islice(self._stream, batches * self._run.config.train.accumulation_steps):
            pass
        self._place += batches

    def _go_on(self, name: str, steps: int) -> None:
        with self._lessons.get(name, Lesson()).reading_ahead(self._run, self._place):
            self._train(self._loops[name], self._stream, steps)
        self._place += steps

    def _train(self, trainer: Trainer, batches: Iterable[Batch], steps: int) -> None:
        def meter(step: int, result: StepResult) -> None:
            self._progress.add(result)
            if step % self._run.config.train.log_every_steps == 0:
                self._progress.read(self._run.processes, self.batch_size)

        kernel = None if trainer is self._in_memory[TIMMS_STEP] else self._attention
        with preferred_attention(kernel):
            train(trainer, batches, first_step=0, total_steps=steps, after_step=meter)

    def _ask(self) -> None:
        assert self._teacher is not None
        for batch in self._held * self._steps:
            self._teacher(batch)


def _in_words(config: Config, lesson: Lesson) -> str:
    """Return who teaches: the networks that were built, whatever the recipe calls them."""
    own = {"teacher": "its own average"} if config.learns_from_own_average else {}
    networks = {"teacher": lesson.answers, "guide": lesson.guide}
    named = own | {role: one.facts["name"] for role, one in networks.items() if isinstance(one, Answers)}
    return ", ".join(f"{role} {name}" for role, name in named.items()) or "no teacher"


def known_answers(teacher: Teacher, batches: Iterable[Batch]) -> Teacher:
    """Return a teacher with its answers to `batches`, found by their images, and no others."""
    answers = {id(batch.images): teacher(batch) for batch in batches}
    return lambda batch: answers[id(batch.images)]


def as_timm_gives_it(run: Run, lesson: Lesson) -> Trainer:
    """Return a trainer of the run's student with PyTorch's fused attention and plain AdamW, not compiled."""
    config = run.config
    plain = config.with_keys(
        optim={"args": {**config.optim.args, "fused": False}, "layer_decay": None},
        train={"compile": False, "attention": "fused"},
    )
    student = parts.build_student(plain, run.classes, run.processes.device)
    optimizer = parts.build_student_optimizer(plain, student)
    schedule = parts.build_schedule(plain, optimizer, run.loader.steps_per_epoch)
    timms = replace(run, config=plain, student=student, optimizer=optimizer, schedule=schedule, connectors=None)
    trainer = build_trainer(connect(timms, lesson), lesson)
    trainer.student.always_steps = True
    return trainer


def _taught_by(trainer: Trainer, teacher: Teacher | None) -> Trainer:
    own, taught = trainer.distiller, copy(trainer)
    taught.distiller = Distiller(own.student, teacher, own.objective, own.precision, own.compiled)
    return taught
