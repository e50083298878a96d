"""Loaders: workers that make views, in the order that the dealer lays down."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from deit_kd.data.mixing import Example, Mixing
from deit_kd.data.order import Dealer, ViewKey
from deit_kd.data.photos import Photos
from deit_kd.data.sharing import PREFETCHED, owned
from deit_kd.data.transforms import Transform
from deit_kd.interfaces import Batch, InputError
from deit_kd.randomness import seed_view


class Views(Dataset[Example]):
    """Augmented views of a split, by their keys; the same view for the same key, for ever."""

    def __init__(self, photos: Photos, transform: Transform, seed: int) -> None:
        self._photos, self._transform, self._seed = photos, transform, seed

    def __getitem__(self, key: ViewKey) -> Example:
        image = self._photos.image(key.photo)
        seed_view(self._seed, key.epoch, key.position)
        return self._transform(image), self._photos.labels[key.photo], key.epoch, key.position


@dataclass(frozen=True)
class _Plainly:
    """Batches of a loader whose workers' InputErrors come without the traceback that torch puts before them."""

    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self.batches
        except InputError as error:
            raise InputError(str(error).strip().rpartition("InputError: ")[2]) from error


def _stand_back(worker: int) -> None:
    """Let the step's threads go first: one that waits for a core holds all the others up."""
    os.nice(19)


class TrainingLoader:
    """All batches of a run in order; iterate from any step."""

    def __init__(self, views: Views, dealer: Dealer, mixing: Mixing, workers: int, pin_memory: bool) -> None:
        self._views, self._dealer, self._mixing = views, dealer, mixing
        self._workers, self._pin_memory = workers, pin_memory
        self.steps_per_epoch = dealer.steps_per_epoch
        self.total_steps = dealer.total_steps
        self.views_per_epoch = dealer.views_per_epoch

    def cycle_views(self, view_epochs: int) -> None:
        """Deal the views of `view_epochs` epochs over and over, however many epochs the run has."""
        self._dealer.view_epochs = view_epochs

    def batches(self, first_step: int) -> Iterable[Batch]:
        """Return this process's micro-batches from `first_step` to the end of the run."""
        self._dealer.first_step = first_step
        return self._load(self._dealer)

    def views(self, view_ids: np.ndarray, batch_size: int) -> Iterable[Batch]:
        """Return any views in batches, whatever batches they are trained in, for any process.

        Args:
            view_ids: [n, 2], epoch and position; the partners that mixing needs are added.
            batch_size: images, in this process.
        """
        return self._load(self._dealer.blocks(self._dealer.whole(view_ids), batch_size))

    def _load(self, blocks: Iterable[list[ViewKey]]) -> Iterable[Batch]:
        batches = _Plainly(
            DataLoader(
                self._views,
                batch_sampler=blocks,
                collate_fn=self._mixing,
                num_workers=self._workers,
                prefetch_factor=PREFETCHED if self._workers else None,
                pin_memory=self._pin_memory,
                # Pinned memory means that a GPU trains; else workers and the step share the cores.
                worker_init_fn=None if self._pin_memory else _stand_back,
            )
        )
        return owned(batches, self._workers)


def build_training_loader(
    photos: Photos,
    transform: Transform,
    *,
    seed: int,
    repeats: int,
    mixup: float,
    cutmix: float,
    mix_probability: float,
    mix_switch_probability: float,
    label_smoothing: float,
    batch_size: int,
    accumulation_steps: int,
    epochs: int,
    rank: int,
    processes: int,
    workers: int,
    pin_memory: bool,
) -> TrainingLoader:
    """Return the loader of training views for one process.

    Raises:
        InputError: the batch cannot be dealt evenly, or the set is smaller than one batch.
    """
    mixing = Mixing(
        classes=len(photos.classes),
        seed=seed,
        mixup=mixup,
        cutmix=cutmix,
        probability=mix_probability,
        switch_probability=mix_switch_probability,
        label_smoothing=label_smoothing,
    )
    dealer = Dealer(
        photos=len(photos),
        repeats=repeats,
        seed=seed,
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        rank=rank,
        processes=processes,
        pairs=mixing.is_on,
        epochs=epochs,
    )
    return TrainingLoader(Views(photos, transform, seed), dealer, mixing, workers, pin_memory)


class _Images(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, photos: Photos, transform: Transform) -> None:
        self._photos, self._transform = photos, transform

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(self._photos.image(index)), self._photos.labels[index]


def unmixed_batch(examples: list[tuple[torch.Tensor, int]], classes: int) -> Batch:
    """Return the batch of images [3, H, W] with their labels, neither mixed nor smoothed."""
    labels = torch.tensor([label for _, label in examples])
    targets = torch.nn.functional.one_hot(labels, classes).float()
    return Batch(torch.stack([image for image, _ in examples]), targets, labels)


@dataclass(frozen=True)
class _EvaluationCollate:
    classes: int

    def __call__(self, examples: list[tuple[torch.Tensor, int]]) -> Batch:
        return unmixed_batch(examples, self.classes)


def build_evaluation_loader(
    photos: Photos,
    transform: Transform,
    *,
    batch_size: int,
    rank: int,
    processes: int,
    workers: int,
    pin_memory: bool,
) -> Iterable[Batch]:
    """Return a loader of this process's share of a split: every image exactly once over all processes."""
    share = photos.subset(range(rank, len(photos), processes))
    return _Plainly(
        DataLoader(
            _Images(share, transform),
            batch_size=batch_size,
            collate_fn=_EvaluationCollate(len(photos.classes)),
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
        )
    )
