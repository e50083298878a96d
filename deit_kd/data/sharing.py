"""Shared memory that workers reuse: the page faults of fresh memory cost more than filling it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from deit_kd.interfaces import Batch

PREFETCHED = 2  # batches that each worker makes ahead


class SharedStack:
    """Stacks views as ``torch.stack`` does; a worker stacks into its own few shared buffers in turn.

    A buffer is reused once its worker has made `PREFETCHED` more batches, which is never before the loader is asked for
    the next one: by then it has been used or copied.
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
    """Yield `batches` in memory that no worker will write to or, if `lent`, not until the next one is requested.

    Pinned batches are already copies. The workers' buffers stay mapped here, so they are not mapped again for every
    batch.
    """
    mapped: deque[Tensor] = deque(maxlen=workers * (PREFETCHED + 1))
    for batch in batches:
        if batch.images.is_shared():
            mapped.append(batch.images)
            yield batch if lent else batch._replace(images=batch.images.clone())
        else:
            yield batch
