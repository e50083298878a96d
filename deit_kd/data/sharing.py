"""Shared memory that workers reuse: the page faults of fresh memory cost more than filling it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from deit_kd.console import size_text
from deit_kd.interfaces import InputError

Item = TypeVar("Item")
Made = TypeVar("Made")

PREFETCHED = 2  # batches that each worker makes ahead, if there is memory for them
SHARED_MEMORY = Path("/dev/shm")  # where torch's workers put their batches, on Linux
MEGABYTE = 2**20


def batches_ahead(batch_bytes: int, workers: int, loaders: int, limit_mb: int | None) -> int:
    """Return how many batches each worker makes ahead; besides these it holds the one that it makes.

    Args:
        batch_bytes: of one batch.
        workers: of one loader, at least 1.
        loaders: that share the memory of this machine.
        limit_mb: what the batches of one loader may take, in units of 2**20 bytes; None is `PREFETCHED`, or less where
            shared memory is small.

    Raises:
        InputError: they do not fit.
    """
    least = 2 * workers * batch_bytes
    free = _free_shared_memory()
    if limit_mb is not None:
        if least > limit_mb * MEGABYTE:
            raise InputError(
                f"data.prefetch_mb: {limit_mb} MB do not hold two batches of {size_text(batch_bytes)} for each of "
                f"{workers} workers; set {-(-least // MEGABYTE)} or more, or fewer data.workers"
            )
        ahead = limit_mb * MEGABYTE // (workers * batch_bytes) - 1
    else:
        wanted = (PREFETCHED + 1) * workers * batch_bytes * loaders
        ahead = PREFETCHED if free is None or wanted <= free else 1
    held = (ahead + 1) * workers * batch_bytes * loaders
    if free is not None and held > free:
        what = f"data.prefetch_mb: {limit_mb} MB let" if limit_mb is not None else "data.workers:"
        raise InputError(
            f"{what} {workers * loaders} workers of this machine hold {size_text(held)} of batches, and "
            f"{size_text(free)} of shared memory are free ({SHARED_MEMORY}); use fewer workers or a smaller batch, or "
            "give a container more (docker run --shm-size)"
        )
    return ahead


def _free_shared_memory() -> int | None:
    """Return the bytes that are free where workers put batches; None if that is not known."""
    if not SHARED_MEMORY.is_dir():
        return None
    found = os.statvfs(SHARED_MEMORY)
    return found.f_bavail * found.f_frsize


class SharedBuffers:
    """A worker's few shared buffers, used in turn.

    A buffer is reused once its worker has made `ahead` more batches, which is never before the loader is asked for the
    next one: by then it has been used or copied.
    """

    def __init__(self, ahead: int = PREFETCHED) -> None:
        self._buffers: list[Tensor | None] = [None] * (ahead + 1)
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

    def stack(self, views: list[Tensor]) -> Tensor:
        """Return `views` [3, H, W], all of one size, as [B, 3, H, W], as ``torch.stack`` does."""
        return torch.stack(views, out=self.take(len(views), *views[0].shape, dtype=views[0].dtype))


def received(batches: Iterable[Item], buffers: int, pixels_of: Callable[[Item], Tensor]) -> Iterator[Item]:
    """Yield batches of workers in memory that is lent until the next one is requested.

    The workers' buffers stay mapped here, so they are not mapped again for every batch.

    Args:
        batches: from workers.
        buffers: how many all workers have.
        pixels_of: returns the tensor of a batch that is in a buffer.
    """
    mapped: deque[Tensor] = deque(maxlen=buffers)
    for batch in batches:
        mapped.append(pixels_of(batch))
        yield batch


def one_ahead(act: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """Yield what `act` makes of each item; while one is used, a thread makes the next.

    An item is only used until the next one is requested. Items are requested here, since torch reports the death of a
    worker to the main thread.
    """
    with ThreadPoolExecutor(1) as thread:
        ready: list[Made] = []
        for item in items:
            following = thread.submit(act, item)
            yield from ready
            ready = [following.result()]
        yield from ready
