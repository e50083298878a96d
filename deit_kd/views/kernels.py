"""The executor's primitives as Triton kernels: the arguments, the results and the bits of `reference`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_kd.views.coefficients import PRECISION_BITS
from deit_kd.views.policy import FACTOR_BITS
from deit_kd.views.reference import NOISE_BITS, WEIGHT_BITS
from deit_kd.views.settings import COORDINATE_BITS

BYTES_A_VALUE = 1  # of temporary memory, for each value of a crop
_BLOCK = 1024  # pixels of a program
_MOVED = 256  # likewise, of an affine operation: with more, an H100's registers do not suffice
_TILE = 32  # lines and columns of a program that resizes

# What kernels read of the module must be constexpr.
_PRECISION = tl.constexpr(PRECISION_BITS)
_HALF = tl.constexpr(1 << (PRECISION_BITS - 1))
_FACTOR = tl.constexpr(FACTOR_BITS)
_COORDINATE = tl.constexpr(COORDINATE_BITS)
_HALF_PIXEL = tl.constexpr(1 << (COORDINATE_BITS - 1))
_TO_WEIGHT = tl.constexpr(COORDINATE_BITS - WEIGHT_BITS)
_WEIGHT = tl.constexpr(WEIGHT_BITS)
_ONE = tl.constexpr(1 << WEIGHT_BITS)
_TWO_WEIGHTS = tl.constexpr(2 * WEIGHT_BITS)
_HALF_WEIGHT = tl.constexpr(1 << (2 * WEIGHT_BITS - 1))
_TO_NOISE = tl.constexpr(32 - NOISE_BITS)


def start() -> None:
    """Let Triton build what it launches kernels with.

    Raises:
        RuntimeError, OSError, CalledProcessError: it finds no GPU, no C compiler, or no headers of Python.
    """
    _ = triton.runtime.driver.active.utils


def resize_lines(
    pixels: Tensor, start: Tensor, step: Tensor, pitch: Tensor, shape: tuple[int, int], first: Tensor, weights: Tensor
) -> Tensor:
    """Resample crops along their lines: [n, lines, size, 3] uint8."""
    n, size = first.shape
    resized = torch.empty((n, shape[0], size, 3), dtype=torch.uint8, device=pixels.device)
    grid = (n, triton.cdiv(shape[0], _TILE), triton.cdiv(size, _TILE))
    numbers = len(pixels) - 3, shape[0], n, size, len(weights), _TILE
    _launch(_resize_lines, grid, pixels, start, step, pitch, first, weights, resized, *numbers)
    return resized


def resize_columns(lines: Tensor, first: Tensor, weights: Tensor, swapped: Tensor) -> Tensor:
    """Resample `lines` [n, lines, size, 3] across: [n, 3, size, size] uint8."""
    n, size = first.shape
    images = torch.empty((n, 3, size, size), dtype=torch.uint8, device=lines.device)
    grid = (n, triton.cdiv(size, _TILE), triton.cdiv(size, _TILE))
    _launch(_resize_columns, grid, lines, first, weights, swapped, images, lines.shape[1], n, size, len(weights), _TILE)
    return images


def affine(images: Tensor, where: Tensor, maps: Tensor, fill: Tensor) -> None:
    """Move what `images` show at `where` [m] by `maps` [m, 7], in place."""
    moved = images.new_empty((len(where), *images.shape[1:]))
    size = images.shape[-1]
    _launch(_affine, (len(where), triton.cdiv(size * size, _MOVED)), images, where, maps, fill, moved, size, _MOVED)
    images.index_copy_(0, where, moved)


def histograms(images: Tensor, where: Tensor) -> Tensor:
    """Return how often each level occurs in `images` at `where` [m]: [m, 3, 256] int32."""
    counts = torch.empty((len(where), 3, 256), dtype=torch.int32, device=images.device)
    _launch(_histograms, (len(where), 3), images, where, counts, images[0, 0].numel(), _BLOCK)
    return counts


def grey_sums(images: Tensor, where: Tensor) -> Tensor:
    """Return the sum of the grey levels of `images` at `where` [m]: [m] int32."""
    sums = torch.empty(len(where), dtype=torch.int32, device=images.device)
    _launch(_grey_sums, (len(where),), images, where, sums, images[0, 0].numel(), _BLOCK)
    return sums


def look_up(images: Tensor, where: Tensor, tables: Tensor) -> None:
    """Replace the levels of `images` at `where` [m] by those of `tables` [m, 3, 256], in place."""
    pixels = images[0, 0].numel()
    _launch(_look_up, (len(where), triton.cdiv(pixels, _BLOCK), 3), images, where, tables, pixels, _BLOCK)


def saturate(images: Tensor, where: Tensor, factors: Tensor) -> None:
    """Blend `images` at `where` [m] with their grey, in place."""
    pixels = images[0, 0].numel()
    _launch(_saturate, (len(where), triton.cdiv(pixels, _BLOCK)), images, where, factors, pixels, _BLOCK)


def sharpen(images: Tensor, where: Tensor, factors: Tensor) -> None:
    """Blend `images` at `where` [m] with their 3 x 3 average, in place."""
    sharp = images.new_empty((len(where), *images.shape[1:]))
    _launch(_sharpen, (*_grid(sharp), 3), images, where, factors, sharp, images.shape[-1], _BLOCK)
    images.index_copy_(0, where, sharp)


def blur(images: Tensor, where: Tensor, weights: Tensor) -> None:
    """Blur `images` at `where` [m] with three box filters in each direction, in place."""
    source = images[where]
    blurred = torch.empty_like(source)
    size = images.shape[-1]
    for down in (0, 0, 0, 1, 1, 1):
        _launch(_blur, (*_grid(source), 3), source, weights, blurred, size, down, _BLOCK)
        source, blurred = blurred, source
    images.index_copy_(0, where, source)


def normalise(images: Tensor, values: Tensor) -> Tensor:
    """Return the `values` [3, 256] of the levels of `images`."""
    normalised = torch.empty(images.shape, dtype=values.dtype, device=images.device)
    _launch(_normalise, (*_grid(images), 3), images, values, normalised, images[0, 0].numel(), _BLOCK)
    return normalised


def erase(views: Tensor, where: Tensor, boxes: Tensor, keys: Tensor, noise: Tensor) -> None:
    """Fill a box of each of `views` at `where` [m] with noise, in place."""
    size = views.shape[-1]
    grid = (len(where), triton.cdiv(size * size, _BLOCK), 3)
    _launch(_erase, grid, views, where, boxes, keys, noise, size, _BLOCK)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    kernel[grid](*arguments, enable_fp_fusion=False)  # where a kernel computes with floats, it rounds as PyTorch does


def _grid(images: Tensor) -> tuple[int, int]:
    return len(images), triton.cdiv(images[0, 0].numel(), _BLOCK)


@triton.jit
def _resize_lines(pixels, start, step, pitch, first, weights, resized, last, lines, n, size, taps, TILE: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    line = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(2) * TILE + tl.arange(0, TILE)
    is_column = column < size
    stride = tl.load(step + view)
    begin = tl.load(start + view) + tl.load(first + view * size + column, is_column, 0) * stride
    place = line[:, None] * tl.load(pitch + view) + begin[None, :]
    red = tl.full((TILE, TILE), _HALF, tl.int32)
    green = red
    blue = red
    for tap in range(taps):
        weight = tl.load(weights + (tap * n + view) * size + column, is_column, 0)[None, :]
        pixel = pixels + tl.minimum(place + tap * stride, last)
        red += tl.load(pixel).to(tl.int32) * weight
        green += tl.load(pixel + 1).to(tl.int32) * weight
        blue += tl.load(pixel + 2).to(tl.int32) * weight
    to = resized + ((view * lines + line[:, None]) * size + column[None, :]) * 3
    mask = (line < lines)[:, None] & is_column[None, :]
    tl.store(to, _level(red >> _PRECISION), mask)
    tl.store(to + 1, _level(green >> _PRECISION), mask)
    tl.store(to + 2, _level(blue >> _PRECISION), mask)


@triton.jit
def _resize_columns(lines, first, weights, swapped, images, count, n, size, taps, TILE: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(2) * TILE + tl.arange(0, TILE)
    is_row = row < size
    mask = is_row[:, None] & (column < size)[None, :]
    begin = tl.load(first + view * size + row, is_row, 0)
    red = tl.full((TILE, TILE), _HALF, tl.int32)
    green = red
    blue = red
    for tap in range(taps):
        weight = tl.load(weights + (tap * n + view) * size + row, is_row, 0)[:, None]
        line = view * count + tl.minimum(begin + tap, count - 1)
        pixel = lines + (line[:, None] * size + column[None, :]) * 3
        red += tl.load(pixel, mask, 0).to(tl.int32) * weight
        green += tl.load(pixel + 1, mask, 0).to(tl.int32) * weight
        blue += tl.load(pixel + 2, mask, 0).to(tl.int32) * weight
    upright = tl.load(swapped + view) > 0
    place = tl.where(upright, column[None, :] * size + row[:, None], row[:, None] * size + column[None, :])
    to = images + view * 3 * size * size + place
    tl.store(to, _level(red >> _PRECISION), mask)
    tl.store(to + size * size, _level(green >> _PRECISION), mask)
    tl.store(to + 2 * size * size, _level(blue >> _PRECISION), mask)


@triton.jit
def _affine(images, where, maps, fill, moved, size, BLOCK: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < size * size
    column = (pixel % size).to(tl.int64)
    row = (pixel // size).to(tl.int64)
    settings = maps + 7 * view
    x = tl.load(settings) * column + tl.load(settings + 1) * row + tl.load(settings + 2)
    y = tl.load(settings + 3) * column + tl.load(settings + 4) * row + tl.load(settings + 5)
    bicubic = tl.load(settings + 6) > 0
    edge = tl.full((), 1, tl.int64) * size << _COORDINATE
    inside = (x >= 0) & (x < edge) & (y >= 0) & (y < edge)
    left, a, b, c, d = _taps(x, bicubic)
    top, e, f, g, h = _taps(y, bicubic)
    source = images + tl.load(where + view) * 3 * size * size
    to = moved + view * 3 * size * size + pixel
    for channel in tl.static_range(3):
        plane = source + channel * size * size
        total = _line(plane, top, left, a, b, c, d, size, mask) * e
        total += _line(plane, top + 1, left, a, b, c, d, size, mask) * f
        total += _line(plane, top + 2, left, a, b, c, d, size, mask) * g
        total += _line(plane, top + 3, left, a, b, c, d, size, mask) * h
        level = tl.where(inside, _level(total >> _TWO_WEIGHTS), tl.load(fill + channel))
        tl.store(to + channel * size * size, level, mask)


@triton.jit
def _taps(place, bicubic):
    place = place - _HALF_PIXEL
    d = (place >> _TO_WEIGHT) & (_ONE - 1)
    square = d * d << _WEIGHT
    cube = d * d * d
    linear = d << _TWO_WEIGHTS
    outer_left = tl.where(bicubic, (2 * square - linear - cube + _HALF_WEIGHT) >> _TWO_WEIGHTS, 0)
    right = tl.where(bicubic, (linear + square - cube + _HALF_WEIGHT) >> _TWO_WEIGHTS, d)
    outer_right = tl.where(bicubic, (cube - square + _HALF_WEIGHT) >> _TWO_WEIGHTS, 0)
    return (place >> _COORDINATE) - 1, outer_left, _ONE - outer_left - right - outer_right, right, outer_right


@triton.jit
def _line(plane, row, column, a, b, c, d, size, mask):
    line = plane + _within(row, size) * size
    total = tl.load(line + _within(column, size), mask, 0) * a
    total += tl.load(line + _within(column + 1, size), mask, 0) * b
    total += tl.load(line + _within(column + 2, size), mask, 0) * c
    total += tl.load(line + _within(column + 3, size), mask, 0) * d
    return total


@triton.jit
def _within(place, size):
    return tl.minimum(tl.maximum(place, 0), size - 1)


@triton.jit
def _level(value):
    return tl.minimum(tl.maximum(value, 0), 255).to(tl.uint8)


@triton.jit
def _histograms(images, where, counts, pixels, BLOCK: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1)
    source = images + (tl.load(where + view) * 3 + channel) * pixels
    level = tl.arange(0, 256)
    total = tl.zeros((256,), tl.int32)
    for begin in range(0, pixels, BLOCK):
        pixel = begin + tl.arange(0, BLOCK)
        values = tl.load(source + pixel, pixel < pixels, 0).to(tl.int32)
        beyond = tl.maximum(begin + BLOCK - pixels, 0)  # read as 0
        total += tl.histogram(values, 256) - tl.where(level == 0, beyond, 0)
    tl.store(counts + (view * 3 + channel) * 256 + level, total)


@triton.jit
def _grey_sums(images, where, sums, pixels, BLOCK: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    source = images + tl.load(where + view) * 3 * pixels
    total = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, pixels, BLOCK):
        pixel = begin + tl.arange(0, BLOCK)
        mask = pixel < pixels
        grey = _grey(
            tl.load(source + pixel, mask, 0).to(tl.int32),
            tl.load(source + pixels + pixel, mask, 0).to(tl.int32),
            tl.load(source + 2 * pixels + pixel, mask, 0).to(tl.int32),
        )
        total += grey
    tl.store(sums + view, tl.sum(total, 0))


@triton.jit
def _grey(red, green, blue):
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


@triton.jit
def _look_up(images, where, tables, pixels, BLOCK: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(2)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < pixels
    source = images + (tl.load(where + view) * 3 + channel) * pixels + pixel
    level = tl.load(source, mask, 0).to(tl.int32)
    tl.store(source, tl.load(tables + (view * 3 + channel) * 256 + level, mask, 0), mask)


@triton.jit
def _saturate(images, where, factors, pixels, BLOCK: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < pixels
    factor = tl.load(factors + view).to(tl.int32)
    source = images + tl.load(where + view) * 3 * pixels + pixel
    red = tl.load(source, mask, 0).to(tl.int32)
    green = tl.load(source + pixels, mask, 0).to(tl.int32)
    blue = tl.load(source + 2 * pixels, mask, 0).to(tl.int32)
    grey = _grey(red, green, blue)
    tl.store(source, _blend(grey, red, factor), mask)
    tl.store(source + pixels, _blend(grey, green, factor), mask)
    tl.store(source + 2 * pixels, _blend(grey, blue, factor), mask)


@triton.jit
def _blend(other, source, factor):
    return _level(((other << _FACTOR) + factor * (source - other)) >> _FACTOR)


@triton.jit
def _sharpen(images, where, factors, sharp, size, BLOCK: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(2)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < size * size
    row = pixel // size
    column = pixel % size
    middle = (row > 0) & (row < size - 1) & (column > 0) & (column < size - 1) & mask
    centre = images + (tl.load(where + view) * 3 + channel) * size * size + pixel
    source = tl.load(centre, mask, 0).to(tl.int32)
    sums = 4 * source
    for down in tl.static_range(-1, 2):
        for across in tl.static_range(-1, 2):
            sums += tl.load(centre + down * size + across, middle, 0).to(tl.int32)
    smooth = tl.where(middle, (2 * sums + 13) // 26, source)
    factor = tl.load(factors + view).to(tl.int32)
    tl.store(sharp + (view * 3 + channel) * size * size + pixel, _blend(smooth, source, factor), mask)


@triton.jit
def _blur(source, weights, blurred, size, down, BLOCK: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    plane = (view * 3 + tl.program_id(2)) * size * size
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < size * size
    place = tl.where(down > 0, pixel // size, pixel % size)
    stride = tl.where(down > 0, size, 1)
    total = tl.full((BLOCK,), 1 << 23, tl.int64)
    for tap in tl.static_range(5):
        neighbour = pixel + (_within(place + tap - 2, size) - place) * stride
        total += tl.load(source + plane + neighbour, mask, 0) * tl.load(weights + 5 * view + tap)
    tl.store(blurred + plane + pixel, (total >> 24).to(tl.uint8), mask)


@triton.jit
def _normalise(images, values, normalised, pixels, BLOCK: tl.constexpr):
    channel = tl.program_id(2)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < pixels
    place = (tl.program_id(0).to(tl.int64) * 3 + channel) * pixels + pixel
    level = tl.load(images + place, mask, 0).to(tl.int32)
    tl.store(normalised + place, tl.load(values + channel * 256 + level, mask, 0), mask)


@triton.jit
def _erase(views, where, boxes, keys, noise, size, BLOCK: tl.constexpr):
    view = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(2)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = pixel // size - tl.load(boxes + 4 * view)
    column = pixel % size - tl.load(boxes + 4 * view + 1)
    height = tl.load(boxes + 4 * view + 2)
    width = tl.load(boxes + 4 * view + 3)
    mask = (line >= 0) & (line < height) & (column >= 0) & (column < width)
    index = (channel * size * size + pixel).to(tl.uint32)
    low = tl.load(keys + 2 * view).to(tl.uint32)
    high = tl.load(keys + 2 * view + 1).to(tl.uint32)
    word = _scrambled(_scrambled(index ^ low) ^ high) >> _TO_NOISE
    to = views + (tl.load(where + view) * 3 + channel) * size * size + pixel
    tl.store(to, tl.load(noise + word.to(tl.int32), mask, 0), mask)


@triton.jit
def _scrambled(word):
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)
