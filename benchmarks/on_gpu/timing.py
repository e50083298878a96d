"""Things timed in turns after a warm-up, each for a while, and none beyond its time."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch

from deit_kd.jobs.bench import Clock

Row = dict[str, Any]  # of a table: the column's name and a text, a number, or None
SECONDS_BETWEEN_ALARMS = 10.0  # an alarm may ring where an exception is ignored
WARM_UPS = 3  # the first compiles, the second may compile again, and the third has all its memory


class OutOfTime(BaseException):
    """The time of a section is over; a BaseException, so that nothing between takes it for a failure."""


@contextmanager
def limited_to(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the main thread once `seconds` have passed, wherever the program is then."""
    if seconds <= 0:
        raise OutOfTime

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, SECONDS_BETWEEN_ALARMS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def one_line(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def take_turns(
    device: torch.device, acts: Mapping[str, Callable[[], object]], *, images: int, rounds: int, seconds: float
) -> tuple[Clock, dict[str, str]]:
    """Time `acts` in turns, every other round in reverse; return images/s and why the others could not be timed.

    Args:
        device: that computes.
        acts: what is timed, by name.
        images: that one call handles.
        rounds: how often each is timed.
        seconds: that each timing lasts at least.
    """
    clock, failed, calls = Clock(device), {}, {}
    for name, act in acts.items():
        try:
            repeated(act, WARM_UPS)
            trial = Clock(device)
            trial.take(name, 1, act)
            calls[name] = ceil(seconds * trial.rates[name][0]) or 1
        except Exception as error:  # one form of several that does not work is a finding
            failed[name] = one_line(error)
    for turn in range(rounds):
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            clock.take(name, images * calls[name], lambda name=name: repeated(acts[name], calls[name]))
    return clock, failed


def repeated(act: Callable[[], object], times: int) -> None:
    """Call `act` so many times."""
    for _ in range(times):
        act()


def spread(rates: Sequence[float]) -> Row:
    """Return the columns of images/s: median, lowest and highest."""
    picks = {"images/s": statistics.median, "lowest": min, "highest": max}
    return {name: rounded(pick(rates), 4) for name, pick in picks.items()}


def microseconds(rates: Sequence[float]) -> Row:
    """Return the columns of microseconds for each view: median, lowest and highest."""
    times = [1e6 / rate for rate in rates]
    picks = {"µs a view": statistics.median, "lowest": min, "highest": max}
    return {name: rounded(pick(times)) for name, pick in picks.items()}


def rounded(value: float, digits: int = 3) -> float:
    """Return `value` with so many significant digits."""
    return float(f"{value:.{digits}g}")
