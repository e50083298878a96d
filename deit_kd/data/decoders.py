"""What decodes the bytes of an image: Pillow, or torchcodec where it makes the same of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image

from deit_kd.data.decode import decoded
from deit_kd.interfaces import InputError

JPEG = ("JPEG", "MPO")  # MPO: several in one file, of which the first counts
UPRIGHT, ON_ITS_SIDE = 1, (5, 6, 7, 8)  # values of EXIF's orientation


class Decoder:
    """Pillow: every format, see `decoded`."""

    version = "pillow"  # and the number of what else belongs to the identity of views

    def image(self, file: BinaryIO, where: str) -> Image.Image:
        """Return an image as RGB; raises as `decoded` does."""
        return decoded(file, where)

    def array(self, file: BinaryIO, where: str) -> np.ndarray:
        """Return the same pixels, uint8 [H, W, 3]; not to be written to."""
        return np.asarray(self.image(file, where))


class TorchCodec(Decoder):
    """torchcodec for JPEG; Pillow for all else, and wherever both could disagree about an image.

    Pillow reads the header first. So what is too large is refused before it is decoded, and an orientation that only
    Pillow knows of (in XMP) leaves the image to Pillow. What torchcodec cannot decode, Pillow judges.

    Raises:
        InputError: torchcodec is not installed.
    """

    def __init__(self) -> None:
        try:
            from torchcodec import __version__
            from torchcodec.decoders import decode_jpeg
        except (ImportError, OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f'data.decoder: torchcodec needs torchcodec 0.17 or newer ({reason}); pip install "deit-kd[torchcodec]"'
            ) from error
        self._decode_jpeg: Callable[[torch.Tensor], Any] = decode_jpeg
        self.version = f"torchcodec {__version__.split('+')[0]}"

    def image(self, file: BinaryIO, where: str) -> Image.Image:
        """Return an image as RGB; raises as `decoded` does."""
        content = bytearray(file.read())
        pixels = self._pixels(content)
        return decoded(io.BytesIO(content), where) if pixels is None else Image.fromarray(pixels)

    def array(self, file: BinaryIO, where: str) -> np.ndarray:
        """Return the same pixels, uint8 [H, W, 3]."""
        content = bytearray(file.read())
        pixels = self._pixels(content)
        return super().array(io.BytesIO(content), where) if pixels is None else pixels

    def _pixels(self, content: bytearray) -> np.ndarray | None:
        """Return the pixels [H, W, 3] of a JPEG file; None leaves it to Pillow."""
        try:
            with Image.open(io.BytesIO(content)) as header:
                if header.format not in JPEG:
                    return None
                width, height = header.size
                orientation = header.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
                if orientation != UPRIGHT and orientation != _in_exif(header):
                    return None
            file: torch.Tensor = torch.frombuffer(content, dtype=torch.uint8)
            pixels: np.ndarray = self._decode_jpeg(file).permute(1, 2, 0).numpy()
        except Exception:  # whatever it is, Pillow says it in its words, or reads the image all the same
            return None
        upright = (width, height) if orientation in ON_ITS_SIDE else (height, width)
        return pixels if pixels.shape == (*upright, 3) else None


def _in_exif(image: Image.Image) -> int | None:
    """Return the orientation in an image's EXIF alone; Pillow also finds one in XMP."""
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    found: int | None = exif.get(ExifTags.Base.Orientation)
    return found


PILLOW = Decoder()


def decoder_named(name: str) -> Decoder:
    """Return the decoder of a recipe, ``pillow`` or ``torchcodec``.

    Raises:
        InputError: its library is not installed.
    """
    return TorchCodec() if name == "torchcodec" else PILLOW
