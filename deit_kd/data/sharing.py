"""Shared memory that workers fill again and again: fresh memory costs more in page faults than filling it does."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from deit_kd.interfaces import Batch

PREFETCHED = 2  # batches that each worker makes ahead


class SharedStack:
    """Stacks views as ``torch.stack`` does; in a worker into its own few shared buffers, in turn.

    A buffer is filled again when its worker has made `PREFETCHED` more batches, not before the loader is asked for
    the next one: by then it is used up, or copied.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor | None] = [None] * (PREFETCHED + 1)
        self._turn = 0

    def __call__(self, views: list[Tensor]) -> Tensor:
        """Return `views` [3, H, W], all of one size, as [B, 3, H, W]."""
        if get_worker_info() is None:
            return torch.stack(views)
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn]
        if buffer is None or len(buffer) < len(views):
            buffer = torch.empty(len(views), *views[0].shape).share_memory_()
            self._buffers[self._turn] = buffer
        return torch.stack(views, out=buffer[: len(views)])


def received(batches: Iterable[Batch], workers: int, lent: bool = False) -> Iterator[Batch]:
    """Yield `batches` in memory that no worker will write to or, if `lent`, not before the next one is asked for.

    What was pinned for a GPU is already a copy. The workers' buffers stay mapped here, which would otherwise be done
    again for every batch.
    """
    mapped: deque[Tensor] = deque(maxlen=workers * (PREFETCHED + 1))
    for batch in batches:
        if batch.images.is_shared():
            mapped.append(batch.images)
            yield batch if lent else batch._replace(images=batch.images.clone())
        else:
            yield batch
