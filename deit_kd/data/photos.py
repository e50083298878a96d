"""One split of a dataset: where its images are, their labels, and what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from deit_kd.data.cache import CHANNELS, Decoded, decode_all, in_threads
from deit_kd.data.decode import DECODING, Stamp, load_image, shrunk, shrunk_size, size_in_header, stamps
from deit_kd.interfaces import InputError

UNLABELLED = -1  # in place of a label


@dataclass(frozen=True)
class Photos:
    """Images with labels or without, on disk or in memory.

    Args:
        names: one name for each image, relative to `root` if the images are files.
        labels: the class of each image, an index into `classes`; -1 if it has none.
        classes: class names, in label order.
        root: the folder of the files; None when the images are in memory.
        arrays: uint8 images [H, W, 3] of one size, when they are in memory from the start.
        decoded: all of them, if they were decoded in advance.
        stamps: what each file looked like when it was found, rows of `Stamp` [n, 2].
        short_side: pixels that the shorter side of a larger image is brought to; None keeps its size.
    """

    names: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...]
    root: Path | None = None
    arrays: np.ndarray | None = None
    decoded: Decoded | None = None
    stamps: np.ndarray | None = None
    short_side: int | None = None

    @classmethod
    def of_files(cls, root: Path, names: Sequence[str], labels: Sequence[int], classes: tuple[str, ...]) -> Photos:
        """Return photos on disk, with what their files look like now."""
        return cls(names, labels, classes, root=root, stamps=stamps(root, names))

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """Return one image as RGB.

        Raises:
            UnreadableImage: its file is missing or is not a readable image.
            InputError: its file has changed, or the whole folder is gone.
        """
        if self.decoded is not None:
            return self.decoded.image(index)
        return shrunk(self._full(index), self.short_side)

    def array(self, index: int) -> np.ndarray:
        """Return the pixels of one image, uint8 [H, W, 3] in RGB; not to be written to.

        Raises: as `image` does.
        """
        return self.decoded.array(index) if self.decoded is not None else np.asarray(self.image(index))

    def _full(self, index: int) -> Image.Image:
        if self.arrays is not None:
            return Image.fromarray(self.arrays[index])
        assert self.root is not None
        before = None if self.stamps is None else Stamp(*self.stamps[index].tolist())
        try:
            return load_image(self.root / self.names[index], before)
        except InputError as error:
            if not self.root.is_dir():
                raise InputError(
                    f"data.root: {self.root} disappeared while it was in use; restore it, then continue with --resume "
                    "auto"
                ) from error
            raise

    def where(self, index: int) -> str:
        """Return where to find one image: the path of its file, if it has one."""
        return self.names[index] if self.root is None else str(self.root / self.names[index])

    def cached(self, cache: str, place: torch.device, skip: bool = False, shown: bool = False) -> Photos:
        """Return the same photos, every one read and decoded once; H x W x 3 bytes each.

        Args:
            cache: ``memory`` or ``device``, for the message if they do not fit.
            place: where they are kept; workers and other processes share main memory.
            skip: whether a file that cannot be read only fails when its image is requested.
            shown: whether a terminal shows a progress bar.

        Raises:
            InputError: they do not fit.
            UnreadableImage: a file is missing or is not a readable image, unless `skip`.
        """
        if self.decoded is not None:
            return self
        sizes = self._sizes_in_pixels(shown)
        decoded = decode_all(self.image, sizes, cache=cache, place=place, skip=skip, shown=shown)
        return replace(self, decoded=decoded)

    def bytes_when_decoded(self) -> int:
        """Return how much memory a cache of these photos takes."""
        return CHANNELS * sum(width * height for width, height in self._sizes_in_pixels(shown=False))

    def _sizes_in_pixels(self, shown: bool) -> list[tuple[int, int]]:
        return in_threads(self._size, range(len(self)), "reading sizes", shown)

    def _size(self, index: int) -> tuple[int, int]:
        """Return width and height of an image, perhaps before it is turned; (0, 0) if it cannot be read."""
        if self.arrays is not None:
            height, width = self.arrays.shape[1:3]
            return shrunk_size((width, height), self.short_side)
        assert self.root is not None
        return shrunk_size(size_in_header(self.root / self.names[index]), self.short_side)

    def subset(self, indices: Sequence[int]) -> Photos:
        """Return the images at `indices`, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            names=[self.names[i] for i in indices],
            labels=[self.labels[i] for i in indices],
            arrays=None if self.arrays is None else self.arrays[rows],
            decoded=None if self.decoded is None else self.decoded.subset(indices),
            stamps=None if self.stamps is None else self.stamps[rows],
        )

    def digest(self) -> str:
        """Return a hash of names, sizes, labels, classes and how files are decoded; the folder may move."""
        hasher = hashlib.blake2b("\n".join(self.classes).encode(), digest_size=16)
        for line in self.lines():
            hasher.update(f"\n{line}".encode())
        if self.arrays is not None:
            hasher.update(np.ascontiguousarray(self.arrays).tobytes())
        else:
            hasher.update(f"\ndecoding {DECODING}".encode())
        return hasher.hexdigest()

    def lines(self) -> list[str]:
        """Return name, size and label of every image."""
        rows = zip(self.names, self._sizes(), self.labels, strict=True)
        return [f"{name}\t{size}\t{label}" for name, size, label in rows]

    def _sizes(self) -> list[int]:
        """Return the size of every image in bytes, as stored."""
        if self.stamps is not None:
            return self.stamps[:, 0].tolist()
        assert self.arrays is not None
        return [array.nbytes for array in self.arrays]


class Splits(NamedTuple):
    """The two parts of a dataset; both have the same classes."""

    train: Photos
    validation: Photos


def split_by_hash(photos: Photos, fraction: float) -> Splits:
    """Split off a validation part: stratified, by the hash of each name, so it never changes.

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
