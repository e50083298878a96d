"""``deit-kd bench``: the training loop over its floor, which is the same step on data already in memory."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from deit_kd.config import Config
from deit_kd.distributed import finish, start
from deit_kd.engine import Distiller, Trainer, train
from deit_kd.interfaces import Batch, InputError
from deit_kd.jobs.run import Window, build_trainer, prepare
from deit_kd.jobs.train import ready_teacher
from deit_kd.tracking import console, say


def bench(config: Config, rounds: int, steps: int, json_file: Path | None) -> dict[str, Any]:
    """Time the parts of a recipe in one process, in turns, and print images/s with their spread.

    ``floor`` is the student's step and the teacher's answer on a batch that stays in memory; ``loop`` is the
    whole loop with its loader, mixing and meters. Batches that the workers made while something else was timed
    are used up before the clock starts, and what needs no loader waits until the workers rest. Evaluation and
    checkpoints are outside, and no run folder is written.

    Args:
        config: a recipe; its teacher may have random weights.
        rounds: how often each part is timed; the median counts.
        steps: optimiser steps a time.
        json_file: where the numbers go too.

    Raises:
        InputError: the recipe cannot work, or has too few steps for the rounds.
    """
    processes = start(config.train.device)
    try:
        run = prepare(config, processes)
        prefetched = 2 * config.data.workers + 1
        needed = 2 * rounds * (prefetched + steps) + 1
        if needed > run.loader.total_steps:
            raise InputError(
                f"train.epochs: {config.train.epochs} give {run.loader.total_steps} steps, too few for {rounds} "
                f"rounds of {steps}; use {-(-needed // run.loader.steps_per_epoch)} or more"
            )
        teacher, _ = ready_teacher(run)
        trainer = build_trainer(run, teacher)
        stream = iter(run.loader.batches(0))
        held = [next(stream).to(processes.device) for _ in range(config.train.accumulation_steps)]
        window = Window(processes.device)

        def loop(batches: Iterable[Batch], learner: Trainer = trainer) -> None:
            def meter(step: int, terms: Tensor) -> None:
                window.add(terms)
                if step % config.train.log_every_steps == 0:
                    window.read(processes, config.train.batch_size)

            train(learner, batches, first_step=0, total_steps=steps, after_step=meter)

        def use_up(batches: int) -> None:
            for _ in itertools.islice(stream, batches * config.train.accumulation_steps):
                pass

        from_stream: dict[str, Callable[[], None]] = {
            "loop": lambda: loop(stream),
            "loader alone": lambda: use_up(steps),
        }
        in_memory: dict[str, Callable[[], None]] = {"floor": lambda: loop(itertools.cycle(held))}
        if teacher is not None:
            answers = {id(batch.images): teacher(batch) for batch in held}
            knowing = Distiller(
                trainer.distiller.student,
                lambda batch: answers[id(batch.images)],
                run.objective,
                config.train.precision,
            )
            in_memory["student's step"] = lambda: loop(itertools.cycle(held), replace(trainer, distiller=knowing))
            in_memory["teacher's answer"] = lambda: [teacher(batch) for batch in held * steps].clear()
        rates: dict[str, list[float]] = {name: [] for name in (*from_stream, *in_memory)}

        def take(name: str, part: Callable[[], None]) -> None:
            rates[name].append(steps * config.train.batch_size / _seconds(part, processes.device))

        loop(itertools.cycle(held))
        for _ in range(rounds):
            for name, part in from_stream.items():
                use_up(prefetched)
                take(name, part)
            time.sleep(1.5 * prefetched * config.train.batch_size / rates["loader alone"][-1])
            for name, part in in_memory.items():
                take(name, part)
        return _report(rates, config, processes.device, json_file)
    finally:
        finish()


def _seconds(part: Callable[[], None], device: torch.device) -> float:
    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    settle()
    since = time.perf_counter()
    part()
    settle()
    return time.perf_counter() - since


def _report(
    rates: dict[str, list[float]], config: Config, device: torch.device, json_file: Path | None
) -> dict[str, Any]:
    shares = [whole / floor for whole, floor in zip(rates["loop"], rates["floor"], strict=True)]
    table = Table(
        title=f"{config.student.name}, {config.data.image_size} px, batch {config.train.batch_size}, "
        f"{config.train.precision}, {device.type} with {torch.get_num_threads()} threads"
    )
    for column in ("part", "images/s (median)", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, values in rates.items():
        table.add_row(name, *(f"{pick(values):.1f}" for pick in (statistics.median, min, max)))
    console.print(table)
    share = {"median": statistics.median(shares), "lowest": min(shares), "highest": max(shares)}
    result = {
        "rates": rates,
        "loop_over_floor": share,
        "recipe": config.model_dump(mode="json"),
        "torch": torch.__version__,
    }
    spread = f"{share['lowest']:.3f} to {share['highest']:.3f}, {len(shares)} rounds"
    say(f"loop over floor: {share['median']:.3f} ({spread})")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    return result
