"""What the tables say: which goals are reached, and which three things lose most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from on_gpu.teachers import OURS
from on_gpu.timing import Row
from on_gpu.views import BARE, BEYOND, TIME

Tables = Mapping[str, list[Row]]  # the rows of each section that were measured
IMAGES_A_SECOND = {"DeiT-Ti": 20_000, "DeiT-S": 8_000}  # of the step alone
GOAL_VIEW = "RandAugment"
LOOP_SHARE, MICROSECONDS_A_VIEW, IDLE = 0.9, 5.0, 0.05


def goals(tables: Tables) -> list[Row]:
    """Return each goal for an H200, what was measured, and whether it is reached; None if it was not measured."""
    rows = []
    for student, wanted in IMAGES_A_SECOND.items():
        step = _fastest_step(tables, student)
        rows.append(_at_least(f"step of {student}, images/s", wanted, step and step["images/s"]))
    loop, view = _goal_loop(tables), _view(tables)
    what = "loop from a device cache with stored labels"
    rows.append(_at_least(f"{what}, of the step", LOOP_SHARE, loop and loop["of the step"]))
    rows.append(_at_most("view of the executor, µs", MICROSECONDS_A_VIEW, view and view[TIME]))
    rows.append(_at_most(f"{what}, share of time the GPU is idle", IDLE, loop and loop["idle"]))
    return rows


class Loss(NamedTuple):
    """Something that takes longer than it must."""

    what: str
    share: float  # of its time that could be saved
    cure: str

    def __str__(self) -> str:
        return f"{self.what}: up to {self.share:.0%} of its time could be saved; {self.cure}"


def slowest(tables: Tables, count: int = 3) -> list[Loss]:
    """Return what loses the largest shares of its time, the worst of each kind, and what would mend it."""
    kinds = [list(find(tables)) for find in (_steps, _loops, _views, _teachers, _attention)]
    worst = [max(losses, key=lambda loss: loss.share) for losses in kinds if losses]
    return sorted((loss for loss in worst if loss.share > 0), key=lambda loss: -loss.share)[:count]


def _steps(tables: Tables) -> Iterator[Loss]:
    for student in {row["student"]: None for row in tables.get("steps", [])}:
        step = _fastest_step(tables, student)
        if step is None or step.get("floor / step") is None:
            continue
        kernels = "; ".join(f"{kernel['kernel']} ({kernel['share']:.0%})" for kernel in step["slowest kernels"][:3])
        cure = f"fuse or replace its slowest kernels: {kernels}"
        if (step["idle"] or 0) > IDLE:
            cure += f"; the GPU is idle for {step['idle']:.0%} of it: try train.compile reduce-overhead"
        yield Loss(f"step of {student}, {step['mode']}, batch {step['batch']}", 1 - step["floor / step"], cure)


def _loops(tables: Tables) -> Iterator[Loss]:
    loops = tables.get("loops", [])
    for teacher in {row["teacher"]: None for row in loops}:
        best = max((row for row in loops if row["teacher"] == teacher), key=lambda row: row["images/s"])
        name = f"loop, teacher {teacher}, executor {best['executor']}, cache {best['cache']}"
        if (best["executor"], best["cache"]) != ("device", "device"):
            cure = "make views on the device, from photos that are there: data.executor device, data.cache device"
        else:
            cure = "find in a profile what the host does between two steps (loader, meters, store), and do it ahead"
        yield Loss(name, 1 - best["of its floor"], cure)


def _views(tables: Tables) -> Iterator[Loss]:
    view = _view(tables)
    if view is None:
        return
    rows = [row for row in tables["views"] if row["made by"] == view["made by"]]
    costs = {row["what"]: row.get(BEYOND, row[TIME] if row["what"] == BARE else 0) for row in rows}
    worst = sorted(costs, key=lambda what: -costs[what])[:3]
    cure = "its primitives need faster kernels: " + ", ".join(f"{what} ({costs[what]:g} µs)" for what in worst)
    yield Loss("view of the executor", 1 - MICROSECONDS_A_VIEW / view[TIME], cure)


def _teachers(tables: Tables) -> Iterator[Loss]:
    teachers = tables.get("teachers", [])
    for name in {row["teacher"]: None for row in teachers}:
        forms = [row for row in teachers if row["teacher"] == name]
        best = max(forms, key=lambda row: row["images/s"])
        for ours in (row for row in forms if row["form"] == str(OURS)):
            cure = f"hold it as {best['form']}"
            yield Loss(f"{name} as a teacher, {ours['form']}", 1 - ours["images/s"] / best["images/s"], cure)


def _attention(tables: Tables) -> Iterator[Loss]:
    rows = tables.get("attention", [])
    for chosen in (row for row in rows if row["chosen"]):
        best = min((row for row in rows if row["tokens"] == chosen["tokens"]), key=lambda row: row["µs an image"])
        share = 1 - best["µs an image"] / chosen["µs an image"]
        cure = f"find out why {best['backend']}, which is faster, has larger errors"
        yield Loss(f"{chosen['backend']} attention, {chosen['tokens']} tokens", share, cure)


def _fastest_step(tables: Tables, student: str) -> Row | None:
    steps = [row for row in tables.get("steps", []) if row["student"] == student]
    return max(steps, key=lambda row: row["images/s"], default=None)


def _goal_loop(tables: Tables) -> Row | None:
    wanted = {"teacher": "stored", "executor": "device", "cache": "device"}
    return next((row for row in tables.get("loops", []) if wanted.items() <= row.items()), None)


def _view(tables: Tables) -> Row | None:
    return next((row for row in tables.get("views", []) if row["what"] == GOAL_VIEW), None)  # by Triton, if it can


def _at_least(goal: str, wanted: float, measured: float | None) -> Row:
    return _goal(goal, f"at least {wanted:,}", measured, measured is not None and measured >= wanted)


def _at_most(goal: str, wanted: float, measured: float | None) -> Row:
    return _goal(goal, f"at most {wanted:,}", measured, measured is not None and measured <= wanted)


def _goal(goal: str, wanted: str, measured: float | None, reached: bool) -> Row:
    return {
        "goal": goal,
        "wanted": wanted,
        "measured": measured,
        "reached": "not measured" if measured is None else "yes" if reached else "no",
    }
