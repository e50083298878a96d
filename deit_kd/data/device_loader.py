"""Batches whose views are made where the student trains: the host draws rows and hands over photos, as uint8."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deit_kd.data.cache import CHANNELS, Decoded
from deit_kd.data.decode import UnreadableImage
from deit_kd.data.loader import TrainingLoader, in_workers
from deit_kd.data.mixing import smoothed_targets
from deit_kd.data.order import TrainingBatchSampler, ViewKey
from deit_kd.data.photos import Photos
from deit_kd.data.sharing import PREFETCHED, SharedBuffers, one_ahead, received
from deit_kd.interfaces import Batch, Missing
from deit_kd.views import Drawing, Executor, PhotoBuffer, Rows, draw

GATHERING_THREADS = 4  # cut photos out of a cache in main memory

_AT_ORIGIN = np.array([0, 0, 1, 1], np.int32)

Item = TypeVar("Item")
Made = TypeVar("Made")


class Drawn(NamedTuple):
    """One batch before its views are made, in host memory; B counts the photos that can be read."""

    photos: np.ndarray  # [B], each an index in its split
    labels: np.ndarray  # [B]
    rows: Rows  # [B]
    missing: Sequence[Missing]


class Cut(NamedTuple):
    """A batch whose photos are cut to what their views show; the rows' crops are all of that."""

    drawn: Drawn
    pixels: Tensor  # [bytes], one photo after the other


@dataclass(frozen=True)
class Draws:
    """Draws the rows of a batch, and cuts out what its views show.

    Args:
        photos: of the training split.
        drawing: how views are made.
        seed: of the run.
        skip: whether a photo that cannot be read is left out; otherwise it ends the run.
    """

    photos: Photos
    drawing: Drawing
    seed: int
    skip: bool = False

    def cut(self, keys: list[ViewKey], new: Callable[[int], Tensor], each: Callable = map) -> Cut:
        """Return a batch whose photos are read and cut.

        Args:
            keys: of its views.
            new: returns uint8 memory [bytes] for so many bytes.
            each: ``each(act, items)`` acts on all items, perhaps in threads.

        Raises:
            UnreadableImage: a photo cannot be read, and `skip` is off.
        """
        arrays, unreadable = [], {}
        for row, key in enumerate(keys):
            try:
                arrays.append(self.photos.array(key.photo))
            except UnreadableImage as error:
                if not self.skip:
                    raise
                unreadable[row] = str(error)
        drawn = self._drawn(keys, np.array([array.shape[:2] for array in arrays]).reshape(-1, 2), unreadable)
        crop = drawn.rows.crop.astype(np.int64)
        ends = np.cumsum(crop[:, 2] * crop[:, 3] * CHANNELS)
        pixels = new(int(ends[-1]) if len(ends) else 0)
        memory = pixels.numpy()

        def copy(view: int) -> None:
            top, left, height, width = crop[view]
            part = arrays[view][top : top + height, left : left + width]
            memory[ends[view] - part.size : ends[view]].reshape(part.shape)[:] = part

        deque(each(copy, range(len(arrays))), maxlen=0)
        return Cut(drawn._replace(rows=replace(drawn.rows, crop=drawn.rows.crop * _AT_ORIGIN)), pixels)

    def in_place(self, keys: list[ViewKey], decoded: Decoded) -> Drawn:
        """Return a batch of photos that stay where they are."""
        known = ((row, decoded.unreadable[key.photo]) for row, key in enumerate(keys))
        unreadable = {row: reason for row, reason in known if reason is not None}
        photos = [key.photo for row, key in enumerate(keys) if row not in unreadable]
        return self._drawn(keys, np.stack((decoded.heights[photos], decoded.widths[photos]), 1), unreadable)

    def _drawn(self, keys: list[ViewKey], sizes: np.ndarray, unreadable: dict[int, str]) -> Drawn:
        """Return the batch without the rows that are `unreadable`; `sizes` [B, 2] are those of the others."""
        kept = np.delete(np.array(keys), list(unreadable), axis=0)
        rows = draw(self.drawing, self.seed, np.ascontiguousarray(kept[:, :2]), sizes)
        missing = [
            Missing(row, keys[row].photo, keys[row].epoch, keys[row].position, reason)
            for row, reason in unreadable.items()
        ]
        return Drawn(kept[:, 2], self.photos.labels[kept[:, 2]], rows, missing)


@dataclass(frozen=True)
class _Cuts(Dataset[Cut]):
    """Batches of photos, cut by a worker into memory that it shares."""

    draws: Draws
    buffers: SharedBuffers

    def __getitems__(self, keys: list[ViewKey]) -> Cut:
        return self.draws.cut(keys, lambda count: self.buffers.take(count, dtype=torch.uint8))


class DeviceLoader(TrainingLoader):
    """The device that trains makes the views.

    Photos in its own memory stay where they are. What is in main memory, or decoded by workers, is cut to what its view
    shows and copied to a GPU one batch ahead.

    Args:
        draws: of the run's photos.
        executor: makes views on `device`.
        batch_sampler: deals the views.
        label_smoothing: mass spread evenly over all classes.
        workers: decode photos that have no cache.
        device: that trains.
        ahead: batches that each worker makes ahead.
    """

    def __init__(
        self,
        draws: Draws,
        executor: Executor,
        batch_sampler: TrainingBatchSampler,
        *,
        label_smoothing: float,
        workers: int,
        device: torch.device,
        ahead: int = PREFETCHED,
    ) -> None:
        super().__init__(batch_sampler)
        self._ahead = ahead
        self._draws, self._executor, self._workers, self._device = draws, executor, workers, device
        self._classes, self._label_smoothing = len(draws.photos.classes), label_smoothing

    def _load(self, blocks: Iterable[list[ViewKey]], lent: bool = False) -> Iterator[Batch]:
        decoded = self._draws.photos.decoded
        if decoded is not None and decoded.pixels.device.type == self._device.type:
            place = _edges(decoded.offsets, decoded.heights, decoded.widths)
            cache = _buffer(decoded.pixels, place.to(self._device))
            for block in blocks:
                drawn = self._draws.in_place(block, decoded)
                yield self._batch(drawn, cache, drawn.photos)
            return
        for drawn, photos in self._uploaded(blocks, decoded is not None):
            yield self._batch(drawn, photos, np.arange(len(drawn.photos)))

    def _uploaded(self, blocks: Iterable[list[ViewKey]], are_in_memory: bool) -> Iterator[tuple[Drawn, PhotoBuffer]]:
        """Yield batches whose photos are cut, with these where views are made."""
        if self._device.type == "cpu":
            yield from map(_whole, self._by_workers(blocks))
        elif not are_in_memory:
            yield from _on_gpu(self._by_workers(blocks), lambda cut: cut, self._device)
        else:
            with ThreadPoolExecutor(GATHERING_THREADS) as pool:
                yield from _on_gpu(blocks, lambda block: self._draws.cut(block, _pinned, pool.map), self._device)

    def _by_workers(self, blocks: Iterable[list[ViewKey]]) -> Iterator[Cut]:
        """Yield batches of decoded photos, in memory that is only lent until the next one is requested."""
        has_gpu, buffers = self._device.type == "cuda", self._workers * (self._ahead + 1)
        dataset = _Cuts(self._draws, SharedBuffers(self._ahead))
        cuts = in_workers(dataset, blocks, _as_it_is, workers=self._workers, ahead=self._ahead, has_gpu=has_gpu)
        return received(cuts, buffers, lambda cut: cut.pixels)

    def _batch(self, drawn: Drawn, photos: PhotoBuffer, which: np.ndarray) -> Batch:
        labels = torch.from_numpy(drawn.labels)
        if self._device.type != "cpu":
            labels = labels.pin_memory().to(self._device, non_blocking=True)
        targets = smoothed_targets(labels, self._classes, self._label_smoothing)
        images = self._executor(photos, which, drawn.rows)
        if self._draws.drawing.mixes:
            images, targets = self._executor.mix(images, targets, drawn.rows)
        return Batch(images, targets, labels, torch.from_numpy(drawn.rows.view_ids), drawn.missing)


def _as_it_is(cut: Cut) -> Cut:
    return cut


def _edges(offsets: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack((offsets, heights, widths)))


def _edges_of(rows: Rows) -> Tensor:
    """Return offset, height and width [3, B] of photos that are cut to the crops of `rows`."""
    heights, widths = rows.crop[:, 2:].astype(np.int64).T
    lengths = heights * widths * CHANNELS
    return _edges(np.cumsum(lengths) - lengths, heights, widths)


def _buffer(pixels: Tensor, edges: Tensor) -> PhotoBuffer:
    offsets, heights, widths = edges
    return PhotoBuffer(pixels, offsets, heights.int(), widths.int())


def _whole(cut: Cut) -> tuple[Drawn, PhotoBuffer]:
    return cut.drawn, _buffer(cut.pixels, _edges_of(cut.drawn.rows))


def _pinned(count: int) -> Tensor:
    """Return host memory for a copy to a GPU; torch uses it again once that copy has ended."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)


def _on_gpu(
    items: Iterable[Item], cut: Callable[[Item], Cut], device: torch.device
) -> Iterator[tuple[Drawn, PhotoBuffer]]:
    """Yield the batches that `cut` makes of `items`, with their photos on `device`, copied on a stream of their own."""
    stream = torch.cuda.Stream(device)

    def send(item: Item) -> tuple[Drawn, Tensor, Tensor, torch.Event]:
        drawn, pixels = cut(item)
        held = pixels if pixels.is_pinned() else _pinned(len(pixels)).copy_(pixels)
        with torch.cuda.device(device), torch.cuda.stream(stream):  # or leaving the stream would wake GPU 0
            there = held.to(device, non_blocking=True)
            edges = _edges_of(drawn.rows).pin_memory().to(device, non_blocking=True)
            return drawn, there, edges, stream.record_event()

    for drawn, pixels, edges, event in one_ahead(send, items):
        here = torch.cuda.current_stream(device)
        here.wait_event(event)
        pixels.record_stream(here)
        edges.record_stream(here)
        yield drawn, _buffer(pixels, edges)
