"""Whether a head's probabilities are calibrated (Guo et al. 2017, arXiv 1706.04599), and what would correct them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deit_kd.interfaces import StudentOutput
from deit_kd.metrics.answered import likeliest

BINS = 15


def expected_calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean gap between confidence and accuracy over 15 equal bins (ECE), 0 to 1.

    Args:
        probabilities: [n, C].
        labels: [n].
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    classes = probabilities.shape[-1]
    below_one = probabilities.clamp_max(1 - 2**-24)  # torchmetrics puts a confidence of 1 into a separate bin
    return float(multiclass_calibration_error(below_one, labels, classes, n_bins=BINS, norm="l1"))


def _bin_of(confidence: Tensor) -> Tensor:
    # The bins of torchmetrics: closed on the left, the last one on both sides.
    edges = torch.linspace(0, 1, BINS + 1, dtype=confidence.dtype)
    return (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, BINS - 1)


def calibration_gaps(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return confidence minus correctness (0 or 1) of each image, in the column of its bin: [n, 15].

    The sum of the absolute column means is the expected calibration error.
    """
    confidence, best = probabilities.max(-1)
    gaps = torch.zeros(len(labels), BINS, dtype=torch.float64)
    return gaps.scatter_(1, _bin_of(confidence)[:, None], (confidence.double() - (best == labels).double())[:, None])


def reliability(probabilities: Tensor, labels: Tensor) -> list[dict[str, float | int | None]]:
    """Return ``{"from", "to", "n", "confidence", "accuracy"}`` of each of the 15 bins; None where a bin is empty."""
    confidence, best = probabilities.max(-1)
    hits, bins = (best == labels).double(), _bin_of(confidence)
    rows: list[dict[str, float | int | None]] = []
    for index in range(BINS):
        members = bins == index
        n = int(members.sum())
        rows.append(
            {
                "from": index / BINS,
                "to": (index + 1) / BINS,
                "n": n,
                "confidence": float(confidence[members].double().mean()) if n else None,
                "accuracy": float(hits[members].mean()) if n else None,
            }
        )
    return rows


def _mean_nll(log_probabilities: Tensor, labels: Tensor) -> float:
    own = likeliest(labels, log_probabilities)
    return float(-log_probabilities.gather(1, own[:, None]).double().mean())


def scale_temperature(log_probabilities: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities [n, C] of the same logits over `temperature`."""
    return (log_probabilities / temperature).log_softmax(-1)


def fit_temperature(log_probabilities: Tensor, labels: Tensor) -> float:
    """Return the temperature, 0.05 to 20, that gives the smallest NLL.

    Args:
        log_probabilities: [n, C]; they differ from logits by a constant, which softmax ignores, so this also works for
            a mean of two softmaxes.
        labels: [n].
    """
    from scipy.optimize import minimize_scalar

    found: Any = minimize_scalar(
        lambda log_temperature: _mean_nll(scale_temperature(log_probabilities, float(np.exp(log_temperature))), labels),
        bounds=(np.log(0.05), np.log(20)),
        method="bounded",
        options={"xatol": 1e-3},
    )
    return float(np.exp(found.x))


def fit_fusion_weight(output: StudentOutput, labels: Tensor, weigh: Callable[[StudentOutput, float], Tensor]) -> float:
    """Return the weight of the class head, in hundredths from 0 to 1, that gives the smallest NLL.

    Args:
        output: logits [n, C] of the heads.
        labels: [n], or bool [n, C], see `likeliest`.
        weigh: gives the fused log-probabilities [n, C] for a weight.
    """
    weights = [hundredths / 100 for hundredths in range(101)]
    return min(weights, key=lambda weight: _mean_nll(weigh(output, weight), labels))
