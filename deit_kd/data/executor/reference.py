"""The executor's primitives in plain PyTorch: integers in, integers out, the same bits on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from deit_kd.data.executor.coefficients import PRECISION_BITS

_HALF = 1 << (PRECISION_BITS - 1)


def resize_across(
    pixels: Tensor, start: Tensor, pitch: Tensor, height: Tensor, first: Tensor, weights: Tensor, rows: int
) -> Tensor:
    """Resample crops horizontally: [n, rows, size, 3] uint8.

    Args:
        pixels: [bytes] of all photos.
        start: [n], the byte where a crop begins.
        pitch: [n], bytes from one line of its photo to the next.
        height: [n], lines of a crop; what lies below is undefined.
        first, weights: of `coefficients`.
        rows: the largest height.
    """
    line = torch.arange(rows, device=pixels.device).minimum(height[:, None] - 1)  # [n, rows]
    base = (start[:, None] + line * pitch[:, None])[:, :, None] + 3 * first[:, None].long()  # [n, rows, size]
    channels = torch.arange(3, device=pixels.device)
    total = torch.full((*base.shape, 3), _HALF, dtype=torch.int32, device=pixels.device)
    for tap, weight in enumerate(weights):
        place = (base + 3 * tap).clamp_max(len(pixels) - 3)
        total += pixels[place[..., None] + channels].int() * weight[:, None, :, None]
    return (total >> PRECISION_BITS).clamp(0, 255).to(torch.uint8)


def resize_down(lines: Tensor, first: Tensor, weights: Tensor) -> Tensor:
    """Resample `lines` [n, rows, size, 3] vertically: [n, 3, size, size] uint8."""
    total = torch.full((len(lines), first.shape[1], *lines.shape[2:]), _HALF, dtype=torch.int32, device=lines.device)
    view = torch.arange(len(lines), device=lines.device)[:, None]
    for tap, weight in enumerate(weights):
        place = (first + tap).clamp_max(lines.shape[1] - 1).long()
        total += lines[view, place].int() * weight[:, :, None, None]
    return (total >> PRECISION_BITS).clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2).contiguous()
