"""Predictors compared image by image: McNemar's test, disagreement, and accuracy by class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deit_kd.metrics.answered import is_right


def mcnemar(first_right: Tensor, second_right: Tensor) -> dict[str, float | int]:
    """Test whether two predictors are correct equally often on the same images (exact, two-sided).

    Args:
        first_right: [n], whether the first predictor is correct.
        second_right: [n], whether the second is.

    Returns:
        ``{"only_first", "only_second", "p"}``: images that only one gets right, and the p-value; 1 if there are none
        (McNemar 1947; the exact form is a sign test).
    """
    from scipy.stats import binomtest

    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    decided = only_first + only_second
    p = float(binomtest(only_first, decided).pvalue) if decided else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": p}


def disagreement_matrix(predictions: Mapping[str, Tensor]) -> dict[str, list]:
    """Return how often each pair of `predictions` differs (DeiT, arXiv 2012.12877, Table 4).

    Args:
        predictions: classes [n] by predictor, the truth among them, which may also be bool [n, C], see `likeliest`.

    Returns:
        ``{"names": [k], "matrix": [k][k]}``, fractions of the images.
    """
    names = list(predictions)
    matrix = [[float(_differ(predictions[a], predictions[b]).double().mean()) for b in names] for a in names]
    return {"names": names, "matrix": matrix}


def _differ(first: Tensor, second: Tensor) -> Tensor:
    if first.ndim == second.ndim:
        return (first != second).reshape(len(first), -1).any(-1)
    return ~is_right(*sorted((first, second), key=Tensor.dim))


def followed(predictions: Mapping[str, Tensor], labels: Tensor, teacher: Tensor) -> dict[str, dict[str, int]]:
    """Count how often each predictor follows the label or the teacher where the two disagree.

    Args:
        predictions: classes [n] by head.
        labels: [n].
        teacher: the teacher's classes [n].

    Returns:
        By head ``{"label", "teacher", "neither"}``, numbers of images.
    """
    disputed = labels != teacher
    counts = {}
    for name, predicted in predictions.items():
        label, taught = int((predicted == labels)[disputed].sum()), int((predicted == teacher)[disputed].sum())
        counts[name] = {"label": label, "teacher": taught, "neither": int(disputed.sum()) - label - taught}
    return counts


def class_accuracies(
    predictions: Mapping[str, Tensor], labels: Tensor, classes: int, truth: Tensor | None = None
) -> dict[str, list]:
    """Return ``support`` [C] and each predictor's accuracy in percent [C]; None for a class without images.

    `labels` say which class an image belongs to, and `truth`, if given, which answers are right, see `likeliest`.
    """
    truth = labels if truth is None else truth
    support = torch.bincount(labels, minlength=classes)
    columns: dict[str, list] = {"support": support.tolist()}
    for name, predicted in predictions.items():
        right = torch.bincount(labels[is_right(predicted, truth)], minlength=classes)
        columns[name] = [
            100 * hits / images if images else None
            for hits, images in zip(right.tolist(), columns["support"], strict=True)
        ]
    return columns
