"""Signals that end the program: each is raised at once, and again if what ran at that moment dropped the exception.

An exception from a signal handler is lost where nobody can hand it on: in a ``__del__``, in a callback from C, in an
import that tries alternatives. The program would go on to its end and say that all was well.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from deit_kd.interfaces import Stopped

# A shell's exit codes for a process ended by the signal. SIGUSR1, which SLURM sends before the time limit, has
# sysexits' EX_TEMPFAIL: the job is fine, start it again.
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}

Handler = Callable[[int, FrameType | None], None]

_pending: int | None = None  # the last signal that `_stop_at_once` raised; the program has not ended because of it yet


def stopped_by(number: int, what_is_kept: str = "what was finished is kept") -> Stopped:
    """Return the exception for a signal."""
    name = signal.Signals(number).name
    return Stopped(f"stopped by {name}; {what_is_kept}", EXIT_CODES[signal.Signals(number)])


@contextmanager
def handlers(handler: Handler) -> Iterator[None]:
    """Install `handler` for the signals within the context; outside the main thread this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Raise `Stopped` when a signal comes within the context, and at its end if it was dropped in between.

    A program that is already ending because of a signal continues to do so, whatever torchrun or SLURM send next; a
    second SIGINT is the user's.
    """
    global _pending
    _pending = None
    with handlers(_stop_at_once):
        try:
            yield
        finally:
            number, _pending = _pending, None
            if number is not None and not isinstance(sys.exc_info()[1], Stopped):
                raise stopped_by(number)


def raise_pending() -> None:
    """Raise `Stopped` if a signal was dropped: called where long work begins or continues."""
    if _pending is not None and not _is_ending():
        raise stopped_by(_pending)


def leave_signals_alone() -> None:
    """Let no signal but SIGINT change how this program ends."""
    for number in EXIT_CODES:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    global _pending
    if number != signal.SIGINT and _is_ending():
        return
    _pending = number
    raise stopped_by(number)


def _is_ending() -> bool:
    """Return whether this code runs because `Stopped` ends the program, perhaps while another error is handled."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None
