"""Pillow's resampling coefficients for many crops at once: antialiased, in fixed point, in a fixed order of taps."""

from __future__ import annotations

from math import ceil

import numpy as np
import torch
from torch import Tensor

PRECISION_BITS = 22  # of Pillow: 32 bits without those of a pixel and two for sums beyond 0 and 255
_SUPPORTS = (1.0, 2.0)  # of bilinear and bicubic


def taps(length: int, size: int, bicubic: np.ndarray) -> int:
    """Return the most pixels that filters read which bring up to `length` pixels to `size`; `bicubic` is of each."""
    return 2 * ceil(_SUPPORTS[bool(bicubic.any())] * max(1.0, length / size)) + 1


def coefficients(length: Tensor, bicubic: Tensor, mirrored: Tensor, size: int, taps: int) -> tuple[Tensor, Tensor]:
    """Return the first pixel [n, size] and the weights [taps, n, size] that bring `length` [n] pixels to `size`.

    `bicubic` and `mirrored` [n] say whether a filter is bicubic, not bilinear, and whether its output is reversed; the
    results are int32 on their device. A weight is in units of 2**-PRECISION_BITS; those beyond the filter
    or the crop are 0. Each weight takes the steps of Pillow's in its order, so that it does not depend on `taps`.
    """
    bicubic, mirrored, length = bicubic[:, None] > 0, mirrored[:, None] > 0, length.double()[:, None]
    scale = length / torch.full_like(length, size)  # CUDA multiplies by the reciprocal of a number
    spread = scale.clamp_min(1.0)
    support = torch.where(bicubic, _SUPPORTS[1], _SUPPORTS[0]).double() * spread
    place = torch.arange(size, device=length.device)
    centre = torch.where(mirrored, size - 1 - place, place) + 0.5
    centre = centre * scale
    first = (centre - support + 0.5).trunc().clamp_min(0)
    count = (centre + support + 0.5).trunc().minimum(length) - first
    inverse = 1.0 / spread
    raw, total = [], torch.zeros_like(centre)
    for tap in range(taps):
        distance = ((tap + first - centre + 0.5) * inverse).abs()
        weight = torch.where(bicubic, _cubic(distance), (1.0 - distance).clamp_min(0))
        weight = torch.where(tap < count, weight, 0.0)
        total = total + weight
        raw.append(weight)
    weights = torch.stack(raw) / total * (1 << PRECISION_BITS)
    return first.int(), (weights + torch.where(weights < 0, -0.5, 0.5)).int()


def _cubic(distance: Tensor) -> Tensor:
    # Keys 1981 with a = -0.5.
    near = ((1.5 * distance - 2.5) * distance) * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
