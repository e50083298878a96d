"""Whole loops: who teaches, times where photos are decoded and views are made, beside the step alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from deit_kd.jobs.bench import ALONE, ANSWER, ONLINE, STEP, STORED, Clock, open_parts
from on_gpu.profile import idle_share, profiled
from on_gpu.setup import Point, Setup
from on_gpu.timing import Row, rounded, spread

TEACHERS = {"none": ALONE, "online": ONLINE, "stored": STORED}
FLOORS = {ALONE: [STEP], ONLINE: [STEP, ANSWER], STORED: [STEP]}  # what each loop must do at least
TILED_BATCHES = 4  # an epoch of the tiled photos


class Supply(NamedTuple):
    """Where views come from."""

    executor: str  # of data.executor
    cache: str  # of data.cache
    rounds: int  # few where each drains what slow workers have made ahead


SUPPLIES = (
    Supply("device", "device", 5),
    Supply("pillow", "memory", 2),
    Supply("device", "memory", 3),
    Supply("pillow", "none", 1),
    Supply("device", "none", 1),
)


def points(setup: Setup) -> Iterator[Point]:
    """Yield each supply of views, with every teacher."""
    for supply in SUPPLIES:
        yield f"executor {supply.executor}, cache {supply.cache}", partial(_rows, setup, supply)


def _rows(setup: Setup, supply: Supply) -> list[Row]:
    scale, student, batch = setup.scale, next(iter(setup.scale.students)), setup.scale.batches[0]
    keys = {
        "data__executor": supply.executor,
        "data__cache": supply.cache,
        "train__compile": str(scale.compiled).lower(),
    }
    config, photos = setup.recipe(student, batch, **keys), TILED_BATCHES * batch
    rounds, steps, clock, profiles = min(supply.rounds, scale.rounds), scale.steps_a_timing, Clock(setup.device), {}
    with open_parts(config, setup.processes, setup.tiled(photos), rounds, steps, photos) as timed:
        timed.warm_up()
        for turn in range(rounds):
            for name in (*FLOORS, STEP, ANSWER)[:: 1 if turn % 2 == 0 else -1]:
                timed.settle(name)
                clock.take(name, timed.images, partial(timed.run, name))
                if turn == 0 and name in FLOORS:
                    profiles[name] = profiled(partial(timed.run, name), setup.device, steps)
    rows: list[Row] = []
    for teacher, name in TEACHERS.items():
        of_step, of_floor = (_median(clock.ratios([(name, floor)])) for floor in ([STEP], FLOORS[name]))
        seconds = batch / statistics.median(clock.rates[name])
        rows.append(
            {"teacher": teacher, "executor": supply.executor, "cache": supply.cache}
            | spread(clock.rates[name])
            | {"of the step": of_step, "of its floor": of_floor, "idle": idle_share(profiles[name], seconds)}
        )
    return rows


def _median(ratios: dict[str, list[float]]) -> float:
    (values,) = ratios.values()
    return rounded(statistics.median(values))
