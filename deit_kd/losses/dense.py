"""Dense logits: a CNN's answer at every place teaches the patch tokens (CSKD, Zhao et al., ICCV 2023, 2307.08500)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from deit_kd.interfaces import SOFT_TEMPERATURE, InputError, TeacherOutput
from deit_kd.losses.soft import soft_distillation
from deit_kd.losses.terms import check_temperature
from deit_kd.schedules import Schedule

MODES = ("hard", "soft")
FALLING = Schedule(1.0, 0.0, shape="linear")  # the paper's


@dataclass(frozen=True)
class DenseTerm:
    """A comparison of the student's answer at each place with the teacher's answer there, mixed with its global one.

    The target of a place is ``mix * dense + (1 - mix) * logits``: its argmax (``hard``), or its softmax (``soft``).
    Early in a run each place learns what the CNN sees there, and at its end what it says of the whole image.

    The published code sums the soft loss over places; here both are means, so a weight says the same for any grid.

    Args:
        weight: by the place in the run.
        mode: ``hard`` or ``soft``.
        mix: share of the dense logits, 0 to 1, by the place in the run.
        temperature: of ``soft``, by the place in the run; None is 3.
    """

    weight: Schedule
    mode: str = "hard"
    mix: Schedule = FALLING
    temperature: Schedule | None = None
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"distill.terms: mode {self.mode!r} of dense is unknown; use {' or '.join(MODES)}")
        if not 0 <= min(self.mix.values) <= max(self.mix.values) <= 1:
            raise InputError(f"distill.terms: mix {self.mix.values} of dense is not between 0 and 1")
        check_temperature(self.temperature)

    def per_example(self, dense_logits: Tensor, teacher: TeacherOutput, place: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the loss [B] in fp32, mean over places, and whether the teacher's answer is finite: else 0.

        Args:
            dense_logits: [B, h, w, C], the student's on the teacher's grid.
            teacher: its dense logits and its logits; or, for ``hard``, its dense labels.
            place: share of the run that is done.

        Raises:
            InputError: the teacher has no answer for each place.
        """
        student = dense_logits.float()
        if self.mode == "hard" and teacher.dense_labels is not None:
            return _hard(student, teacher.dense_labels.long())
        target = teacher.mixed(self.mix.at(place))
        if self.mode == "hard":
            finite = target.isfinite().all(-1)
            return _hard(student, target.argmax(-1).where(finite, -1))
        answered = target.isfinite().flatten(1).all(-1)
        # 0 times NaN is not 0: the student's own logits replace such an answer.
        target = target.where(answered[:, None, None, None], student.detach())
        temperature = SOFT_TEMPERATURE if self.temperature is None else self.temperature.at(place)
        return soft_distillation(student, target, temperature).mean((1, 2)) * answered, answered


def _hard(student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy [B] with `labels` [B, h, w], -1 for no answer, and whether there is an answer [B]."""
    answered = (labels >= 0).flatten(1).all(-1)
    places = F.cross_entropy(student.movedim(-1, 1), labels.clamp_min(0), reduction="none")
    return torch.where(answered, places.mean((1, 2)), 0.0), answered
