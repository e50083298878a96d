"""Photos in tar shards, read by position: any photo in any order, as from files."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import BinaryIO, NamedTuple

import numpy as np

from deit_kd.data.decode import UnreadableImage
from deit_kd.data.source import Source
from deit_kd.interfaces import InputError

DIGEST_SIZE = 8  # bytes of a photo's digest
OPEN_AT_ONCE = 128  # shards that a process keeps open; many systems allow 1,024 files


def digest_of(content: bytes) -> int:
    """Return a digest of a photo's bytes, an int64."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=DIGEST_SIZE).digest(), "big", signed=True)


def as_text(digest: int) -> str:
    """Return a digest as hexadecimal digits."""
    return digest.to_bytes(DIGEST_SIZE, "big", signed=True).hex()


def as_number(text: object) -> int | None:
    """Return the digest that `as_text` wrote; None if `text` is none."""
    if not isinstance(text, str) or not re.fullmatch(f"[0-9a-f]{{{2 * DIGEST_SIZE}}}", text):
        return None
    return int.from_bytes(bytes.fromhex(text), "big", signed=True)


class Shard(NamedTuple):
    """The file of one shard, and what it looked like when it was indexed."""

    path: str
    size: int
    changed_ns: int


class Shards(Source):
    """Images in tar shards; all columns are int64 [n], one row for each image.

    Args:
        files: the shards.
        shard: which of the files.
        offset: of the first byte.
        size: bytes.
        digest: of the bytes.
    """

    def __init__(
        self, files: Sequence[Shard], shard: np.ndarray, offset: np.ndarray, size: np.ndarray, digest: np.ndarray
    ) -> None:
        self.files, self.shard, self.offset, self.sizes, self.digest = tuple(files), shard, offset, size, digest

    def open(self, row: int, where: str) -> BinaryIO:
        """Return the bytes of an image; a shard that was changed since it was indexed is refused."""
        file = self.files[int(self.shard[row])]
        try:
            content = _opened(file).read(int(self.sizes[row]), int(self.offset[row]))
        except OSError as error:
            raise UnreadableImage(f"{where}: cannot be read from {file.path} ({error.strerror})") from error
        if digest_of(content) != int(self.digest[row]):
            raise UnreadableImage(
                f"{where}: cannot be read as an image (its bytes in {file.path} are not those that were packed); copy "
                "that shard again"
            )
        return io.BytesIO(content)

    def moved(self, copies: Mapping[Shard, Shard]) -> Shards:
        """Return the same images, with copies in place of some files."""
        files = [copies.get(file, file) for file in self.files]
        return Shards(files, self.shard, self.offset, self.sizes, self.digest)


class _Descriptor:
    """An open file, closed when nobody reads it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))

    def read(self, size: int, offset: int) -> bytes:
        """Return bytes of the file without moving in it, so that threads and forked processes can share it."""
        parts = []
        while size and (part := os.pread(self.number, size, offset)):
            parts.append(part)
            size, offset = size - len(part), offset + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=OPEN_AT_ONCE)
def _opened(shard: Shard) -> _Descriptor:
    try:
        file = _Descriptor(shard.path)
    except FileNotFoundError as error:
        raise InputError(f"{shard.path}: was removed while it was in use; restore it") from error
    found = os.fstat(file.number)
    if (found.st_size, found.st_mtime_ns) != (shard.size, shard.changed_ns):
        raise InputError(
            f"{shard.path}: was changed while it was in use; restore it and continue with --resume auto, or run "
            "deit-kd data index"
        )
    return file
