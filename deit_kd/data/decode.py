"""From the bytes of an image file to 8-bit RGB, whatever its pixel format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from deit_kd.interfaces import InputError

DECODING = 2  # incremented when the same bytes decode to other pixels; part of what identifies photos
SIZED_BY_HEADER = ("BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")  # others may differ once decoded
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose 16-bit grey Pillow opens as 32-bit grey


IN_USE = "while it was in use; restore it and continue with --resume auto, or name another output"
OF_INDEX = "after its folder was indexed; restore it, or run deit-kd data index on the photos again"


class UnreadableImage(InputError):
    """One image file cannot be read, which does not have to end a run; the message is one line with its path."""


class Stamp(NamedTuple):
    """What a file looked like when its folder was listed."""

    size: int  # bytes; -1 if there was no such file
    changed_ns: int  # time of the last change


def load_image(path: Path) -> Image.Image:
    """Return the first picture of an image file, see `decoded`."""
    with opened(path) as file:
        return decoded(file, str(path))


def opened(path: Path, before: Stamp | None = None, is_indexed: bool = False) -> BinaryIO:
    """Open an image file.

    Args:
        path: of the file.
        before: its stamp when it was listed; None does not compare.
        is_indexed: whether the stamp is an index's.

    Raises:
        UnreadableImage: the file is missing or cannot be opened.
        InputError: it was changed or removed since `before`.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    except Exception as error:  # a name may hold a null byte
        if isinstance(error, FileNotFoundError) and before is not None and before.size >= 0:
            when = OF_INDEX if is_indexed else "while it was in use; restore it"
            raise InputError(f"{path}: was removed {when}") from error
        raise _unreadable(str(path), " ".join(str(error).split())) from error
    found = os.fstat(file.fileno())
    if before is not None and before != (found.st_size, found.st_mtime_ns):
        file.close()
        raise InputError(f"{path}: was changed {OF_INDEX if is_indexed else IN_USE}")
    return file


def decoded(file: BinaryIO, where: str) -> Image.Image:
    """Read the first picture of an image file as RGB, rotated according to its EXIF orientation.

    16-bit grey is scaled to 8 bits, CMYK is converted, and transparency becomes white (not in 16-bit grey).

    Args:
        file: the bytes of an image.
        where: how the message names it.

    Raises:
        UnreadableImage: it is not a readable image.
    """
    try:
        return _as_rgb(Image.open(file))
    except Exception as error:  # codecs raise anything from SyntaxError to struct.error for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # whose message names only the file object
            reason = "unknown format" if file.seek(0, os.SEEK_END) else "empty file"
        raise _unreadable(where, reason) from error


def _unreadable(where: str, reason: str) -> UnreadableImage:
    return UnreadableImage(f"{where}: cannot be read as an image ({reason}); repair or remove the file")


def size_in_header(file: BinaryIO) -> tuple[int, int]:
    """Return width and height of an image file, perhaps before it is turned; raises anything if it is none."""
    with Image.open(file) as image:
        if image.format not in SIZED_BY_HEADER:
            image.load()
        return image.size


def shrunk(image: Image.Image, short_side: int | None) -> Image.Image:
    """Return `image` with its shorter side at `short_side` pixels if that is longer; antialiased, bicubic."""
    size = shrunk_size(image.size, short_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def shrunk_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """Return the size that `shrunk` brings an image of `size` to."""
    shorter = min(size)
    if short_side is None or shorter <= short_side:
        return size
    width, height = (round(edge * short_side / shorter) for edge in size)
    return width, height


def _as_rgb(image: Image.Image) -> Image.Image:
    image.load()
    _turn_upright(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels do not say which value is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # broken EXIF is ignored: the pixels are already loaded
        return
