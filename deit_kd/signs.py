"""What the processes of a run let one another know beside their work, in the store of their process group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line, which knows the signals, does not wait for torch
    from torch.distributed import Store

GONE = "another process of the run is gone; the last checkpoint is kept"


def no_progress(rank: int, seconds: float) -> str:
    """Say that a process makes the others wait."""
    return (
        f"process {rank} has made no progress for {seconds:g} s; all stop, the last checkpoint is kept; see what it "
        "was doing, or raise train.timeout_seconds"
    )


class Signs:
    """What one process says, and what the others have said.

    Args:
        store: of the process group.
        rank: of this process.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank

    def arrive(self, meeting: int) -> None:
        """Say that this process has come to a meeting; they are counted from 1."""
        self._say("met", str(meeting))

    def absent(self, meeting: int, others: Iterable[int]) -> set[int]:
        """Return which of the others have not come to a meeting."""
        return {other for other in others if int(self._read("met", other) or 0) < meeting}

    def work_on(self, work: str) -> None:
        """Say what takes this process long; nothing where it is not busy any more."""
        self._say("busy", work)

    def work_of(self, rank: int) -> str:
        """Return what a process is busy with."""
        return self._read("busy", rank)

    def beat(self, count: int) -> None:
        """Say how many signs of progress this process has given."""
        self._say("beats", str(count))

    def beats_of(self, rank: int) -> int:
        """Return how many signs of progress a process has given."""
        return int(self._read("beats", rank) or 0)

    def leave(self) -> None:
        """Say that this process needs the others no more."""
        self._say("left", "")

    def have_left(self, others: Iterable[int]) -> bool:
        """Return whether the others need this process no more."""
        return bool(self._store.check([f"left/{other}" for other in others]))

    def fail(self) -> None:
        """Say that this process ends by an error or a signal."""
        self._store.set("gone", "")

    def one_has_failed(self) -> bool:
        """Return whether any process has ended by an error or a signal."""
        return bool(self._store.check(["gone"]))

    def is_first(self, key: str) -> bool:
        """Return whether nobody has asked for `key` before."""
        return bool(self._store.add(f"first/{key}", 1) == 1)

    def _say(self, kind: str, text: str) -> None:
        self._store.set(f"{kind}/{self._rank}", text)

    def _read(self, kind: str, rank: int) -> str:
        key = f"{kind}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""
