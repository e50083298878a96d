"""What a run will ask a store for, read by threads before its steps do: no step waits for a disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from deit_kd.store.folder import Columns, LabelStore, epoch_part

BATCHES = 4  # that are read ahead: of a network's disk, too, a step may take several


class Checksums:
    """Compares each part of a store with its checksum once, before its answers are used.

    Args:
        store: holds them.
        is_mine: asked once for each part, whether this process is the one to compare it; by default all have been
            compared already.
        busy: announces work while this process waits for it.
    """

    def __init__(
        self,
        store: LabelStore,
        is_mine: Callable[[str], bool] = lambda part: False,
        busy: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._store, self._is_mine, self._busy = store, is_mine, busy
        self._begun: set[str] = set()
        self._waits: dict[str, Callable[[], None]] = {}

    def begin(self, part: str, thread: Executor | None = None) -> None:
        """Let `thread` compare a part; without one it is compared when it is expected."""
        if part in self._begun:
            return
        self._begun.add(part)
        if self._is_mine(part):
            compare = partial(self._store.verify, [part])
            self._waits[part] = compare if thread is None else thread.submit(compare).result

    def expect(self, part: str) -> None:
        """Wait until a part has been compared.

        Raises:
            InputError: it is damaged.
        """
        self.begin(part)
        if part in self._waits:
            with self._busy(f"compares the checksum of {part} of {self._store.folder}"):
                self._waits[part]()
            del self._waits[part]


class ReadAhead:
    """Reads the records of coming batches in one thread, and compares the next epoch with its checksum in another.

    Close it to end them, which takes as long as a comparison that has begun: about a second for each GB of an epoch.

    Args:
        store: to read.
        checksums: of its epochs.
        blocks: the views [B, 2] (epoch and position) of each batch, in the order in which they will be asked for.
        epochs: their epochs in order, repeated ones again.
        pinned: whether records are read into pinned memory, from which a GPU copies without waiting.
    """

    def __init__(
        self, store: LabelStore, checksums: Checksums, blocks: Iterable[Tensor], epochs: Iterable[int], pinned: bool
    ) -> None:
        self._store, self._checksums, self._pinned = store, checksums, pinned
        self._blocks: Iterator[Tensor] = iter(blocks)
        self._following = dict(pairwise(epochs))
        self._coming: deque[tuple[Tensor, Future[Columns]]] = deque()
        self._reader = ThreadPoolExecutor(1, "store-records")
        self._comparer = ThreadPoolExecutor(1, "store-checksums")

    def next(self, view_ids: Tensor) -> Columns | None:
        """Return the records of the next batch; None if it is not of the views [B, 2], since some are missing from it.

        Raises:
            InputError: see `LabelStore.find`.
        """
        while len(self._coming) <= BATCHES and (block := next(self._blocks, None)) is not None:
            self._coming.append((block, self._reader.submit(self._store.find, block, self._pinned)))
        if not self._coming:
            return None
        block, records = self._coming.popleft()
        if (following := self._following.get(int(block[0, 0]))) is not None:
            self._checksums.begin(epoch_part(following), self._comparer)
        return records.result() if torch.equal(block, view_ids) else None

    def close(self) -> None:
        """End the threads."""
        for thread in (self._reader, self._comparer):
            thread.shutdown(cancel_futures=thread is self._reader)
