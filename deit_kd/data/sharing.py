"""Shared memory that workers reuse: the page faults of fresh memory cost more than filling it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from deit_kd.interfaces import Batch

PREFETCHED = 2  # batches that each worker makes ahead


class SharedBuffers:
    """A worker's few shared buffers, used in turn.

    A buffer is reused once its worker has made `PREFETCHED` more batches, which is never before the loader is asked for
    the next one: by then it has been used or copied.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor | None] = [None] * (PREFETCHED + 1)
        self._turn = 0

    def take(self, count: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return a tensor [count, *shape] with any content; only the first dimension may differ between calls."""
        if get_worker_info() is None:
            return torch.empty(count, *shape, dtype=dtype)
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn]
        if buffer is None or len(buffer) < count:
            buffer = torch.empty(count, *shape, dtype=dtype).share_memory_()
            self._buffers[self._turn] = buffer
        return buffer[:count]


class SharedStack:
    """Stacks views as ``torch.stack`` does; a worker stacks into shared buffers."""

    def __init__(self) -> None:
        self._buffers = SharedBuffers()

    def __call__(self, views: list[Tensor]) -> Tensor:
        """Return `views` [3, H, W], all of one size, as [B, 3, H, W]."""
        return torch.stack(views, out=self._buffers.take(len(views), *views[0].shape, dtype=views[0].dtype))


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
