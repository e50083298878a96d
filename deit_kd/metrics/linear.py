"""How good frozen features are: k-NN and a linear probe, from labelled images to others."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from deit_kd.metrics.intervals import bootstrap_means, interval
from deit_kd.metrics.neighbours import how_asked, neighbour_classes
from deit_kd.randomness import generator

STRENGTHS = tuple(10.0**power for power in range(-4, 2))  # of the linear probe: scikit-learn's C
PARTS = 3  # of the training images, to choose the strength


def linear_classes(known: Tensor, labels: Tensor, asked: Tensor, seed: int) -> tuple[Tensor, float]:
    """Return the class [n] that a linear probe gives to each vector, and its strength C.

    The probe is a logistic regression on standardised features; C is the smallest of the values that score best in
    threefold cross-validation over the known vectors.

    Args:
        known: vectors [N, D].
        labels: their classes [N].
        asked: vectors [n, D].
        seed: of the parts of cross-validation.
    """
    features, classes = known.double().numpy(), labels.numpy()
    parts = StratifiedKFold(PARTS, shuffle=True, random_state=int(generator("probe", seed).integers(2**32)))

    def accuracy(strength: float) -> float:
        return float(cross_val_score(_probe(strength), features, classes, cv=parts).mean())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the largest C lose without converging
        warnings.filterwarnings("ignore", message="The least populated class")  # a part may lack a class
        enough = np.bincount(classes).max() >= PARTS
        strength = max(STRENGTHS, key=accuracy) if enough else STRENGTHS[len(STRENGTHS) // 2]
        probe = _probe(strength).fit(features, classes)
    return torch.from_numpy(probe.predict(asked.double().numpy())), strength


def _probe(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))


def judge_features(known: Tensor, known_labels: Tensor, asked: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    """Return the scores of k-NN and of a linear probe from known vectors to others.

    Args:
        known: vectors [N, D].
        known_labels: their classes [N].
        asked: vectors [n, D].
        labels: their classes [n].
        seed: of the bootstrap and of the probe.

    Returns:
        JSON: ``knn`` (with ``neighbours`` and ``temperature``) and ``linear`` (with its ``C``), each with ``top1`` in
        percent and its 95 % ``intervals``.
    """
    linear, strength = linear_classes(known, known_labels, asked, seed)
    nearest = neighbour_classes(known, known_labels, asked)
    return {
        "knn": {**_score(nearest, labels, seed), **how_asked(len(known))},
        "linear": {**_score(linear, labels, seed), "C": strength},
    }


def _score(predictions: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    right = 100.0 * (predictions == labels).double()
    return {"top1": float(right.mean()), "intervals": {"top1": interval(bootstrap_means(right[:, None], seed)[:, 0])}}
