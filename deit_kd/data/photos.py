"""One split of a dataset: where its images are, their labels, and what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as arrow
import torch
from PIL import Image

from deit_kd.data.cache import CHANNELS, Decoded, decode_all, in_threads
from deit_kd.data.decode import DECODING, shrunk, shrunk_size
from deit_kd.data.decoders import PILLOW, Decoder
from deit_kd.data.listing import stamps_of
from deit_kd.data.names import AT_ONCE, Names, joined_text
from deit_kd.data.source import Arrays, Source, TreeFiles
from deit_kd.interfaces import InputError, Rest

SAMPLED = 64  # photos that stand for all
UNLABELLED = -1  # in place of a label

Pixels = TypeVar("Pixels", Image.Image, np.ndarray)


@dataclass(frozen=True)
class Photos:
    """Images with labels or without, on disk or in memory.

    Args:
        names: one name for each image, relative to `root` if there is one.
        labels: the class of each image, an index into `classes`; -1 if it has none.
        classes: class names, in label order.
        source: where the images are.
        root: the folder that names are relative to; None when the images are in memory.
        rows: int64 [n], the row of each image in `source`; None is one after the other.
        decoded: all of them, if they were decoded in advance.
        short_side: pixels that the shorter side of a larger image is brought to; None keeps its size.
        decoder: what decodes them.
        rest: what the last class stands for, if it stands for several.
    """

    names: Names
    labels: np.ndarray
    classes: tuple[str, ...]
    source: Source
    root: Path | None = None
    rows: np.ndarray | None = None
    decoded: Decoded | None = None
    short_side: int | None = None
    decoder: Decoder = PILLOW
    rest: Rest | None = None

    @classmethod
    def of_files(cls, root: Path, names: Iterable[str], labels: Sequence[int], classes: tuple[str, ...]) -> Photos:
        """Return photos on disk, with what their files look like now."""
        names = names if isinstance(names, Names) else Names(names)
        stamps = stamps_of([str(root / name) for name in names])
        return cls(names, np.asarray(labels, np.int64), classes, TreeFiles(stamps[:, 0], stamps[:, 1]), root)

    @classmethod
    def of_arrays(
        cls, names: Iterable[str], labels: Sequence[int], classes: tuple[str, ...], arrays: np.ndarray
    ) -> Photos:
        """Return images in memory, uint8 [n, H, W, 3]."""
        return cls(Names(names), np.asarray(labels, np.int64), classes, Arrays(arrays))

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
        return shrunk(self._read(self.source.image, index), self.short_side)

    def array(self, index: int) -> np.ndarray:
        """Return the pixels of one image, uint8 [H, W, 3] in RGB; not to be written to.

        Raises: as `image` does.
        """
        if self.decoded is not None:
            return self.decoded.array(index)
        if self.short_side is None:
            return self._read(self.source.array, index)
        return np.asarray(self.image(index))

    def _read(self, read: Callable[[int, str, Decoder], Pixels], index: int) -> Pixels:
        try:
            return read(self.row(index), self.where(index), self.decoder)
        except InputError as error:
            if self.root is not None and not self.root.is_dir():
                raise InputError(
                    f"data.root: {self.root} disappeared while it was in use; restore it, then continue with --resume "
                    "auto"
                ) from error
            raise

    def content(self, index: int) -> bytes:
        """Return the bytes of one image as it is stored; raises as `image` does."""
        with self.source.open(self.row(index), self.where(index)) as file:
            return file.read()

    def row(self, index: int) -> int:
        """Return the row of one image in `source`."""
        return index if self.rows is None else int(self.rows[index])

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
        decoded = decode_all(self.array, sizes, cache=cache, place=place, skip=skip, shown=shown)
        return replace(self, decoded=decoded)

    def bytes_when_decoded(self) -> int:
        """Return how much memory a cache of these photos takes."""
        return CHANNELS * sum(width * height for width, height in self._sizes_in_pixels(shown=False))

    def largest_pixels(self) -> int:
        """Return the pixels of the largest of a few photos: about as many as any of them has."""
        few = np.linspace(0, len(self) - 1, min(len(self), SAMPLED)).astype(int).tolist()
        return max(width * height for width, height in map(self._size, few))

    def _sizes_in_pixels(self, shown: bool) -> list[tuple[int, int]]:
        return in_threads(self._size, range(len(self)), "reading sizes", shown)

    def _size(self, index: int) -> tuple[int, int]:
        """Return width and height of an image, perhaps before it is turned; (0, 0) if it cannot be read."""
        return shrunk_size(self.source.pixel_size(self.row(index), self.where(index)), self.short_side)

    def subset(self, indices: Sequence[int] | np.ndarray) -> Photos:
        """Return the images at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            names=self.names.take(chosen),
            labels=self.labels[chosen],
            rows=chosen if self.rows is None else self.rows[chosen],
            decoded=None if self.decoded is None else self.decoded.subset(chosen.tolist()),
        )

    def seen_from(self, top: Path) -> Photos:
        """Return the same images with names relative to `top`, a folder above `root`."""
        assert self.root is not None
        return replace(self, root=top, names=self.names.below(self.root.absolute().relative_to(top).as_posix()))

    def digest(self) -> str:
        """Return a hash of names, sizes, labels, classes and how files are decoded.

        It depends neither on where the images are nor on how they are stored.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        hasher = hashlib.blake2b("\n".join(self.classes).encode(), digest_size=16)
        for lines in self._lines("\n"):
            hasher.update(memoryview(_text_of(lines)))
        if isinstance(self.source, Arrays):
            arrays = self.source.arrays if self.rows is None else self.source.arrays[self.rows]
            hasher.update(np.ascontiguousarray(arrays).data)
        else:
            hasher.update(f"\ndecoding {DECODING}".encode())
        return hasher.hexdigest()

    def lines(self) -> list[str]:
        """Return name, size and label of every image."""
        return [line for lines in self._lines("") for line in lines.to_pylist()]

    def _lines(self, before: str) -> Iterator[arrow.Array]:
        """Yield a line for each image, with `before` in front of it, many at a time."""
        for first in range(0, len(self), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            sizes = self.source.sizes[part if self.rows is None else self.rows[part]]
            names = joined_text("", before, self.names[part].array())
            yield joined_text("\t", names, arrow.array(sizes), arrow.array(self.labels[part]))


def _text_of(strings: arrow.Array) -> arrow.Buffer:
    """Return the bytes of all strings, one after the other."""
    _, offsets, text = strings.buffers()
    bounds = np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1]
    return text.slice(bounds[0], bounds[-1] - bounds[0])


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
    train, validation = [], []
    for label, name in enumerate(photos.classes):
        members = np.flatnonzero(photos.labels == label).tolist()
        if len(members) < 2:
            raise InputError(
                f"class {name!r} has {len(members)} image(s), too few to split; add images or a validation folder"
            )
        members = sorted(members, key=lambda i: hashlib.blake2b(photos.names[i].encode()).digest())
        held_out = min(max(1, round(len(members) * fraction)), len(members) - 1)
        validation += members[:held_out]
        train += members[held_out:]
    return Splits(photos.subset(sorted(train)), photos.subset(sorted(validation)))
