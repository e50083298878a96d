"""A number that may change over a run: a pure function of how much of the run is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Schedule(NamedTuple):
    """``start`` before the place `begin`, ``end`` from the place `until` on, and a transition in between.

    Places are shares of the run, from 0 to 1. The value depends only on the place, so resuming, replaying a label store
    and the number of processes do not change it.

    Args:
        start: value before `begin`.
        end: value from `until` on.
        begin: place at which the change begins; ``constant`` has none.
        until: place at which the change ends.
        shape: ``constant`` keeps `start` until `until`; ``linear`` and ``cosine`` go from one to the other.
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0
    shape: str = "constant"

    def at(self, place: float) -> float:
        """Return the value when the share `place` of the run is done."""
        if place >= self.until:
            return self.end
        if place < self.begin or self.shape == "constant":
            return self.start
        way = (place - self.begin) / (self.until - self.begin)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.start + (self.end - self.start) * way

    def is_over(self, place: float) -> bool:
        """Return whether the value is 0 at `place` and stays 0 to the end of the run."""
        return self.end == 0 and place >= self.until

    def settled_after(self, steps: int) -> int | None:
        """Return after how many of so many steps it has its last value; None if it has one value."""
        about = math.ceil(self.until * steps)  # the product may be rounded
        counts = (count for count in (about - 1, about, about + 1) if count / steps >= self.until)
        return next(counts) if self.changes else None

    def is_always(self, value: float) -> bool:
        """Return whether it has this value all along."""
        return self.values == (value, value)

    @property
    def changes(self) -> bool:
        """Whether it has more than one value."""
        return self.start != self.end

    @property
    def values(self) -> tuple[float, float]:
        """The two extreme values."""
        return self.start, self.end


def always(value: float) -> Schedule:
    """Return the schedule of a constant."""
    return Schedule(value, value)


def silence(weights: Sequence[Schedule]) -> tuple[float, float] | None:
    """Return the first part of the run, from place to place, in which every weight is 0; None if there is none."""
    places = {0.0, 1.0}
    for weight in weights:
        if weight.changes:
            places |= {weight.until} if weight.shape == "constant" else {weight.begin, weight.until}
    # Only at these places does a weight begin or cease to be 0.
    parts = pairwise(sorted(places))
    return next((part for part in parts if not any(weight.at(sum(part) / 2) for weight in weights)), None)
