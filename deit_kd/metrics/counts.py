"""Exact scores of each head while a run trains, counted on the device and summed over processes once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from deit_kd.distributed import Processes


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes [B] stand before the label's in `scores` [B, C]; 0 is a right answer.

    Of classes with the same probability the first stands first, as in ``argmax``; ``topk`` leaves that open, and
    logits in bf16 do tie.
    """
    chosen = scores.gather(1, labels[:, None])
    larger = ~(scores <= chosen)  # what is not a number stands before everything
    before = torch.arange(scores.shape[1], device=labels.device) < labels[:, None]
    return (larger | ((scores == chosen) & before)).sum(1)


@dataclass
class Score:
    """Counts of right answers and the summed negative log-likelihood of one head."""

    classes: int
    sums: Tensor | None = None  # [3], float64: top-1 count, top-5 count, summed NLL

    def add(self, log_probabilities: Tensor, labels: Tensor) -> Tensor:
        """Count one batch of log-probabilities [B, C]; return the predictions [B]."""
        rank = ranks(log_probabilities, labels)
        chosen = log_probabilities.gather(1, labels[:, None]).double()
        batch = torch.stack([(rank < 1).sum().double(), (rank < 5).sum().double(), -chosen.sum()])
        self.sums = batch if self.sums is None else self.sums + batch
        return log_probabilities.argmax(-1)

    def result(self, total: int, processes: Processes) -> dict[str, float | None]:
        """Return ``top1`` and ``top5`` in percent and ``nll`` in nats, over all processes."""
        sums = torch.zeros(3, dtype=torch.float64, device=processes.device) if self.sums is None else self.sums.clone()
        top1, top5, nll = processes.sum(sums).tolist()
        return {
            "top1": 100 * top1 / total,
            "top5": 100 * top5 / total if self.classes > 5 else None,
            "nll": nll / total,
        }


@dataclass
class Agreement:
    """How often pairs of predictors gave the same class."""

    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, predictions: dict[str, Tensor]) -> None:
        """Count one batch; `predictions` [B] of ``cls``, ``dist`` and ``teacher``, those there are."""
        for first, second in (("cls", "teacher"), ("dist", "teacher"), ("cls", "dist")):
            if first in predictions and second in predictions:
                same = (predictions[first] == predictions[second]).sum()
                name = f"{first}_{second}"
                self.counts[name] = self.counts.get(name, torch.zeros_like(same)) + same

    def result(self, total: int, processes: Processes) -> dict[str, float | None]:
        """Return each agreement as a fraction, over all processes; None where a predictor is missing."""
        result: dict[str, float | None] = {}
        for name in ("cls_teacher", "dist_teacher", "cls_dist"):
            count = self.counts.get(name)
            result[name] = None if count is None else int(processes.sum(count.clone())) / total
        return result
