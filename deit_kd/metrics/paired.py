"""What a change of a student costs each of its heads, photo by photo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deit_kd.interfaces import StudentOutput, head_log_probabilities
from deit_kd.metrics.answered import Answered, answered
from deit_kd.metrics.comparison import mcnemar
from deit_kd.metrics.heads import per_image
from deit_kd.metrics.intervals import bootstrap_means, interval


def compare_heads(
    before: StudentOutput, after: StudentOutput, labels: Tensor, fusion: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Return, by head, its scores before and after, and the differences with their 95 % intervals over the photos.

    Args:
        before: logits [n, C] of each head.
        after: the same for the same photos.
        labels: [n].
        fusion: ``softmax`` or ``logits``.
        seed: of the bootstrap.

    Returns:
        By head JSON: ``before`` and ``after`` (``top1`` and ``top5`` in percent, ``nll``), ``difference`` and
        ``intervals`` (``top1`` in points, ``nll``; after less before), and McNemar's ``only_before``, ``only_after``,
        ``p``.
    """
    both = [head_log_probabilities(output, fusion) for output in (before, after)]
    return {head: _compared(both[0][head], both[1][head], labels, seed) for head in both[0]}


def _compared(before: Tensor, after: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    rows = [answered(values, labels) for values in (before, after)]
    scores = [_score(values, one) for values, one in zip((before, after), rows, strict=True)]
    first, second = (per_image(values, one) for values, one in zip((before, after), rows, strict=True))
    differences = torch.stack([second[name] - first[name] for name in ("top1", "nll")], dim=1)
    means = bootstrap_means(differences, seed)
    decided = mcnemar(rows[0].top1, rows[1].top1)
    return {
        "before": scores[0],
        "after": scores[1],
        "difference": {"top1": float(differences[:, 0].mean()), "nll": float(differences[:, 1].mean())},
        "intervals": {"top1": interval(means[:, 0]), "nll": interval(means[:, 1])},
        "only_before": decided["only_first"],
        "only_after": decided["only_second"],
        "p": decided["p"],
    }


def _score(log_probabilities: Tensor, rows: Answered) -> dict[str, float | None]:
    means = {name: float(values.mean()) for name, values in per_image(log_probabilities, rows).items()}
    return {"top1": means["top1"], "top5": means.get("top5"), "nll": means["nll"]}
