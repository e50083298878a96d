"""Views from rows of parameters and photos on a device: every operation of Pillow's views, for a batch at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from subprocess import CalledProcessError
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deit_kd.interfaces import Statistics
from deit_kd.views import counter, reference, settings, tables
from deit_kd.views.coefficients import coefficients, taps
from deit_kd.views.policy import Operation
from deit_kd.views.rows import Rows

EXECUTOR_VERSION = 1  # of what follows from a row and a photo; part of what identifies stores, fits and runs
_PART_BYTES = {"cpu": 1 << 23, "cuda": 1 << 29}  # of temporary memory for a part of a batch; a CPU's should be cached


class PhotoBuffer(NamedTuple):
    """Decoded photos of any sizes in one piece of memory, on any device."""

    pixels: Tensor  # [bytes] uint8, RGB: height, width, channel
    offsets: Tensor  # [n] int64, the byte where each photo begins
    heights: Tensor  # [n] int32
    widths: Tensor  # [n] int32


class Executor:
    """Turns rows and photos into views [B, 3, H, W]: the same bits for any batch, without waiting for the device.

    Args:
        image_size: H and W.
        mean: by channel, of values from 0 to 1.
        std: likewise.
        dtype: of the views.
        device: where photos are and views are made.
    """

    def __init__(
        self,
        *,
        image_size: int,
        mean: Statistics,
        std: Statistics,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._size = image_size
        self._device = torch.device(device)
        self._primitives = _primitives(self._device)
        levels = torch.arange(256, dtype=torch.float32).div(255).expand(3, -1)  # as Pillow's views are normalised
        values = levels.sub(torch.tensor(mean)[:, None]).div(torch.tensor(std)[:, None])
        noise = torch.from_numpy(counter.normal_quantiles(1 << reference.NOISE_BITS))
        fill = torch.tensor([min(255, round(255 * value)) for value in mean], dtype=torch.uint8)  # timm's
        self._values, self._noise, self._fill = values.to(dtype).to(device), noise.to(dtype).to(device), fill.to(device)

    @property
    def uses_kernels(self) -> bool:
        """Whether Triton's kernels make the views; else plain PyTorch does, with the same bits."""
        return self._primitives is not reference

    def __call__(self, photos: PhotoBuffer, which: np.ndarray, rows: Rows) -> Tensor:
        """Return the views [B, 3, H, W] of `rows`, normalised and not yet mixed; view b is of photo ``which[b]``."""
        if not len(rows):
            return self._values.new_empty((0, 3, self._size, self._size))
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():  # for the kernels
            parts = [self._views(photos, which[part], rows.at(part)) for part in self._parts(rows)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def mix(self, images: Tensor, targets: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return `images` [B, 3, H, W] and `targets` [B, C] of `rows` with pairs mixed, as `Mixing` does.

        A view whose partner is not in the batch is its own partner, and so stays as it is.
        """
        partners, boxes = self._upload(rows.partners(), rows.mixing_box)
        share, faded = self._upload(rows.share, np.where(rows.mixing_box[:, 2] > 0, 1.0, rows.share))
        others = images[partners]
        mixed = images.float().lerp(others.float(), (1 - faded).float()[:, None, None, None]).to(images.dtype)
        mixed = torch.where(reference.inside(boxes, self._size), others, mixed)
        return mixed, targets.lerp(targets[partners], (1 - share).to(targets.dtype)[:, None])

    def _views(self, photos: PhotoBuffer, which: np.ndarray, rows: Rows) -> Tensor:
        images = self._resized(photos, which, rows)
        for slot in range(rows.operations.shape[1]):
            self._operate(images, rows.operations[:, slot], rows.arguments[:, slot], rows.operation_bicubic[:, slot])
        views = self._primitives.normalise(images, self._values)
        erased = np.flatnonzero(rows.erasing[:, 2])
        if len(erased):
            where, boxes, keys = self._upload(erased, rows.erasing[erased], rows.noise_key[erased])
            self._primitives.erase(views, where, boxes, keys, self._noise)
        return views

    def _resized(self, photos: PhotoBuffer, which: np.ndarray, rows: Rows) -> Tensor:
        """Return crops in the size of a view, flipped: [n, 3, H, W] uint8."""
        size, (height, width) = self._size, rows.crop[:, 2:].T
        # Pillow 13 begins with the columns where that leaves less to do, earlier versions never do.
        upright = height - size > 2 * (width - size).clip(0)
        length, lines = np.where(upright, height, width), np.where(upright, width, height)
        photo, top, left, swapped, across, down, bicubic, flip = self._upload(
            which, *rows.crop[:, :2].T, upright, length, lines, rows.resize_bicubic, rows.flip
        )
        line_bytes = 3 * photos.widths[photo].long()
        start = photos.offsets[photo] + top * line_bytes + 3 * left
        step, pitch = torch.where(swapped > 0, line_bytes, 3), torch.where(swapped > 0, 3, line_bytes)
        first = coefficients(across, bicubic, flip * (1 - swapped), size, taps(length.max(), size, rows.resize_bicubic))
        second = coefficients(down, bicubic, flip * swapped, size, taps(lines.max(), size, rows.resize_bicubic))
        shape = int(lines.max()), int(length.max())
        resized = self._primitives.resize_lines(photos.pixels, start, step, pitch, shape, *first)
        return self._primitives.resize_columns(resized, *second, swapped)

    def _operate(self, images: Tensor, operations: np.ndarray, arguments: np.ndarray, bicubic: np.ndarray) -> None:
        """Apply one slot [n] of rows to `images` [n, 3, H, W], in place, one kind of operation after the other."""
        for codes, apply in _KINDS:
            where = np.flatnonzero(np.isin(operations, codes))
            if len(where):
                apply(self, images, where, operations[where], arguments[where], bicubic[where])

    def _move(self, images: Tensor, where: np.ndarray, codes: np.ndarray, given: np.ndarray, cubic: np.ndarray) -> None:
        place, maps = self._upload(where, settings.affine(codes, given, cubic, self._size))
        self._primitives.affine(images, place, maps, self._fill)

    def _map_levels(self, images: Tensor, where: np.ndarray, codes: np.ndarray, given: np.ndarray, *_: Any) -> None:
        place, operations, arguments = self._upload(where, *settings.integers(codes, given).T)
        self._primitives.look_up(images, place, tables.fixed(operations, arguments))

    def _stretch(self, images: Tensor, where: np.ndarray, *_: Any) -> None:
        (place,) = self._upload(where)
        self._primitives.look_up(images, place, tables.auto_contrast(self._primitives.histograms(images, place)))

    def _equalize(self, images: Tensor, where: np.ndarray, *_: Any) -> None:
        (place,) = self._upload(where)
        self._primitives.look_up(images, place, tables.equalize(self._primitives.histograms(images, place)))

    def _contrast(self, images: Tensor, where: np.ndarray, codes: np.ndarray, given: np.ndarray, *_: Any) -> None:
        place, factors = self._upload(where, settings.factors(given))
        sums = self._primitives.grey_sums(images, place)
        self._primitives.look_up(images, place, tables.contrast(factors, sums, self._size**2))

    def _saturate(self, images: Tensor, where: np.ndarray, codes: np.ndarray, given: np.ndarray, *_: Any) -> None:
        self._primitives.saturate(images, *self._upload(where, settings.factors(given)))

    def _sharpen(self, images: Tensor, where: np.ndarray, codes: np.ndarray, given: np.ndarray, *_: Any) -> None:
        self._primitives.sharpen(images, *self._upload(where, settings.factors(given)))

    def _blur(self, images: Tensor, where: np.ndarray, codes: np.ndarray, given: np.ndarray, *_: Any) -> None:
        self._primitives.blur(images, *self._upload(where, settings.blurs(given)))

    def _parts(self, rows: Rows) -> Iterator[slice]:
        """Yield the parts of a batch that one after the other fit into the memory for temporaries."""
        longest = int(rows.crop[:, 2:].max())
        of_weights = 2 * taps(longest, self._size, rows.resize_bicubic) * self._size * 32
        of_lines = longest * max(longest, self._size) * 3 * self._primitives.BYTES_A_VALUE
        step = max(1, _PART_BYTES[self._device.type] // (of_weights + of_lines))
        return (slice(first, first + step) for first in range(0, len(rows), step))

    def _upload(self, *values: np.ndarray) -> tuple[Tensor, ...]:
        """Return `values` as int64 (as float64 if they are) on the device, in one copy that nobody waits for."""
        kind = np.float64 if values[0].dtype == np.float64 else np.int64
        uploaded = torch.from_numpy(np.concatenate([value.ravel().astype(kind) for value in values]))
        if self._device.type != "cpu":
            uploaded = uploaded.pin_memory().to(self._device, non_blocking=True)
        parts = uploaded.split([value.size for value in values])
        return tuple(part.view(value.shape) for part, value in zip(parts, values, strict=True))


def _primitives(device: torch.device) -> ModuleType:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return reference
    try:
        from deit_kd.views import kernels

        if device.type == "cuda":
            kernels.start()
    except (ImportError, RuntimeError, OSError, CalledProcessError):  # Triton comes with torch on Linux only
        return reference
    return kernels


_AFFINE = (
    Operation.SHEAR_X,
    Operation.SHEAR_Y,
    Operation.TRANSLATE_X,
    Operation.TRANSLATE_Y,
    Operation.ROTATE,
)
_FIXED = (
    Operation.INVERT,
    Operation.POSTERIZE,
    Operation.SOLARIZE,
    Operation.SOLARIZE_ADD,
    Operation.BRIGHTNESS,
)
_KINDS = (
    (_AFFINE, Executor._move),
    (_FIXED, Executor._map_levels),
    ((Operation.AUTO_CONTRAST,), Executor._stretch),
    ((Operation.EQUALIZE,), Executor._equalize),
    ((Operation.CONTRAST,), Executor._contrast),
    ((Operation.COLOR,), Executor._saturate),
    ((Operation.SHARPNESS,), Executor._sharpen),
    ((Operation.BLUR,), Executor._blur),
)
