"""The spread of a mean over images: the percentile bootstrap (Efron 1979)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deit_kd.randomness import generator

DRAWS = 1000


def bootstrap_means(values: Tensor, seed: int, draws: int = DRAWS) -> Tensor:
    """Return the mean of each column over images drawn with replacement, the same images for every column.

    Args:
        values: [n, k], one row an image, one column a quantity.
        seed: of the draws.
        draws: how many.

    Returns:
        [draws, k], float64.
    """
    images = len(values)
    values = values.double()
    means = []
    for draw in range(draws):
        drawn = generator("bootstrap", seed, draw).integers(images, size=images)
        counts = torch.from_numpy(np.bincount(drawn, minlength=images)).double()
        means.append(counts @ values / images)
    return torch.stack(means)


def interval(means: Tensor) -> list[float]:
    """Return the bounds of the middle 95 % of bootstrap means [draws]."""
    return torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
