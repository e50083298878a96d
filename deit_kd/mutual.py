"""Peers: students that learn together, each from the labels and the others' answers (Zhang et al., 1706.00384)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deit_kd.engine import Distiller
from deit_kd.interfaces import Batch, StudentOutput, head_log_probabilities, speaker
from deit_kd.losses import CheckedTerms


class MutualDistiller(Distiller):
    """A student and its peers, which also teach one another; a teacher, if there is one, is asked once for all.

    Each has an objective of its own, whose term ``peers`` compares its distillation head, or its only head, with the
    mean of the others' probabilities.

    Args:
        own: the student's; its teacher is that of all.
        peers: each with its network and its objective; their teachers are not asked.
        fusion: of two heads that teach, see `head_log_probabilities`.
    """

    def __init__(self, own: Distiller, peers: Sequence[Distiller], fusion: str = "softmax") -> None:
        super().__init__(own.student, own.teacher, own.objective, own.precision, own.compiled)
        self._peers = peers
        self._fusion = fusion

    @property
    def members(self) -> Sequence[Distiller]:
        """Itself, and then the distillers of the student's peers."""
        return (self, *self._peers)

    def everyone(
        self, batch: Batch, place: float = 0.0, seed: Callable[[int], None] = lambda peer: None
    ) -> tuple[CheckedTerms, ...]:
        """Return what `checked` does, for the student and then each of its peers; see `Distiller.everyone`."""
        teacher_output = self.teacher(batch) if self.teacher is not None else None
        outputs = []
        for number, member in enumerate(self.members):
            if number:  # the student draws as it does without peers
                seed(number)
            outputs.append(member.answer(batch))
        answers = [spoken(output, self._fusion) for output in outputs]
        return tuple(
            member.judge(
                _with_a_head_to_learn(output), teacher_output, batch.targets, place, mean_of_others(answers, number)
            )
            for number, (member, output) in enumerate(zip(self.members, outputs, strict=True))
        )


@torch.no_grad()
def spoken(output: StudentOutput, fusion: str) -> Tensor:
    """Return the log-probabilities [B, C] that a student teaches with: its heads fused, or its only head; in fp32."""
    with torch.autocast(output.cls_logits.device.type, enabled=False):
        heads = head_log_probabilities(output, fusion)
    return heads[speaker(heads)]


def mean_of_others(log_probabilities: Sequence[Tensor], own: int) -> Tensor:
    """Return the logarithm [B, C] of the mean of all probabilities but those at index `own`."""
    others = [*log_probabilities[:own], *log_probabilities[own + 1 :]]
    return others[0] if len(others) == 1 else torch.stack(others).logsumexp(0) - math.log(len(others))


def _with_a_head_to_learn(output: StudentOutput) -> StudentOutput:
    """Return the output of a student; its only head also learns what a distillation head would."""
    return output if output.dist_logits is not None else output._replace(dist_logits=output.cls_logits)
