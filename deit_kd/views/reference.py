"""The executor's primitives in plain PyTorch: integers in, integers out, so the bits are the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from deit_kd.views.coefficients import PRECISION_BITS
from deit_kd.views.policy import FACTOR_BITS
from deit_kd.views.settings import COORDINATE_BITS

BYTES_A_VALUE = 32  # of temporary memory, for each value of a crop
WEIGHT_BITS = 20  # of the filters of affine operations
NOISE_BITS = 16
_HALF = 1 << (PRECISION_BITS - 1)


def resize_lines(
    pixels: Tensor, start: Tensor, step: Tensor, pitch: Tensor, shape: tuple[int, int], first: Tensor, weights: Tensor
) -> Tensor:
    """Resample crops along their lines: [n, lines, size, 3] uint8.

    Args:
        pixels: [bytes] of all photos.
        start: [n], the byte where a crop begins.
        step: [n], bytes from one pixel of a line to the next.
        pitch: [n], bytes from one line to the next.
        shape: the largest number of lines and the greatest length of one; what is outside a crop is undefined.
        first, weights: of `coefficients`.
    """
    lines, length = (torch.arange(count, device=pixels.device) for count in shape)
    place = torch.outer(step, length)[:, :, None] + torch.outer(pitch, lines)[:, None] + start[:, None, None]
    crops = pixels.unfold(0, 3, 1)[place.clamp_max_(len(pixels) - 3)]  # [n, length, lines, 3]
    return _resized(crops.flatten(2), first, weights, shape[1]).unflatten(2, (-1, 3)).transpose(1, 2).contiguous()


def resize_columns(lines: Tensor, first: Tensor, weights: Tensor, swapped: Tensor) -> Tensor:
    """Resample `lines` [n, lines, size, 3] across: [n, 3, size, size] uint8; `swapped` [n] if the lines are upright."""
    images = _resized(lines.flatten(2), first, weights, lines.shape[1]).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)
    return torch.where(swapped[:, None, None, None] > 0, images.mT, images).contiguous()


def _resized(values: Tensor, first: Tensor, weights: Tensor, length: int) -> Tensor:
    """Resample `values` [n, length, k] to [n, size, k] uint8."""
    place = (first + torch.arange(len(weights), device=first.device)[:, None, None]).clamp_max(length - 1)
    filters = torch.zeros((*first.shape, length), dtype=torch.float64, device=first.device)
    filters.scatter_add_(2, place.permute(1, 2, 0), weights.permute(1, 2, 0).double())
    total = filters @ values.double()  # integers below 2**53: exact in any order
    return ((total.int() + _HALF) >> PRECISION_BITS).clamp(0, 255).to(torch.uint8)


def affine(images: Tensor, where: Tensor, maps: Tensor, fill: Tensor) -> None:
    """Move what `images` [n, 3, size, size] show at `where` [m] by `maps` [m, 7], in place; `fill` [3] is outside."""
    size = images.shape[-1]
    place = torch.arange(size, device=images.device)
    a, b, c, d, e, f, bicubic = maps.T[..., None, None]
    x, y = a * place + b * place[:, None] + c, d * place + e * place[:, None] + f  # [m, size, size]
    edge = size << COORDINATE_BITS
    inside = (x >= 0) & (x < edge) & (y >= 0) & (y < edge)
    column, across = _taps(x, bicubic)
    row, down = _taps(y, bicubic)
    source = images[where].flatten(2)
    moved = torch.zeros((len(where), 3, size * size), dtype=torch.int64, device=images.device)
    for line, weight in enumerate(down):
        start = (row + line).clamp(0, size - 1) * size
        total = torch.zeros((len(where), 3, size * size), dtype=torch.int32, device=images.device)
        for tap, factor in enumerate(across):
            index = (start + (column + tap).clamp(0, size - 1)).flatten(1)[:, None].expand(-1, 3, -1)
            total += source.gather(2, index) * factor.int().flatten(1)[:, None]
        moved += total * weight.flatten(1)[:, None]
    moved = (moved >> (2 * WEIGHT_BITS)).clamp(0, 255).to(torch.uint8).view(-1, 3, size, size)
    images.index_copy_(0, where, torch.where(inside[:, None], moved, fill[:, None, None]))


def _taps(place: Tensor, bicubic: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the first of four pixels around `place` and their weights, which add up to 2**WEIGHT_BITS."""
    place = place - (1 << (COORDINATE_BITS - 1))
    one = 1 << WEIGHT_BITS
    d = (place >> (COORDINATE_BITS - WEIGHT_BITS)) & (one - 1)
    square, cube = d * d << WEIGHT_BITS, d * d * d
    linear = d << (2 * WEIGHT_BITS)
    half, shift = 1 << (2 * WEIGHT_BITS - 1), 2 * WEIGHT_BITS
    outer_left = torch.where(bicubic > 0, (2 * square - linear - cube + half) >> shift, 0)
    right = torch.where(bicubic > 0, (linear + square - cube + half) >> shift, d)
    outer_right = torch.where(bicubic > 0, (cube - square + half) >> shift, 0)
    return (place >> COORDINATE_BITS) - 1, (outer_left, one - outer_left - right - outer_right, right, outer_right)


def histograms(images: Tensor, where: Tensor) -> Tensor:
    """Return how often each level occurs in `images` [n, 3, size, size] at `where` [m]: [m, 3, 256] int32."""
    levels = images[where].flatten(2).long()
    counts = torch.zeros((len(where), 3, 256), dtype=torch.int32, device=images.device)
    return counts.scatter_add_(2, levels, torch.ones_like(levels, dtype=torch.int32))


def grey_sums(images: Tensor, where: Tensor) -> Tensor:
    """Return the sum of the grey levels of `images` [n, 3, size, size] at `where` [m]: [m] int32."""
    return _grey(images[where].int()).sum((1, 2), dtype=torch.int32)


def look_up(images: Tensor, where: Tensor, tables: Tensor) -> None:
    """Replace the levels of `images` at `where` [m] by those of `tables` [m, 3, 256], in place."""
    levels = images[where].flatten(2).long()
    images.index_copy_(0, where, tables.gather(2, levels).view(-1, *images.shape[1:]))


def saturate(images: Tensor, where: Tensor, factors: Tensor) -> None:
    """Blend `images` at `where` [m] with their grey, in place; `factors` [m] in 2**-FACTOR_BITS."""
    source = images[where].int()
    images.index_copy_(0, where, _blend(_grey(source)[:, None], source, factors))


def sharpen(images: Tensor, where: Tensor, factors: Tensor) -> None:
    """Blend `images` at `where` [m] with their 3 x 3 average, in place; `factors` [m] in 2**-FACTOR_BITS."""
    source = images[where].int()
    lines = source[..., :-2, :] + source[..., 1:-1, :] + source[..., 2:, :]
    smooth = source.clone()
    middle = smooth[..., 1:-1, 1:-1]
    sums = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * middle
    middle.copy_((2 * sums + 13) // 26)  # weights 1 and 5, of 13, rounded; the frame stays
    images.index_copy_(0, where, _blend(smooth, source, factors))


def blur(images: Tensor, where: Tensor, weights: Tensor) -> None:
    """Blur `images` at `where` [m] with three box filters in each direction, in place; `weights` [m, 5] in 2**-24."""
    source, size = images[where].long(), images.shape[-1]
    place = torch.arange(size, device=images.device) + torch.arange(-2, 3, device=images.device)[:, None]
    neighbours = place.clamp(0, size - 1)  # [5, size]
    for _ in range(2):  # across, then down: each turn transposes
        for _ in range(3):
            taken = source[..., neighbours] * weights[:, None, None, :, None]  # [m, 3, size, 5, size]
            source = (taken.sum(-2) + (1 << 23)) >> 24
        source = source.mT
    images.index_copy_(0, where, source.to(torch.uint8))


def normalise(images: Tensor, values: Tensor) -> Tensor:
    """Return the `values` [3, 256] of the levels of `images` [n, 3, size, size]."""
    channel = 256 * torch.arange(3, device=images.device)[:, None, None]
    return values.flatten()[images + channel]


def erase(views: Tensor, where: Tensor, boxes: Tensor, keys: Tensor, noise: Tensor) -> None:
    """Fill a box of each of `views` [n, 3, size, size] at `where` [m] with noise, in place.

    Args:
        views: normalised.
        where: which of them.
        boxes: [m, 4], top, left, height and width.
        keys: [m, 2], of the noise, 32 bits each.
        noise: [2**NOISE_BITS], equally likely values.
    """
    size = views.shape[-1]
    index = torch.arange(3 * size * size, device=views.device).view(3, size, size)
    low, high = keys.T[..., None, None, None]
    words = _scrambled(_scrambled(index ^ low) ^ high)
    erased = torch.where(inside(boxes, size), noise[words >> (32 - NOISE_BITS)], views[where])
    views.index_copy_(0, where, erased)


def inside(boxes: Tensor, size: int) -> Tensor:
    """Return which pixels are within `boxes` [n, 4] (top, left, height, width): [n, 1, size, size]."""
    top, left, height, width = boxes.T[..., None, None, None]
    column = torch.arange(size, device=boxes.device)
    line = column[:, None]
    return (line >= top) & (line < top + height) & (column >= left) & (column < left + width)


def _scrambled(word: Tensor) -> Tensor:
    # Wellons' 32-bit hash ``lowbias32``, in 64 bits, since torch lacks most of uint32.
    word = (word ^ (word >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    word = (word ^ (word >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return word ^ (word >> 16)


def _grey(source: Tensor) -> Tensor:
    # Pillow's luma (ITU-R 601-2).
    red, green, blue = source.unbind(1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _blend(other: Tensor, source: Tensor, factors: Tensor) -> Tensor:
    factor = factors.int()[:, None, None, None]
    return (((other << FACTOR_BITS) + factor * (source - other)) >> FACTOR_BITS).clamp(0, 255).to(torch.uint8)
