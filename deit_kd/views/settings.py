"""What operations need beyond their pixels, as integers: worked out on the host from the arguments of rows."""

from __future__ import annotations

import numpy as np

from deit_kd.views.policy import FACTOR_BITS, Operation

COORDINATE_BITS = 32  # of the fraction of a place in an image


def affine(operations: np.ndarray, arguments: np.ndarray, bicubic: np.ndarray, size: int) -> np.ndarray:
    """Return the map [m, 7] of each affine operation from a place of the view to the place that it shows.

    Pixel (x, y) shows ``(a x + b y + c, d x + e y + f)``; the columns are a to f, in units of 2**-COORDINATE_BITS, and
    whether the filter is bicubic. A pixel's place is its middle, as in Pillow.
    """
    maps = np.tile(np.eye(2, 3), (len(operations), 1, 1))  # [m, 2, 3]
    for operation, entry in _ENTRIES.items():
        chosen = operations == operation
        maps[chosen, entry[0], entry[1]] = arguments[chosen]
    turned = operations == Operation.ROTATE
    maps[turned] = _turns(arguments[turned], size / 2)
    maps[..., 2] += maps[..., :2].sum(-1) / 2
    return np.column_stack((np.rint(np.ldexp(maps.reshape(-1, 6), COORDINATE_BITS)), bicubic)).astype(np.int64)


_ENTRIES = {
    Operation.SHEAR_X: (0, 1),
    Operation.SHEAR_Y: (1, 0),
    Operation.TRANSLATE_X: (0, 2),
    Operation.TRANSLATE_Y: (1, 2),
}


def _turns(degrees: np.ndarray, middle: float) -> np.ndarray:
    angle = -np.radians(degrees)
    cosine, sine = np.cos(angle), np.sin(angle)
    shift_x, shift_y = middle - (cosine + sine) * middle, middle - (cosine - sine) * middle
    return np.stack((cosine, sine, shift_x, -sine, cosine, shift_y), 1).reshape(-1, 2, 3)


def factors(arguments: np.ndarray) -> np.ndarray:
    """Return factors of blends [m] in units of 2**-FACTOR_BITS."""
    return np.rint(np.ldexp(arguments, FACTOR_BITS)).astype(np.int64)


def integers(operations: np.ndarray, arguments: np.ndarray) -> np.ndarray:
    """Return the operations and their integer arguments [m, 2]; the factor of brightness is as in `factors`."""
    values = np.where(operations == Operation.BRIGHTNESS, factors(arguments), arguments)
    return np.column_stack((operations, values)).astype(np.int64)


def blurs(radius: np.ndarray) -> np.ndarray:
    """Return the weights [m, 5] of one of the box filters whose repetition is a Gaussian, in units of 2**-24.

    Pillow's in its single precision (Gwosdek et al. 2011); the box is at most five pixels wide, for radii up to 2.
    """
    one, variance = np.float32(1), np.float32(radius) * np.float32(radius) / np.float32(_PASSES)
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(np.float32)
    part = (2 * whole + one) * (whole * (whole + one) - 3 * variance) / (6 * (variance - (whole + one) ** 2))
    box = whole + part
    inner = (np.float32(1 << 24) / (box * 2 + one)).astype(np.int64)
    reach = box.astype(np.int64)
    outer = ((1 << 24) - (reach * 2 + 1) * inner) // 2
    distance = abs(np.arange(-2, 3))
    edge = np.where(distance == reach[:, None] + 1, outer[:, None], 0)
    return np.where(distance <= reach[:, None], inner[:, None], edge)


_PASSES = 3  # of Pillow's blur in each direction
