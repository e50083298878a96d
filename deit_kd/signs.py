"""Signals between the processes of a run, in the store of their process group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line uses this module without waiting for torch
    from torch.distributed import Store

GONE = "another process of the run is gone; the last checkpoint is kept"


def no_progress(rank: int, seconds: float) -> str:
    """Return the message that a process makes the others wait."""
    return (
        f"process {rank} has made no progress for {seconds:g} s; all stop, the last checkpoint is kept; see what it "
        "was doing, or raise train.timeout_seconds"
    )


class Signs:
    """The signals of one process, and those of the others.

    Args:
        store: of the process group.
        rank: of this process.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank

    def arrive(self, meeting: int) -> None:
        """Announce that this process has arrived at a meeting; they are counted from 1."""
        self._say("met", str(meeting))

    def absent(self, meeting: int, others: Iterable[int]) -> set[int]:
        """Return which of the others have not arrived at a meeting."""
        return {other for other in others if int(self._read("met", other) or 0) < meeting}

    def work_on(self, work: str) -> None:
        """Announce the work that takes this process long; empty when it is no longer busy."""
        self._say("busy", work)

    def work_of(self, rank: int) -> str:
        """Return the work that a process is busy with."""
        return self._read("busy", rank)

    def beat(self, count: int) -> None:
        """Announce how many signs of progress this process has given."""
        self._say("beats", str(count))

    def beats_of(self, rank: int) -> int:
        """Return how many signs of progress a process has given."""
        return int(self._read("beats", rank) or 0)

    def leave(self) -> None:
        """Announce that this process no longer needs the others."""
        self._say("left", "")

    def have_left(self, others: Iterable[int]) -> bool:
        """Return whether the others no longer need this process."""
        return bool(self._store.check([f"left/{other}" for other in others]))

    def fail(self) -> None:
        """Announce that this process ends by an error or a signal."""
        self._store.set("gone", "")

    def one_has_failed(self) -> bool:
        """Return whether any process has ended by an error or a signal."""
        return bool(self._store.check(["gone"]))

    def is_first(self, key: str) -> bool:
        """Return whether this is the first call for `key` in any process."""
        return bool(self._store.add(f"first/{key}", 1) == 1)

    def _say(self, kind: str, text: str) -> None:
        self._store.set(f"{kind}/{self._rank}", text)

    def _read(self, kind: str, rank: int) -> str:
        key = f"{kind}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""
