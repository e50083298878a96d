"""Signals between the processes of a run, in the store of their process group.

What a process asks the store for does not depend on how many others there are, except where one looks for all.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the command line uses this module without waiting for torch
    from torch.distributed import Store

GONE = "another process of the run is gone; the last checkpoint is kept"
SECONDS_OF_SILENCE = 10.0  # of the one that looks for all, before another takes its place


def no_progress(rank: int, seconds: float) -> str:
    """Return the message that a process makes the others wait."""
    return (
        f"process {rank} has made no progress for {seconds:g} s; all stop, the last checkpoint is kept; see what it "
        "was doing, or raise train.timeout_seconds"
    )


class Said(NamedTuple):
    """What all processes have announced, by rank."""

    meetings: list[int]  # the last one that each has arrived at
    works: list[str]  # what each is busy with
    beats: list[int]  # signs of progress that each has given


class Signs:
    """The signals of one process, and those of the others.

    Args:
        store: of the process group.
        rank: of this process.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank

    def begin(self) -> None:
        """Announce that this process has done nothing yet; the others cannot read its signs before."""
        for kind, text in (("met", "0"), ("busy", ""), ("beats", "0")):
            self._say(kind, text)

    def arrive(self, meeting: int) -> None:
        """Announce that this process has arrived at a meeting; they are counted from 1."""
        self._say("met", str(meeting))
        self._store.add("arrivals", 1)

    def all_have_arrived(self, meeting: int, count: int) -> bool:
        """Return whether all `count` processes have arrived at a meeting; none comes to the next one before."""
        return bool(self._store.add("arrivals", 0) >= meeting * count)

    def work_on(self, work: str) -> None:
        """Announce the work that takes this process long; empty when it is no longer busy."""
        self._say("busy", work)

    def work(self) -> str:
        """Return the work that this process is busy with."""
        return self._store.get(f"busy/{self._rank}").decode()

    def beat(self, count: int) -> None:
        """Announce how many signs of progress this process has given."""
        self._say("beats", str(count))

    def of_all(self, count: int) -> Said | None:
        """Return what all `count` processes have announced; None before all have begun."""
        keys = [f"{kind}/{rank}" for kind in ("met", "busy", "beats") for rank in range(count)]
        if not self._store.check(keys):
            return None
        found = [value.decode() for value in self._store.multi_get(keys)]
        meetings, works, beats = found[:count], found[count : 2 * count], found[2 * count :]
        return Said([*map(int, meetings)], works, [*map(int, beats)])

    def lookout(self, name: str) -> Lookout:
        """Return the lookout of this process for what is called `name`."""
        return Lookout(self._store, name)

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


class Lookout:
    """Lets one process look at all the others and tell what it has seen; if it falls silent, another takes its place.

    Args:
        store: of the process group.
        name: of what is looked for; the same in every process.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._term: int | None = None  # of this process, if it looks for all
        self._tried = -1  # the last term that it asked for
        self._seen, self._since = "", time.monotonic()
        self._looks = 0
        self.late: int | None = None  # the process that makes the others wait, once that is known

    def is_mine(self) -> bool:
        """Return whether this process is to look now; ask again and again."""
        said = self._store.get(self._name).decode() if self._seen or self._store.check([self._name]) else ""
        term, _, rest = said.partition(":")
        if self._term is not None and int(term or -1) <= self._term:
            self._looks += 1
            self._tell()
            return True
        self._term = None  # it was silent for too long
        now = time.monotonic()
        if said != self._seen:
            self._seen, self._since = said, now
            self.late = int(late) if (late := rest.partition(":")[2]) else None
            return False
        if (said or self._tried >= 0) and now - self._since < SECONDS_OF_SILENCE:
            return False
        self._tried, self._since = max(self._tried, int(term or -1)) + 1, now
        if self._store.add(f"{self._name}/{self._tried}", 1) > 1:
            return False
        self._term = self._tried
        self._tell()
        return True

    def tell(self, late: int) -> None:
        """Tell all that a process makes the others wait."""
        self.late = late
        self._tell()

    def _tell(self) -> None:
        self._seen = f"{self._term}:{self._looks}:{'' if self.late is None else self.late}"
        self._store.set(self._name, self._seen)
