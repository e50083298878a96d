"""How long a step of each arm takes, its teacher included: at some places of the run, in turns.

    python benchmarks/step_times.py --config configs/photos.yaml --teacher.fit.epochs 0 --teacher.random_weights true \\
        [--arms benchmarks/family.yaml] [--at 0.25 0.75] [--rounds 7] [--steps 4] [--any.recipe_key VALUE]

An arm is a name and the keys of the recipe that it overrides, as for `folds.py`; without arms, the recipe is timed. A
place is a share of the run: a term that is over there costs nothing. Prints a Markdown table; ratios are taken within
a round, over the first arm at the same place. Images are random and in memory, so no data is read.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from bare_step import prepare_bare, random_batch
from folds import overrides, read_arms

from deit_kd.config import Config, build_parser, parse_config
from deit_kd.console import say
from deit_kd.distributed import Processes, start
from deit_kd.engine import train
from deit_kd.jobs.bench import Clock, print_markdown
from deit_kd.kernels import preferred_attention
from deit_kd.machine import kind
from deit_kd.runs.attention import attention_kernel
from deit_kd.runs.lesson import build_distiller, connect
from deit_kd.runs.memory_format import lay_out_teachers
from deit_kd.runs.run import build_trainer
from deit_kd.teaching.ready import ready_lesson

CLASSES = 10


def main() -> None:
    parser = build_parser("step_times")
    parser.add_argument("--arms", type=str, default=None)
    parser.add_argument("--at", type=float, nargs="+", default=[0.25, 0.75])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=str, default=None)
    config, options = parse_config(sys.argv[1:], parser)
    arms = {"the recipe": config}
    if options["arms"] is not None:
        found = read_arms(Path(options["arms"]), None)
        arms = {name: parse_config([*sys.argv[1:], *overrides(arm, 0, None)], parser)[0] for name, arm in found.items()}
    processes = start(config.train.device)
    places = [f"{place:g} of the run" for place in options["at"]]
    steps = {
        (name, place): step
        for name, arm in arms.items()
        for place, step in zip(places, steps_of(arm, options["at"], options["steps"], processes), strict=True)
    }
    clock = Clock(processes.device)
    for step in steps.values():
        step()
    for turn in range(options["rounds"]):
        for point, step in list(steps.items())[:: 1 if turn % 2 == 0 else -1]:
            clock.take(" at ".join(point), options["steps"] * config.train.batch_size, step)
    rates = {point: clock.rates[" at ".join(point)] for point in steps}
    say(f"{kind(processes.device)}: images/s, median of {options['rounds']} rounds, and the time of a step")
    print_markdown(
        ["", *(column for place in places for column in (f"{place}, images/s", "time of a step, times the first"))],
        [
            [name, *itertools.chain.from_iterable(cells(rates, name, next(iter(arms)), place) for place in places)]
            for name in arms
        ],
    )
    if len(places) > 1:
        for name in arms:
            ratio = ratios(rates[name, places[0]], rates[name, places[-1]])
            say(f"{name}: a step at {places[0]} takes {ratio} times as long as at {places[-1]}")
    if options["json"] is not None:
        named = {f"{name} at {place}": values for (name, place), values in rates.items()}
        Path(options["json"]).write_text(json.dumps({"images/s": named}, indent=2) + "\n")


def steps_of(config: Config, at: list[float], count: int, processes: Processes) -> list[Callable[[], None]]:
    """Return `count` steps of a recipe at each of its places, to be done again and again."""
    run = prepare_bare(config, CLASSES, processes)
    lesson = ready_lesson(run, may_fit=False)
    run = connect(run, lesson)
    lay_out_teachers(run, lesson)
    trainer, attention = build_trainer(run, lesson), attention_kernel(run)
    batch = random_batch(config, CLASSES, processes.device)

    def do(first: int) -> None:
        # A lesson lets go of networks that are over, so each time begins with a copy of it.
        trainer.distiller = build_distiller(run, replace(lesson), first)
        with preferred_attention(attention):
            train(
                trainer,
                itertools.repeat(batch),
                first_step=first,
                total_steps=first + count,
                after_step=lambda step, result: result.terms.tolist(),
            )

    return [partial(do, min(int(place * run.loader.total_steps), run.loader.total_steps - count)) for place in at]


def cells(rates: dict[tuple[str, str], list[float]], name: str, base: str, place: str) -> list[str]:
    """Return an arm's images/s at a place, and how long its step takes over the base's."""
    own = rates[name, place]
    return [f"{statistics.median(own):.1f}", "1" if name == base else ratios(own, rates[base, place])]


def ratios(rates: list[float], others: list[float]) -> str:
    """Return how many times as long a step takes as another, with the spread over the rounds."""
    times = [other / own for own, other in zip(rates, others, strict=True)]
    return f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})"


if __name__ == "__main__":
    main()
