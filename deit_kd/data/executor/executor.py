"""Views from rows of parameters and photos on a device: every operation of Pillow's views, for a batch at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deit_kd.data.executor import reference
from deit_kd.data.executor.coefficients import coefficients, taps
from deit_kd.data.executor.rows import Rows
from deit_kd.interfaces import Statistics

EXECUTOR_VERSION = 1  # of what follows from a row and a photo; part of what identifies stores, fits and runs
_CHUNK_BYTES = 1 << 28  # of temporary memory that one part of a batch may take


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
        levels = torch.arange(256, dtype=torch.float32)[None].div(255)  # what Pillow's views are normalised with
        values = (levels - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
        self._normalised = values.to(dtype).flatten().to(self._device)  # [3 * 256]

    def __call__(self, photos: PhotoBuffer, which: np.ndarray, rows: Rows) -> Tensor:
        """Return the views [B, 3, H, W] of `rows`, normalised and not yet mixed; view b is of photo ``which[b]``."""
        parts = [self._views(photos, which[part], rows.at(part)) for part in self._parts(rows)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def mix(self, images: Tensor, targets: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return `images` [B, 3, H, W] and `targets` [B, C] of `rows` with pairs mixed, as `Mixing` does.

        A view whose partner is not in the batch stays as it is.
        """
        partner = rows.partners()
        paired = partner != np.arange(len(rows))
        share = np.where(paired, rows.share, 1.0)
        faded = np.where(paired & (rows.mixing_box[:, 2] == 0), rows.share, 1.0)
        settings = np.column_stack((share, faded, partner, rows.mixing_box * paired[:, None]))
        share, faded, partners, *box = self._upload(settings).T
        partners = partners.long()
        other = 1 - faded.float()[:, None, None, None]
        mixed = images.float().lerp(images[partners].float(), other).to(images.dtype)
        mixed = torch.where(self._inside(box), images[partners], mixed)
        return mixed, targets.lerp(targets[partners], (1 - share).to(targets.dtype)[:, None])

    def _views(self, photos: PhotoBuffer, which: np.ndarray, rows: Rows) -> Tensor:
        images = self._resized(photos, which, rows)
        channel = 256 * torch.arange(3, device=self._device)[:, None, None]
        return self._normalised[images + channel]

    def _resized(self, photos: PhotoBuffer, which: np.ndarray, rows: Rows) -> Tensor:
        """Return crops in the size of a view, flipped: [n, 3, H, W] uint8."""
        settings = np.column_stack((which, rows.crop, rows.resize_bicubic, rows.flip)).astype(np.int64)
        photo, top, left, height, width, bicubic, flip = self._upload(settings).T
        pitch = 3 * photos.widths[photo].long()
        start = photos.offsets[photo] + top * pitch + 3 * left
        is_bicubic, tallest, widest = bool(rows.resize_bicubic.any()), rows.crop[:, 2].max(), rows.crop[:, 3].max()
        across = coefficients(width, bicubic > 0, flip > 0, self._size, taps(int(widest), self._size, is_bicubic))
        down = coefficients(height, bicubic > 0, flip < 0, self._size, taps(int(tallest), self._size, is_bicubic))
        lines = reference.resize_across(photos.pixels, start, pitch, height, *across, int(tallest))
        return reference.resize_down(lines, *down)

    def _parts(self, rows: Rows) -> list[slice]:
        """Return the parts of a batch that one after the other fit into the memory for temporaries."""
        height, width = int(rows.crop[:, 2].max()), int(rows.crop[:, 3].max())
        of_weights = 8 * self._size * (taps(height, self._size, True) + taps(width, self._size, True)) * 3
        of_lines = height * self._size * 3 * 16
        step = max(1, _CHUNK_BYTES // (of_weights + of_lines))
        return [slice(first, first + step) for first in range(0, len(rows), step)]

    def _inside(self, box: list[Tensor]) -> Tensor:
        """Return which pixels are within each `box` (top, left, height, width, each [n]): [n, 1, H, W]."""
        top, left, height, width = (edge[:, None, None, None] for edge in box)
        place = torch.arange(self._size, device=self._device)
        line, column = place[:, None], place
        return (line >= top) & (line < top + height) & (column >= left) & (column < left + width)

    def _upload(self, values: np.ndarray) -> Tensor:
        """Return `values` on the device, without waiting for the copy."""
        uploaded = torch.from_numpy(np.ascontiguousarray(values))
        if self._device.type == "cpu":
            return uploaded
        return uploaded.pin_memory().to(self._device, non_blocking=True)
