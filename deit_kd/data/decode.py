"""From the bytes of an image file to 8-bit RGB, whatever its pixel format."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from deit_kd.interfaces import InputError

DECODING = 2  # incremented when the same bytes decode to other pixels; part of what identifies photos
SIZED_BY_HEADER = ("BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")  # others may differ once decoded
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose 16-bit grey Pillow opens as 32-bit grey


class UnreadableImage(InputError):
    """One image file cannot be read, which does not have to end a run; the message is one line with its path."""


class Stamp(NamedTuple):
    """What a file looked like when its folder was listed."""

    size: int  # bytes; -1 if there was no such file
    changed_ns: int  # time of the last change


def stamps(root: Path, names: Iterable[str]) -> np.ndarray:
    """Return the `Stamp` of each file under `root`, as rows [n, 2] of int64."""
    return np.array([_stamp_of(root / name) for name in names], dtype=np.int64).reshape(-1, 2)


def _stamp_of(path: Path) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return Stamp(-1, 0)
    return Stamp(found.st_size, found.st_mtime_ns)


def load_image(path: Path, before: Stamp | None = None) -> Image.Image:
    """Read the first picture of an image file as RGB, rotated according to its EXIF orientation.

    16-bit grey is scaled to 8 bits, CMYK is converted, and transparency becomes white.

    Args:
        path: of the file.
        before: its stamp when it was listed; None does not compare.

    Raises:
        UnreadableImage: the file is missing or is not a readable image.
        InputError: it was changed or removed since `before`.
    """
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if before is not None and before != (found.st_size, found.st_mtime_ns):
                raise InputError(
                    f"{path}: was changed while it was in use; restore it and continue with --resume auto, or name "
                    "another output"
                )
            return _as_rgb(Image.open(file))
    except InputError:
        raise
    except Exception as error:  # codecs raise anything from SyntaxError to struct.error for a damaged file
        if isinstance(error, FileNotFoundError) and before is not None and before.size >= 0:
            raise InputError(f"{path}: was removed while it was in use; restore it") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # whose message names only the file object
            reason = "unknown format" if found.st_size else "empty file"
        raise UnreadableImage(f"{path}: cannot be read as an image ({reason}); repair or remove the file") from error


def size_in_header(path: Path) -> tuple[int, int]:
    """Return width and height of an image file, perhaps before it is turned; (0, 0) if it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.format not in SIZED_BY_HEADER:
                image.load()
            return image.size
    except Exception:  # `load_image` says why
        return 0, 0


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
