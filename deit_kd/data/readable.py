"""A loader that leaves out the images that cannot be read, and says which: nothing ever stands in for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deit_kd.data.loader import unmixed_batch
from deit_kd.data.photos import Photos
from deit_kd.data.transforms import Transform
from deit_kd.interfaces import Batch, InputError


class Portion(NamedTuple):
    """Some images of a split, and what is wrong with those that are missing."""

    indices: Tensor  # [B], in the split
    batch: Batch | None  # None where not one image could be read
    unreadable: dict[int, str]  # the reason, by index


_Example = tuple[int, "Tensor | str", int]


class _Readable(Dataset[_Example]):
    def __init__(self, photos: Photos, indices: range, transform: Transform) -> None:
        self._photos, self._indices, self._transform = photos, indices, transform

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> _Example:
        index = self._indices[position]
        try:
            image = self._photos.image(index)
        except InputError as error:
            return index, str(error), self._photos.labels[index]
        return index, self._transform(image), self._photos.labels[index]


@dataclass(frozen=True)
class _Collate:
    classes: int

    def __call__(self, examples: list[_Example]) -> Portion:
        unreadable = {index: image for index, image, _ in examples if isinstance(image, str)}
        read = [(index, image, label) for index, image, label in examples if isinstance(image, Tensor)]
        indices = torch.tensor([index for index, _, _ in read], dtype=torch.long)
        if not read:
            return Portion(indices, None, unreadable)
        batch = unmixed_batch([(image, label) for _, image, label in read], self.classes)
        return Portion(indices, batch, unreadable)


def build_portion_loader(
    photos: Photos,
    transform: Transform,
    *,
    batch_size: int,
    rank: int,
    processes: int,
    workers: int,
    pin_memory: bool,
) -> Iterable[Portion]:
    """Return a loader of this process's share of a split: every readable image exactly once over all processes."""
    return DataLoader(
        _Readable(photos, range(rank, len(photos), processes), transform),
        batch_size=batch_size,
        collate_fn=_Collate(len(photos.classes)),
        num_workers=workers,
        pin_memory=pin_memory,
    )
