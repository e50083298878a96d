"""Where the images of a set are: files of a tree, arrays in memory, or anything else that is read by position."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from deit_kd.data.decode import Stamp, opened, size_in_header
from deit_kd.data.decoders import PILLOW, Decoder


class Source(ABC):
    """Images by their rows; `where` is how messages name one, the path of its file if it has one.

    Args:
        sizes: the size of each image in bytes as it is stored, int64 [rows]; -1 where there is none.
    """

    sizes: np.ndarray

    @abstractmethod
    def open(self, row: int, where: str) -> BinaryIO:
        """Return the bytes of an image as a file, to be closed.

        Raises:
            UnreadableImage: they are missing or damaged.
            InputError: they are not those that were found at the start.
        """

    def image(self, row: int, where: str, decoder: Decoder = PILLOW) -> Image.Image:
        """Return an image as RGB; raises as `open` does, and UnreadableImage if the bytes are no image."""
        with self.open(row, where) as file:
            return decoder.image(file, where)

    def array(self, row: int, where: str, decoder: Decoder = PILLOW) -> np.ndarray:
        """Return the same pixels, uint8 [H, W, 3]; not to be written to."""
        with self.open(row, where) as file:
            return decoder.array(file, where)

    def pixel_size(self, row: int, where: str) -> tuple[int, int]:
        """Return width and height of an image, perhaps before it is turned; (0, 0) if it cannot be read."""
        try:
            with self.open(row, where) as file:
                return size_in_header(file)
        except Exception:  # `image` says why
            return 0, 0


class TreeFiles(Source):
    """Files of a tree.

    Args:
        sizes: bytes of each file when it was found, int64 [n]; -1 where there was none.
        changed_ns: when it was last changed then, int64 [n].
        is_indexed: whether an index says so, which may be older than this program.
    """

    def __init__(self, sizes: np.ndarray, changed_ns: np.ndarray, is_indexed: bool = False) -> None:
        self.sizes, self._changed_ns, self._is_indexed = sizes, changed_ns, is_indexed

    def open(self, row: int, where: str) -> BinaryIO:
        """Return an open file; one that was changed since it was found is refused."""
        return opened(Path(where), Stamp(int(self.sizes[row]), int(self._changed_ns[row])), self._is_indexed)


class Arrays(Source):
    """Images in memory.

    Args:
        arrays: uint8 [n, H, W, 3].
    """

    def __init__(self, arrays: np.ndarray) -> None:
        self.arrays, self.sizes = arrays, np.full(len(arrays), arrays[:1].nbytes)

    def open(self, row: int, where: str) -> BinaryIO:
        """Return the pixels of an image."""
        return io.BytesIO(self.arrays[row].tobytes())

    def image(self, row: int, where: str, decoder: Decoder = PILLOW) -> Image.Image:
        """Return an image."""
        return Image.fromarray(self.arrays[row])

    def array(self, row: int, where: str, decoder: Decoder = PILLOW) -> np.ndarray:
        """Return its pixels."""
        pixels: np.ndarray = self.arrays[row]
        return pixels

    def pixel_size(self, row: int, where: str) -> tuple[int, int]:
        """Return width and height of an image."""
        height, width = self.arrays.shape[1:3]
        return width, height


class Joined(Source):
    """The images of several sources, one source after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = parts
        self.sizes = np.concatenate([part.sizes for part in parts])
        self._ends = np.cumsum([len(part.sizes) for part in parts])

    def open(self, row: int, where: str) -> BinaryIO:
        """Return the bytes of an image."""
        part, row = self._found(row)
        return part.open(row, where)

    def image(self, row: int, where: str, decoder: Decoder = PILLOW) -> Image.Image:
        """Return an image as RGB."""
        part, row = self._found(row)
        return part.image(row, where, decoder)

    def array(self, row: int, where: str, decoder: Decoder = PILLOW) -> np.ndarray:
        """Return its pixels."""
        part, row = self._found(row)
        return part.array(row, where, decoder)

    def pixel_size(self, row: int, where: str) -> tuple[int, int]:
        """Return width and height of an image."""
        part, row = self._found(row)
        return part.pixel_size(row, where)

    def _found(self, row: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self._ends, row, side="right"))
        return self._parts[part], row - (int(self._ends[part - 1]) if part else 0)
