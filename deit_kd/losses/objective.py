"""The objective: the one cast to fp32, the one mean over the batch, the one place that weighs the terms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deit_kd.interfaces import InputError, StudentOutput, TeacherOutput, nearest
from deit_kd.losses.classification import soft_target_cross_entropy
from deit_kd.losses.hard import hard_distillation
from deit_kd.losses.soft import soft_distillation

DistillationLoss = Callable[[Tensor, Tensor], Tensor]

_BUILDERS: dict[str, Callable[[float], DistillationLoss]] = {
    "hard": lambda temperature: hard_distillation,
    "soft": lambda temperature: partial(soft_distillation, temperature=temperature),
}


class Terms(NamedTuple):
    """The loss of a batch and its two terms before weighing; scalars, in fp32."""

    loss: Tensor
    classification: Tensor
    distillation: Tensor


class CheckedTerms(NamedTuple):
    """The terms of a batch, and what in it was not finite; on its device, and nobody has waited for it yet."""

    terms: Terms
    is_finite: Tensor  # [B], whether both terms of a view are
    teacher_not_finite: Tensor  # how many of the teacher's B answers hold a logit that is not


def _mean(losses: Tensor) -> Tensor:
    return losses.mean() if len(losses) else losses.sum()  # a batch of which nothing can be read says nothing


class Objective:
    """``(1 - alpha) * classification(cls, targets) + alpha * distillation(dist, teacher)``.

    Args:
        kind: ``none`` (classification alone), ``soft`` or ``hard``.
        alpha: weight of the distillation term, 0 to 1.
        temperature: T of the soft term.
        scale: ``batchmean`` averages over the batch; ``numel`` divides by the classes too, as the
            published deit code does, which makes the soft term exactly C times smaller.

    Raises:
        InputError: `kind` or `scale` is unknown, `alpha` or `temperature` out of range.
    """

    def __init__(
        self, kind: str = "hard", alpha: float = 0.5, temperature: float = 3.0, scale: str = "batchmean"
    ) -> None:
        if kind != "none" and kind not in _BUILDERS:
            known = ["none", *_BUILDERS]
            raise InputError(f"distill.kind: {kind!r} is unknown; use one of {', '.join(known)}{nearest(kind, known)}")
        if not 0 <= alpha <= 1:
            raise InputError(f"distill.alpha: {alpha} is not between 0 and 1")
        if not temperature > 0:
            raise InputError(f"distill.temperature: {temperature} is not above 0")
        if scale not in ("batchmean", "numel"):
            raise InputError(f"distill.scale: {scale!r} is unknown; use batchmean or numel")
        self.kind = kind
        self.alpha = alpha
        self.scale = scale
        self._distillation = None if kind == "none" else _BUILDERS[kind](temperature)

    @property
    def needs_teacher(self) -> bool:
        """Whether there is a distillation term at all."""
        return self._distillation is not None

    def __call__(self, student: StudentOutput, teacher: TeacherOutput | None, targets: Tensor) -> Terms:
        """Return the mean loss and terms of one batch; zeros where it is empty. See `checked`."""
        return self.checked(student, teacher, targets).terms

    def checked(self, student: StudentOutput, teacher: TeacherOutput | None, targets: Tensor) -> CheckedTerms:
        """Return the mean loss and terms of one batch, zeros where it is empty, and what was not finite.

        Args:
            student: logits of any float type, [B, C] each.
            teacher: logits for the same views, [B, C]; None only with kind ``none``.
            targets: [B, C].

        Raises:
            InputError: the student has no distillation head, or there is no teacher, and the kind needs one.
        """
        with torch.autocast(student.cls_logits.device.type, enabled=False):
            classification = soft_target_cross_entropy(student.cls_logits.float(), targets.float())
            if self._distillation is None:
                loss = _mean(classification)
                nothing = torch.zeros_like(loss)
                return CheckedTerms(Terms(loss, loss, nothing), classification.detach().isfinite(), nothing)
            if student.dist_logits is None:
                raise InputError(f"distill.kind {self.kind!r} needs a student with a distillation token")
            if teacher is None:
                raise InputError(f"distill.kind {self.kind!r} needs a teacher")
            taught = teacher.logits.float()
            distillation = self._distillation(student.dist_logits.float(), taught)
            is_finite = (classification + distillation).detach().isfinite()
            teacher_not_finite = (~taught.isfinite().all(-1)).float().sum()
            classification, distillation = _mean(classification), _mean(distillation)
            if self.scale == "numel":
                distillation = distillation / targets.shape[-1]
            loss = (1 - self.alpha) * classification + self.alpha * distillation
            return CheckedTerms(Terms(loss, classification, distillation), is_finite, teacher_not_finite)
