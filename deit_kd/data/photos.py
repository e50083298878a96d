"""One split of a dataset: where its images are, their labels, and what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from deit_kd.interfaces import InputError


def load_image(path: Path) -> Image.Image:
    """Read one image file as RGB, turned the way its EXIF orientation says.

    Raises:
        InputError: the file is missing or is not a readable image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error}); repair or remove the file") from error


@dataclass(frozen=True)
class Photos:
    """Labelled images, on disk or in memory.

    Args:
        names: one name for each image, relative to `root` where the images are files.
        labels: the class of each image, an index into `classes`.
        classes: class names, in label order.
        root: the folder of the files; None when the images are in memory.
        arrays: uint8 images [H, W, 3] of one size, when they are in memory from the start.
        decoded: the files as RGB images, when they were read ahead.
    """

    names: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...]
    root: Path | None = None
    arrays: np.ndarray | None = None
    decoded: Sequence[Image.Image] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """Return one image as RGB."""
        if self.arrays is not None:
            return Image.fromarray(self.arrays[index])
        if self.decoded is not None:
            return self.decoded[index]
        assert self.root is not None
        return load_image(self.root / self.names[index])

    def in_memory(self) -> Photos:
        """Return the same photos, every file read and decoded once; H x W x 4 bytes each, which workers share.

        Raises:
            InputError: a file is missing or is not a readable image.
        """
        if self.arrays is not None or self.decoded is not None:
            return self
        with ThreadPoolExecutor() as pool:
            decoded = list(pool.map(self.image, range(len(self))))
        return replace(self, decoded=decoded)

    def subset(self, indices: Sequence[int]) -> Photos:
        """Return the images at `indices`, in that order."""
        return Photos(
            names=[self.names[i] for i in indices],
            labels=[self.labels[i] for i in indices],
            classes=self.classes,
            root=self.root,
            arrays=None if self.arrays is None else self.arrays[np.asarray(indices, dtype=np.int64)],
            decoded=None if self.decoded is None else [self.decoded[i] for i in indices],
        )

    def size(self, index: int) -> int:
        """Return the size of one image in bytes, as stored."""
        if self.arrays is not None:
            return self.arrays[index].nbytes
        assert self.root is not None
        return (self.root / self.names[index]).stat().st_size

    def digest(self) -> str:
        """Return a hash of names, sizes, labels and classes; where the folder lies does not matter."""
        hasher = hashlib.blake2b("\n".join(self.classes).encode(), digest_size=16)
        for index, (name, label) in enumerate(zip(self.names, self.labels, strict=True)):
            hasher.update(f"\n{name}\t{self.size(index)}\t{label}".encode())
        if self.arrays is not None:
            hasher.update(np.ascontiguousarray(self.arrays).tobytes())
        return hasher.hexdigest()


class Splits(NamedTuple):
    """The two parts of a dataset; both have the same classes."""

    train: Photos
    validation: Photos


def split_by_hash(photos: Photos, fraction: float) -> Splits:
    """Split off a validation part: stratified, by the hash of each name, the same for ever.

    Args:
        photos: all the images.
        fraction: share of each class that goes to validation, above 0 and below 1; rounded, at least one.

    Raises:
        InputError: a class has fewer than two images, so that one part would have none.
    """
    by_class: list[list[int]] = [[] for _ in photos.classes]
    for index, label in enumerate(photos.labels):
        by_class[label].append(index)
    train, validation = [], []
    for name, members in zip(photos.classes, by_class, strict=True):
        if len(members) < 2:
            raise InputError(
                f"class {name!r} has {len(members)} image(s), too few to split; add images or a validation folder"
            )
        members = sorted(members, key=lambda i: hashlib.blake2b(photos.names[i].encode()).digest())
        held_out = min(max(1, round(len(members) * fraction)), len(members) - 1)
        validation += members[:held_out]
        train += members[held_out:]
    return Splits(photos.subset(sorted(train)), photos.subset(sorted(validation)))
