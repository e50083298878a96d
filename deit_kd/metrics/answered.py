"""One row for each image that a head answered, and the exact scores from them, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from deit_kd.distributed import Processes
from deit_kd.interfaces import HEADS, reported


class Answered(NamedTuple):
    """One head's answers to images, a row each."""

    predicted: Tensor  # [n], its classes
    rank: Tensor  # [n], how many classes it ranks before the label's; 0 is a correct answer
    nll: Tensor  # [n], of the label in nats, float64

    @property
    def top1(self) -> Tensor:
        """Whether each answer is correct [n]."""
        return self.rank < 1

    @property
    def top5(self) -> Tensor:
        """Whether the label is among the first five [n]."""
        return self.rank < 5


def answered(log_probabilities: Tensor, labels: Tensor) -> Answered:
    """Return the rows of a head's log-probabilities [n, C]; `labels` are [n]."""
    nll = -log_probabilities.gather(1, labels[:, None])[:, 0].double()
    return Answered(log_probabilities.argmax(-1), ranks(log_probabilities, labels), nll)


def is_right(predicted: Tensor, truth: Tensor) -> Tensor:
    """Return whether each of the predicted classes [n] is right; `truth` is as for `likeliest`."""
    return predicted == truth if truth.ndim == 1 else truth.gather(1, predicted[:, None])[:, 0]


def likeliest(truth: Tensor, scores: Tensor) -> Tensor:
    """Return the label [n] that counts: the right class with the largest score.

    So an answer is correct among the first k if any right class is, as in timm's ``RealLabelsImagenet``.

    Args:
        truth: labels [n]; or bool [n, C], where several classes may be right, and one at least is.
        scores: [n, C].
    """
    return truth if truth.ndim == 1 else scores.masked_fill(~truth, float("-inf")).argmax(-1)


def joined(rows: Iterable[Answered]) -> Answered:
    """Return the rows of several batches as one."""
    return Answered(*(torch.cat(column) for column in zip(*rows, strict=True)))


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes [B] rank before the label's in `scores` [B, C]; 0 is a correct answer.

    Among classes with the same probability the first one ranks first, as in ``argmax``; ``topk`` does not define that,
    and logits in bf16 do tie.
    """
    chosen = scores.gather(1, labels[:, None])
    larger = ~(scores <= chosen)  # NaN ranks before everything
    before = torch.arange(scores.shape[1], device=labels.device) < labels[:, None]
    return (larger | ((scores == chosen) & before)).sum(1)


def score(rows: Answered, classes: int, total: int, processes: Processes) -> dict[str, float | None]:
    """Return ``top1`` and ``top5`` in percent and ``nll`` in nats over the rows of all processes.

    Args:
        rows: this process's.
        classes: C; there is no ``top5`` of five classes or fewer.
        total: rows of all processes.
        processes: that share the images.
    """
    sums = torch.stack([rows.top1.sum().double(), rows.top5.sum().double(), rows.nll.sum()])
    top1, top5, nll = processes.sum(sums).tolist()
    return {"top1": 100 * top1 / total, "top5": 100 * top5 / total if classes > 5 else None, "nll": nll / total}


def agreement(predictions: Mapping[str, Tensor], total: int, processes: Processes) -> dict[str, float | None]:
    """Return the share of all processes' images for which two predictors agree; None if one is missing.

    Args:
        predictions: this process's classes [n] of the student's heads and of ``teacher``, those that exist.
        total: images of all processes.
        processes: that share the images.
    """
    shares: dict[str, float | None] = {}
    heads = [name for name in reported(predictions) if name in HEADS]
    for first, second in (*((head, "teacher") for head in heads), *combinations(heads, 2)):
        both = first in predictions and second in predictions
        same = (predictions[first] == predictions[second]).sum() if both else None
        shares[f"{first}_{second}"] = None if same is None else int(processes.sum(same)) / total
    return shares
