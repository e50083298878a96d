"""The step of each student alone, by batch, as it is and compiled, beside the least that its operations can take."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch
from bare_step import BareStep

from on_gpu.floor import Floor
from on_gpu.profile import idle_share, profiled
from on_gpu.setup import CLASSES, Point, Scale, Setup
from on_gpu.timing import Row, rounded, spread, take_turns

MODES = {"eager": "false", "compiled": "true"}  # of train.compile; others go by their own names
CUDA_GRAPHS, SEARCHED = "reduce-overhead", "max-autotune-no-cudagraphs"  # the last searches for minutes
PROFILED_STEPS = 3


def points(setup: Setup) -> Iterator[Point]:
    """Yield what is measured together: a student, a batch, and modes; the most wanted first."""
    for student, batch, modes in _wanted(setup.scale):
        yield f"{student}, batch {batch}, {' and '.join(modes)}", partial(_rows, setup, student, batch, modes)


def _wanted(scale: Scale) -> list[tuple[str, int, list[str]]]:
    first, *others = scale.batches
    eager = [(student, batch, ["eager"]) for batch in others for student in scale.students]
    if not scale.compiled:
        return [*((student, first, ["eager"]) for student in scale.students), *eager]
    compiled = [(student, first, list(MODES)) for student in scale.students]
    of_goals, larger = compiled[:2], compiled[2:]
    further = [(student, first, [mode]) for mode in (CUDA_GRAPHS, SEARCHED) for student in scale.students]
    others_compiled = [(student, batch, ["compiled"]) for batch in others for student in scale.students]
    return [*of_goals, *eager, *larger, *further[:2], *others_compiled, *further[2:]]


def _rows(setup: Setup, student: str, batch: int, modes: list[str]) -> list[Row]:
    scale, device = setup.scale, setup.device
    steps = {mode: _step(setup, student, batch, mode) for mode in modes}
    clock, failed = take_turns(device, steps, images=batch, rounds=scale.rounds, seconds=scale.seconds)
    floor = _floor(setup, steps.get("eager") or _step(setup, student, batch, "eager"))
    rows = []
    for mode, step in steps.items():
        row: Row = {"student": student, "batch": batch, "mode": mode}
        if mode in failed:
            rows.append(row | {"failed": failed[mode]})
            continue
        seconds = batch / statistics.median(clock.rates[mode])
        row |= spread(clock.rates[mode]) | {"ms a step": rounded(1e3 * seconds)}
        if floor is not None:
            row |= {
                "floor, ms": rounded(1e3 * floor.seconds),
                "floor / step": rounded(floor.seconds / seconds),
                "floor of single kernels, ms": rounded(1e3 * floor.unfused_seconds),
            }
        if mode in clock.peaks:
            row["peak, GB"] = rounded(clock.peaks[mode] / 1e9)
        profile = profiled(partial(step, PROFILED_STEPS), device, PROFILED_STEPS)
        row |= {"launches": profile.launches, "idle": idle_share(profile, seconds), "slowest kernels": profile.slowest}
        rows.append(row)
    return rows


def _step(setup: Setup, student: str, batch: int, mode: str) -> BareStep:
    return BareStep(setup.recipe(student, batch, train__compile=MODES.get(mode, mode)), CLASSES, setup.processes)


def _floor(setup: Setup, step: BareStep) -> Floor | None:
    try:
        with Floor(setup.card) as floor:
            step()
    except torch.OutOfMemoryError:
        return None
    return floor
