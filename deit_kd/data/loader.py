"""Loaders: workers that make views, in the order of the batch sampler."""

from __future__ import annotations

import atexit
import gc
import multiprocessing.util
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import resource_tracker
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deit_kd.data.decode import UnreadableImage
from deit_kd.data.mixing import Example, Mixing, missing_of
from deit_kd.data.order import TrainingBatchSampler, ViewKey
from deit_kd.data.photos import Photos
from deit_kd.data.sharing import PREFETCHED, SharedBuffers, one_ahead, received
from deit_kd.interfaces import Batch, InputError
from deit_kd.interrupts import EXIT_CODES
from deit_kd.randomness import seed_view
from deit_kd.views.transforms import Transform

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Sight:
    """Photos and how they become views.

    Args:
        photos: of one split.
        transform: makes a view of an image.
        skip: whether a photo that cannot be read is left out; otherwise it ends the run.
    """

    photos: Photos
    transform: Transform
    skip: bool = False

    def view(self, index: int, name: str) -> tuple[Tensor, str | None]:
        """Return the view [3, H, W] of a photo, or a blank one and why the photo cannot be read.

        Raises:
            UnreadableImage: the photo cannot be read, and `skip` is off.
            RuntimeError: the transform fails; `skip` does not apply, since it would fail on a good photo, too.
        """
        try:
            image = self.photos.image(index)
        except UnreadableImage as error:
            if not self.skip:
                raise
            return torch.zeros_like(self.transform(Image.new("RGB", (32, 32)))), str(error)
        try:
            return self.transform(image), None
        except Exception as error:
            raise RuntimeError(f"{self.photos.where(index)}: its view {name} cannot be made") from error


SECONDS_FOR_A_BATCH = 600.0  # after that its worker is hanging, e.g. for lack of shared memory
SECONDS_TO_LEARN_OF_A_DEATH = 10.0  # a busy machine reports it late; the report ends the wait
SECONDS_TO_END = 0.4


class Views(Dataset[Example]):
    """Augmented views of a split, by their keys; the same key always gives the same view."""

    def __init__(self, photos: Photos, transform: Transform, seed: int, skip: bool = False) -> None:
        self._sight, self._seed = Sight(photos, transform, skip), seed

    def __getitem__(self, key: ViewKey) -> Example:
        seed_view(self._seed, key.epoch, key.position)
        view, unreadable = self._sight.view(key.photo, f"(epoch {key.epoch}, position {key.position})")
        label = int(self._sight.photos.labels[key.photo])
        return Example(view, label, key.epoch, key.position, key.photo, unreadable)


@dataclass(frozen=True)
class _Plainly(Generic[Loaded]):
    """Batches of a loader, with errors that a user can read.

    A worker's InputError comes without the traceback that torch puts before it, and a worker's death as torch reports
    it (`lost_worker`), not as the broken connection that follows.
    """

    batches: DataLoader[Any]

    def __iter__(self) -> Iterator[Loaded]:
        if self.batches.num_workers:
            _keep_pages_shared()
        try:
            with _out_of_earshot():
                batches = iter(self.batches)
            yield from batches
        except InputError as error:
            raise InputError(str(error).strip().rpartition(f"{type(error).__name__}: ")[2]) from error
        except (OSError, EOFError):
            # A dying process closes its connections first. The system reports its death a moment later, and torch turns
            # that into an error wherever the program is then.
            time.sleep(SECONDS_TO_LEARN_OF_A_DEATH)
            raise


@cache
def _keep_pages_shared() -> None:
    """Let the garbage collector leave alone what there is now.

    It writes to every object that it looks at, which would give each worker its own copy of all pages of the libraries.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries complain of what was not collected at the end


def lost_worker(error: RuntimeError) -> InputError | None:
    """Return the InputError for the death of a loader's worker; None if `error` is something else.

    torch raises it wherever the program is when the system reports the death, not only while waiting for a batch.
    """
    said = " ".join(str(error).split())
    if not said.startswith(("DataLoader worker", "DataLoader timed out")):
        return None
    return InputError(
        f"data.workers: {said.rstrip('. ')}; if memory ran out, use fewer, then continue with --resume auto; what was "
        "saved is kept"
    )


def _end_workers() -> None:
    """End the workers of loaders that an error keeps alive, before multiprocessing waits for them forever.

    It would send them SIGTERM, which they ignore.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as a failure
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second interrupt would end this function and leave the wait
    children = [child for child in multiprocessing.active_children() if child.daemon]
    for child in children:
        child.terminate()
    for child in children:
        child.join(SECONDS_TO_END / len(children))
        child.kill()


atexit.register(_end_workers)  # registered after multiprocessing's own, so it runs before it


@contextmanager
def _out_of_earshot() -> Iterator[None]:
    """Start processes that hear no signals, even before `_serve`: one that is not forked imports for seconds first."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
    try:
        if multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()  # the first worker would start it, which lets signals in again
            signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(worker: int) -> None:
    """Leave signals to the process that trains: a terminal and SLURM send them to workers, too."""
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)


def _serve_and_stand_back(worker: int) -> None:
    """Also give the step's threads priority: one that waits for a core holds up all the others."""
    _serve(worker)
    os.nice(19)


def in_workers(
    dataset: Dataset, blocks: Iterable[list[ViewKey]], collate: Any, *, workers: int, ahead: int, has_gpu: bool
) -> Iterable[Any]:
    """Return what `collate` makes of each block of views, in order, from worker processes if there are any.

    Each worker makes `ahead` batches ahead.
    """
    return _Plainly(
        DataLoader(
            dataset,
            batch_sampler=blocks,
            collate_fn=collate,
            num_workers=workers,
            timeout=SECONDS_FOR_A_BATCH if workers else 0,
            prefetch_factor=ahead if workers else None,
            worker_init_fn=_serve if has_gpu else _serve_and_stand_back,  # without one, the step needs the same cores
        )
    )


class TrainingLoader(ABC):
    """All batches of a run in order; iterate from any step."""

    def __init__(self, batch_sampler: TrainingBatchSampler) -> None:
        self._batch_sampler = batch_sampler
        self.steps_per_epoch = batch_sampler.steps_per_epoch
        self.total_steps = batch_sampler.total_steps
        self.views_per_epoch = batch_sampler.views_per_epoch

    def cycle_views(self, view_epochs: int) -> None:
        """Repeat the views of `view_epochs` epochs, however many epochs the run has."""
        self._batch_sampler.view_epochs = view_epochs

    def order_as(self, version: int) -> None:
        """Use the order of an earlier version of views, see `epoch_order`."""
        self._batch_sampler.version = version

    def batches(self, first_step: int, lent: bool = False) -> Iterable[Batch]:
        """Return this process's micro-batches from `first_step` to the end of the run.

        With `lent`, which saves a copy, a batch's images may be overwritten once the next batch is requested.
        """
        self._batch_sampler.first_step = first_step
        return self._load(self._batch_sampler, lent)

    def view_ids(self, first_step: int) -> Iterator[Tensor]:
        """Yield epoch and position [B, 2] of the views of each micro-batch of `batches`, without making any."""
        return map(torch.from_numpy, self._batch_sampler.view_ids(first_step))

    def view_epochs(self, first_step: int) -> list[int]:
        """Return the epoch of views that each epoch of the run shows, from that of `first_step` on."""
        return self._batch_sampler.epochs_from(first_step)

    def views_of_step(self, step: int) -> list[ViewKey]:
        """Return which views this process sees in optimiser step `step` (from 0)."""
        return self._batch_sampler.of_step(step)

    def views(self, view_ids: np.ndarray, batch_size: int) -> Iterable[Batch]:
        """Return any views in batches, independent of the batches of training and of the process.

        Args:
            view_ids: [n, 2], epoch and position; the partners that mixing needs are added.
            batch_size: images, in this process.
        """
        return self._load(self._batch_sampler.blocks(self._batch_sampler.whole(view_ids), batch_size))

    @abstractmethod
    def _load(self, blocks: Iterable[list[ViewKey]], lent: bool = False) -> Iterable[Batch]:
        """Return the batch of each block."""


class PillowLoader(TrainingLoader):
    """Workers make the views.

    Args:
        views: of the run's photos.
        batch_sampler: deals them.
        mixing: makes batches of them.
        workers: processes that make them.
        pin_memory: whether batches are copied to pinned memory, for a GPU.
        ahead: batches that each worker makes ahead.
    """

    def __init__(
        self,
        views: Views,
        batch_sampler: TrainingBatchSampler,
        mixing: Mixing,
        workers: int,
        pin_memory: bool,
        ahead: int = PREFETCHED,
    ) -> None:
        super().__init__(batch_sampler)
        self._views, self._mixing, self._workers, self._pin_memory = views, mixing, workers, pin_memory
        self._ahead = ahead

    def _load(self, blocks: Iterable[list[ViewKey]], lent: bool = False) -> Iterable[Batch]:
        collate = _InShared(self._mixing, SharedBuffers(self._ahead))
        has_gpu, buffers = self._pin_memory, self._workers * (self._ahead + 1)
        batches = in_workers(self._views, blocks, collate, workers=self._workers, ahead=self._ahead, has_gpu=has_gpu)
        if not self._workers:
            return map(Batch.pinned, batches) if has_gpu else batches
        theirs = received(batches, buffers, lambda batch: batch.images)
        if has_gpu:
            return one_ahead(Batch.pinned, theirs)
        return theirs if lent else (batch._replace(images=batch.images.clone()) for batch in theirs)


@dataclass(frozen=True)
class _InShared:
    """Makes batches in memory that a worker shares."""

    mixing: Mixing
    buffers: SharedBuffers

    def __call__(self, examples: list[Example]) -> Batch:
        return self.mixing(examples, self.buffers.stack)


class _Photos(Dataset[Example]):
    def __init__(self, sight: Sight, indices: range) -> None:
        self._sight, self._indices = sight, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> Example:
        photo = self._indices[position]
        view, unreadable = self._sight.view(photo, "for evaluation")
        return Example(view, int(self._sight.photos.labels[photo]), None, photo, photo, unreadable)


@dataclass(frozen=True)
class _Unmixed:
    classes: int

    def __call__(self, examples: list[Example]) -> Batch:
        """Return the batch of `examples`, neither mixed nor smoothed."""
        labels = torch.tensor([example.label for example in examples])
        targets = torch.nn.functional.one_hot(labels, self.classes).float()
        batch = Batch(torch.stack([example.image for example in examples]), targets, labels)
        return batch.without(missing_of(examples))


def build_evaluation_loader(
    photos: Photos,
    transform: Transform,
    *,
    batch_size: int,
    rank: int,
    processes: int,
    workers: int,
    pin_memory: bool,
    skip: bool = False,
) -> Iterable[Batch]:
    """Return a loader of this process's share of a split: every image exactly once over all processes.

    Process r of P sees the images r, r + P, r + 2P, …; if one cannot be read, its batch lists it as missing or, with
    `skip` off, the evaluation ends.
    """
    return _Plainly(
        DataLoader(
            _Photos(Sight(photos, transform, skip), range(rank, len(photos), processes)),
            batch_size=batch_size,
            collate_fn=_Unmixed(len(photos.classes)),
            num_workers=workers,
            timeout=SECONDS_FOR_A_BATCH if workers else 0,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_serve,
        )
    )
