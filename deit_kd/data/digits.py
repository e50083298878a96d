"""scikit-learn's handwritten digits: 1,797 real scans that need no download."""

from __future__ import annotations

from typing import Any

import numpy as np

from deit_kd.data.photos import Photos, Splits, split_by_hash


def digits(*, validation_fraction: float, **_: Any) -> Splits:
    """Return the digits, 8 x 8 pixels, with `validation_fraction` of each class held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    photos = Photos.of_arrays(
        names=[f"{label}/{index:04d}" for index, label in enumerate(bunch.target)],
        labels=[int(label) for label in bunch.target],
        classes=tuple(str(digit) for digit in range(10)),
        arrays=np.repeat(grey[..., None], 3, axis=-1),
    )
    return split_by_hash(photos, validation_fraction)
