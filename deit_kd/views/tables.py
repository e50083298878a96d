"""Operations that map each level of a channel to another, as tables [m, 3, 256] made from integers on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from deit_kd.views.policy import FACTOR_BITS, Operation


def fixed(operations: Tensor, arguments: Tensor) -> Tensor:
    """Return the tables of operations [m] that only depend on their arguments [m] (int64)."""
    level = torch.arange(256, device=operations.device)
    argument = arguments[:, None]
    made = {
        Operation.INVERT: 255 - level,
        Operation.POSTERIZE: level & (256 - (1 << (8 - argument.clamp(0, 8)))),
        Operation.SOLARIZE: torch.where(level < argument, level, 255 - level),
        Operation.SOLARIZE_ADD: torch.where(level < 128, level + argument, level),
        Operation.BRIGHTNESS: level * argument >> FACTOR_BITS,
    }
    tables = level.expand(len(operations), 256)
    for operation, table in made.items():
        tables = torch.where((operations == operation)[:, None], table, tables)
    return _for_all_channels(tables)


def contrast(factors: Tensor, grey_sums: Tensor, pixels: int) -> Tensor:
    """Return the tables that blend with the mean grey; `factors` [m] in 2**-FACTOR_BITS, sums over `pixels` [m]."""
    mean = ((2 * grey_sums.long() + pixels) // (2 * pixels))[:, None]
    level = torch.arange(256, device=factors.device)
    return _for_all_channels(((mean << FACTOR_BITS) + factors[:, None] * (level - mean)) >> FACTOR_BITS)


def auto_contrast(histograms: Tensor) -> Tensor:
    """Return the tables that stretch each channel over all levels; `histograms` [m, 3, 256]."""
    level = torch.arange(256, device=histograms.device)
    seen = histograms > 0
    low = torch.where(seen, level, 255).amin(-1, keepdim=True)
    high = torch.where(seen, level, 0).amax(-1, keepdim=True)
    span = (high - low).clamp_min(1).double()  # in Pillow's double precision
    scale = torch.full_like(span, 255.0) / span  # a number divided by a tensor is its reciprocal, rounded once more
    stretched = (level * scale + -low * scale).long().clamp(0, 255)
    return torch.where(high > low, stretched, level).to(torch.uint8)


def equalize(histograms: Tensor) -> Tensor:
    """Return the tables that spread each channel's pixels evenly over all levels; `histograms` [m, 3, 256]."""
    level = torch.arange(256, device=histograms.device)
    counts = histograms.long()
    last = torch.where(counts > 0, level, 0).amax(-1, keepdim=True)
    step = (counts.sum(-1, keepdim=True) - counts.gather(-1, last)) // 255
    before = counts.cumsum(-1) - counts
    spread = ((step // 2 + before) // step.clamp_min(1)).clamp(0, 255)
    return torch.where(step > 0, spread, level).to(torch.uint8)


def _for_all_channels(tables: Tensor) -> Tensor:
    return tables.clamp(0, 255).to(torch.uint8)[:, None].expand(-1, 3, -1).contiguous()
