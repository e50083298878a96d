"""The photo at each position of an epoch, and the positions that a process computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from deit_kd.interfaces import InputError
from deit_kd.randomness import VIEWS_VERSION, generator

BLOCK_PHOTOS = 16  # photos whose repeated views are kept together


class ViewKey(NamedTuple):
    """One view: everything random about it follows from the seed, `epoch` and `position`."""

    epoch: int
    position: int
    photo: int  # index in its split


def epoch_order(photos: int, repeats: int, seed: int, epoch: int, version: int = VIEWS_VERSION) -> np.ndarray:
    """Return the photo at each position of an epoch; a pure function of its arguments.

    Without repeats this is a permutation. With repeated augmentation (Hoffer et al. 2020; DeiT) an epoch
    keeps about the set's length: ``photos // repeats`` photos, `repeats` views each, a different part of the set every
    epoch. The views of a photo are within one block of ``16 * repeats`` positions (a last block of one photo joins the
    block before), and positions 2m and 2m + 1 never hold the same photo. A block is a round for each repeat, shuffled,
    so that mixing pairs different photos; in `version` 1, of old label stores, rounds were rotated by one photo, which
    left each photo only two partners.

    Returns:
        [(photos // repeats) * repeats] indices.

    Raises:
        InputError: with repeats there are fewer than two photos per epoch.
    """
    if repeats == 1:
        return generator("order", seed, epoch).permutation(photos)
    taken = photos // repeats
    if taken < 2:
        raise InputError(
            f"augment.repeats: {repeats} is too many for {photos} photos; use {max(1, photos // 2)} or less"
        )
    cycle, part = divmod(epoch, repeats)
    chosen = generator("order", seed, cycle).permutation(photos)[part * taken : (part + 1) * taken]
    cuts = list(range(BLOCK_PHOTOS, taken - 1, BLOCK_PHOTOS))
    blocks = np.split(chosen, cuts)
    if version == 1:
        return np.concatenate([np.roll(block, -turn) for block in blocks for turn in range(repeats)])
    choices = generator("rounds", seed, epoch)
    return np.concatenate([_shuffled_rounds(block, repeats, choices) for block in blocks])


def _shuffled_rounds(block: np.ndarray, rounds: int, choices: np.random.Generator) -> np.ndarray:
    """Return the photos of a block (at least two) in several orders, so that neighbours are never the same photo."""
    orders = [choices.permutation(block)]
    while len(orders) < rounds:
        order = choices.permutation(block)
        orders.append(np.roll(order, -1) if order[0] == orders[-1][-1] else order)
    return np.concatenate(orders)


class TrainingBatchSampler(Sampler[list[ViewKey]]):
    """Deals the views of a whole run, micro-batch by micro-batch, to one process.

    Optimiser step s of an epoch takes positions ``[s * batch_size, (s + 1) * batch_size)``; micro-step a of
    rank r takes one contiguous block of them, so that no pair is split. The last incomplete batch of an
    epoch is dropped. To use fewer view epochs than epochs, set `view_epochs`: epoch e then deals the views of epoch
    ``e % view_epochs``, beginning with those that were dropped the last time. Order and pairs are the same. `version`
    is that of the order, see `epoch_order`.

    Args:
        photos: size of the split.
        repeats: views of each photo in an epoch.
        seed: of the run.
        batch_size: images per optimiser step, over all processes and accumulation steps.
        accumulation_steps: micro-batches per optimiser step.
        rank: of this process.
        processes: how many there are.
        pairs: whether mixing pairs neighbours, so that blocks must be even.
        epochs: how many epochs to deal.

    Raises:
        InputError: the batch cannot be dealt evenly, or the set is smaller than one batch.
    """

    def __init__(
        self,
        *,
        photos: int,
        repeats: int,
        seed: int,
        batch_size: int,
        accumulation_steps: int,
        rank: int,
        processes: int,
        pairs: bool,
        epochs: int,
    ) -> None:
        unit = processes * accumulation_steps * (2 if pairs else 1)
        if batch_size % unit:
            raise InputError(
                f"train.batch_size: {batch_size} is not a multiple of {unit} ({processes} processes x "
                f"{accumulation_steps} accumulation steps{' x 2 for mixing in pairs' if pairs else ''}); "
                f"use {max(unit, batch_size // unit * unit)}"
            )
        length = photos // repeats * repeats
        if length < batch_size:
            largest = length // unit * unit
            cure = f"use {largest} or less" if largest else "add photos"
            raise InputError(f"train.batch_size: {batch_size} is more than the {length} views of an epoch; {cure}")
        self._photos, self._repeats, self._seed = photos, repeats, seed
        self._batch_size, self._accumulation_steps = batch_size, accumulation_steps
        self._rank, self._processes = rank, processes
        self._block = batch_size // (processes * accumulation_steps)
        self._whole = 2 if pairs else 1
        self.views_per_epoch = length // self._whole * self._whole
        self.steps_per_epoch = length // batch_size
        self.total_steps = self.steps_per_epoch * epochs
        self.first_step = 0
        self.view_epochs = epochs
        self.version = VIEWS_VERSION
        epoch_order(photos, repeats, seed, 0)

    def __len__(self) -> int:
        return (self.total_steps - self.first_step) * self._accumulation_steps

    def __iter__(self) -> Iterator[list[ViewKey]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first_step, self.total_steps):
            if self._view_epoch(step) != epoch:
                epoch = self._view_epoch(step)
                order = self._order(epoch)
            yield from self._micro_batches(step, epoch, order)

    def of_step(self, step: int) -> list[ViewKey]:
        """Return what this process computes in optimiser step `step` (from 0), in the order of its micro-batches."""
        epoch = self._view_epoch(step)
        return [key for block in self._micro_batches(step, epoch, self._order(epoch)) for key in block]

    def view_ids(self, first_step: int) -> Iterator[np.ndarray]:
        """Yield epoch and position [B, 2] of the views of each micro-batch from `first_step` on."""
        for step in range(first_step, self.total_steps):
            for positions in self._positions(step):
                yield np.stack((np.full_like(positions, self._view_epoch(step)), positions), 1)

    def epochs_from(self, first_step: int) -> list[int]:
        """Return the view epoch of each epoch, from that of `first_step` on."""
        begun = first_step - first_step % self.steps_per_epoch
        return [self._view_epoch(step) for step in range(begun, self.total_steps, self.steps_per_epoch)]

    def _view_epoch(self, step: int) -> int:
        return step // self.steps_per_epoch % self.view_epochs

    def _order(self, epoch: int) -> np.ndarray:
        return epoch_order(self._photos, self._repeats, self._seed, epoch, self.version)

    def _micro_batches(self, step: int, epoch: int, order: np.ndarray) -> Iterator[list[ViewKey]]:
        for positions in self._positions(step):
            yield [ViewKey(epoch, p, int(order[p])) for p in positions.tolist()]

    def _positions(self, step: int) -> Iterator[np.ndarray]:
        """Yield the positions [B] of this process's micro-batches in optimiser step `step`."""
        # As if the repetitions of a view epoch were one stream: each time other views are dropped.
        steps_of_it = step // (self.steps_per_epoch * self.view_epochs) * self.steps_per_epoch
        batch_start = (steps_of_it + step % self.steps_per_epoch) * self._batch_size
        for micro_step in range(self._accumulation_steps):
            start = batch_start + (micro_step * self._processes + self._rank) * self._block
            yield np.arange(start, start + self._block, dtype=np.int64) % self.views_per_epoch

    def blocks(self, view_ids: np.ndarray, size: int) -> Iterator[list[ViewKey]]:
        """Yield the keys of any views, e.g. of those that training drops at an epoch's end.

        Args:
            view_ids: [n, 2], epoch and position, by epoch; whole pairs are together if mixing is on.
            size: views per block, rounded up to whole pairs.
        """
        size += size % self._whole
        for epoch in np.unique(view_ids[:, 0]):
            order = self._order(int(epoch))
            positions = view_ids[view_ids[:, 0] == epoch, 1]
            for start in range(0, len(positions), size):
                yield [ViewKey(int(epoch), int(p), int(order[p])) for p in positions[start : start + size]]

    def whole(self, view_ids: np.ndarray) -> np.ndarray:
        """Return `view_ids` [n, 2] in order, with the partners that mixing needs beside them."""
        firsts = view_ids - view_ids % [1, self._whole]
        return np.unique(np.concatenate([firsts + [0, turn] for turn in range(self._whole)]), axis=0)
