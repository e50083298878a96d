"""``deit-kd bench``: the training loop with each kind of teacher, over the floors that its parts lay."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deit_kd.config import Config, TeacherNetwork
from deit_kd.console import say
from deit_kd.distributed import Processes, finish, start
from deit_kd.interfaces import InputError
from deit_kd.jobs.timed import (
    ALONE,
    ANSWER,
    COMPILED,
    LOADER,
    NOT_COMPILED,
    ONLINE,
    STEP,
    STORED,
    TIMMS_STEP,
    Clock,
    Parts,
    open_parts,
)
from deit_kd.runs import parts

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


def bench(
    config: Config, rounds: int, steps: int, photos: int, other_compile: bool, json_file: Path | None
) -> dict[str, Any]:
    """Time the loop of a recipe and its parts in one process, in turns; print images/s, shares and their spread.

    The student's step and the teacher's answer are timed on a batch that stays in memory; a loop has its loader,
    mixing and meters. The store is filled with the views that the loops see, in a temporary folder, before any
    clock starts. What needs no loader waits until the workers rest. Evaluation and checkpoints are outside, and no
    run folder is written.

    Args:
        config: a recipe; its teacher may have random weights. A store that it names is left alone.
        rounds: how often each part is timed; the median counts.
        steps: optimiser steps a time.
        photos: of the training set to take, evenly spread; at least a batch.
        other_compile: time the student's step with the other choice of ``train.compile``, too.
        json_file: where the numbers go too.

    Raises:
        InputError: the recipe cannot work.
    """
    if rounds < 1 or steps < 1:
        raise InputError(f"bench: --rounds {rounds} and --steps {steps} must be above 0")
    processes = start(config.train.device)
    try:
        splits = parts.build_splits(config)
        with open_parts(config, processes, splits, rounds, steps, photos, other_compile) as timed:
            clock = _measure(timed, processes.device, rounds)
        views = len(splits.train) // config.augment.repeats * config.augment.repeats
        return _report(clock, config, processes, views, json_file)
    finally:
        finish()


def _measure(timed: Parts, device: torch.device, rounds: int) -> Clock:
    """Return the rates of all parts; every other round goes through them backwards."""
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
    """Print a table as it stands in ``docs/``, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for cells in (header, ["-" * width for width in widths], *rows):
        first, *others = zip(cells, widths, strict=True)
        say(" | ".join(["| " + first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |")


def print_rates(what: str, measured: Mapping[str, Sequence[float]], digits: int) -> None:
    """Print median, lowest and highest of what was measured in every round, by name."""
    rows = [
        [name, *(f"{pick(values):.{digits}f}" for pick in (statistics.median, min, max))]
        for name, values in measured.items()
    ]
    print_markdown([what, "median", "lowest", "highest"], rows)


def _report(clock: Clock, config: Config, processes: Processes, views: int, json_file: Path | None) -> dict[str, Any]:
    ratios = clock.ratios(RATIOS)
    peaks = clock.peaks or _process_peak()
    networks: Sequence[TeacherNetwork] = config.teacher.members or [config.teacher]
    teachers = " + ".join(str(network.name) for network in networks)
    say(
        f"{config.student.name}, {config.data.image_size} px, "
        f"{'no teacher' if config.distill.kind == 'none' else f'teacher {teachers}'}, batch "
        f"{config.train.batch_size}, {config.train.precision}, {processes.device.type} with "
        f"{torch.get_num_threads()} threads and {config.data.workers} workers"
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
        "threads": torch.get_num_threads(),
        "recipe": config.model_dump(mode="json"),
        "torch": torch.__version__,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _process_peak() -> dict[str, int]:
    if sys.platform == "win32":
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"the process, all parts": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
