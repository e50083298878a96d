"""Which classes a network confuses, and clusters of them for specialists (Hinton et al. 2015, section 5.1)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

STARTS = 20  # of k-means; the best one counts
SILENT = 1e-12  # variance of a class that is never answered


class Confused(NamedTuple):
    """Two classes, and how often photos of each are taken for the other."""

    classes: tuple[int, int]
    photos: tuple[int, int]  # of the first taken for the second, and of the second for the first
    correlation: float  # of their probabilities, over all photos


def correlation(probabilities: Tensor) -> Tensor:
    """Return the covariance [C, C] of the answers [n, C], divided by the standard deviations of both classes.

    Hinton et al. cluster the covariance. Scaling makes a rare class count as much as a frequent one. A class that is
    never answered correlates with none.
    """
    centred = probabilities.double() - probabilities.double().mean(0)
    covariance = centred.T @ centred / max(1, len(centred))
    spread = covariance.diagonal().sqrt()
    silent = spread**2 < SILENT
    scaled = covariance / torch.outer(spread, spread).clamp_min(SILENT)
    scaled[silent] = scaled[:, silent] = 0
    return scaled.fill_diagonal_(1)


def counts(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Return how many photos [C, C] of each class (row) are answered with each class (column)."""
    return torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, classes)


def most_confused(confusion: Tensor, correlations: Tensor, most: int) -> list[Confused]:
    """Return the pairs of classes with the most photos of one taken for the other, at most `most`.

    Args:
        confusion: of `counts`, [C, C].
        correlations: of `correlation`, [C, C]; they order pairs with as many photos.
        most: how many pairs.
    """
    both = confusion + confusion.T
    first, second = torch.triu_indices(len(both), len(both), offset=1)
    pairs = sorted(
        zip(first.tolist(), second.tolist(), strict=True),
        key=lambda pair: (-int(both[pair]), -float(correlations[pair]), pair),
    )
    return [
        Confused((a, b), (int(confusion[a, b]), int(confusion[b, a])), float(correlations[a, b]))
        for a, b in pairs[:most]
        if both[a, b]
    ]


def clusters(correlations: Tensor, count: int, seed: int = 0) -> list[list[int]]:
    """Divide classes into clusters of those that a network often takes for one another, by k-means.

    The points are the columns: two classes are near if they are likely together, and together with the same others.

    Args:
        correlations: of `correlation`, [C, C].
        count: of clusters, at most C.
        seed: of the starts.

    Returns:
        The classes of each, ascending; larger clusters first.
    """
    from sklearn.cluster import KMeans  # takes seconds to import

    found: Any = KMeans(count, n_init=STARTS, random_state=seed).fit_predict(correlations.numpy())
    groups = [np.flatnonzero(found == number).tolist() for number in range(count)]
    return sorted((group for group in groups if group), key=lambda group: (-len(group), group))


def share_within(confusion: Tensor, groups: list[list[int]]) -> float | None:
    """Return the share of all mistakes that stay within a cluster; None if there are no mistakes."""
    mistakes = confusion - torch.diag(confusion.diagonal())
    total = int(mistakes.sum())
    within = sum(int(mistakes[group][:, group].sum()) for group in groups)
    return within / total if total else None
