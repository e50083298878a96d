"""Terms of the objective besides classification: what each compares, its weight, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deit_kd.interfaces import DENSE, FEATURE_KINDS, SOFT_TEMPERATURE, InputError, Link, nearest
from deit_kd.losses.guide import map_error, on_one_grid
from deit_kd.losses.hard import hard_distillation
from deit_kd.losses.pooled import normalised, pooled_cosine, pooled_huber
from deit_kd.losses.relations import RELATIONS_TEMPERATURE, relation_error, relations_of
from deit_kd.losses.soft import soft_distillation
from deit_kd.losses.standardised import default_temperature, standardised_distillation
from deit_kd.schedules import Schedule

LOGIT_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "hard": lambda student, teacher, temperature: hard_distillation(student, teacher),
    "soft": soft_distillation,
    "standardised": standardised_distillation,
}
POOLED_LOSSES = {"cosine": pooled_cosine, "huber": pooled_huber}
PEERS = "peers"  # the kind of the term that compares with the answers of peers instead of a teacher's


@dataclass(frozen=True)
class LogitTerm:
    """A comparison of the distillation head with the teacher's logits, or with the answers of peers.

    Args:
        kind: ``hard``, ``soft`` or ``standardised``; ``peers`` is soft, too.
        weight: by the place in the run.
        temperature: by the place in the run; None is 3 for ``soft`` and ``peers``, and depends on the number of classes
            for ``standardised``.
    """

    kind: str
    weight: Schedule
    temperature: Schedule | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*LOGIT_LOSSES, PEERS):
            known = [*LOGIT_LOSSES, DENSE, *FEATURE_KINDS]
            raise InputError(
                f"distill.terms: kind {self.kind!r} is unknown; use one of {', '.join(known)}"
                f"{nearest(self.kind, known)}"
            )
        check_temperature(self.temperature)

    def per_example(self, dist_logits: Tensor, teacher_logits: Tensor, place: float) -> Tensor:
        """Return the loss [B] of logits [B, C] each, in fp32."""
        if self.temperature is None:
            soft = self.kind != "standardised"
            temperature = SOFT_TEMPERATURE if soft else default_temperature(dist_logits.shape[-1])
        else:
            temperature = self.temperature.at(place)
        return LOGIT_LOSSES.get(self.kind, soft_distillation)(dist_logits, teacher_logits, temperature)


@dataclass(frozen=True)
class FeatureTerm:
    """A comparison of features of the student, through its connectors if they have any, with features of the teacher.

    Args:
        kind: ``guide`` (maps), ``relations`` (within maps) or ``pooled`` (vectors); the sum over `links` is the term.
        weight: by the place in the run.
        links: what is compared.
        normalise: of ``guide``, see `on_one_grid`.
        grid: of ``guide`` and ``relations``, see `on_one_grid`.
        loss: of ``pooled``: ``cosine`` or ``huber``.
        temperature: of ``relations``, by the place in the run; None is 0.1.
    """

    kind: str
    weight: Schedule
    links: tuple[Link, ...]
    normalise: bool = True
    grid: int | None = None
    loss: str = "cosine"
    temperature: Schedule | None = None

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def per_example(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], place: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return the loss [B], and the cosine [B] of what is compared, over channels or over relations, in fp32.

        Args:
            student: features by the names of the links, [B, D, h, w] or [B, D].
            teacher: features by their own names.
            place: share of the run that is done.
        """
        pairs = [self._pair(student[link.name].float(), teacher[link.teacher].float()) for link in self.links]
        losses = torch.stack([self._error(own, target, place) for own, target in pairs]).sum(0)
        compared = 2 if self.kind == "relations" else 1
        with torch.no_grad():
            cosines = [torch.cosine_similarity(own, target, dim=compared) for own, target in pairs]  # [B, …]
            cosine = torch.stack([each[..., None].flatten(1).mean(1) for each in cosines]).mean(0)
        return losses, cosine

    def _error(self, student: Tensor, target: Tensor, place: float) -> Tensor:
        if self.kind == "relations":
            temperature = RELATIONS_TEMPERATURE if self.temperature is None else self.temperature.at(place)
            return relation_error(student, target, temperature)
        return map_error(student, target) if self.kind == "guide" else POOLED_LOSSES[self.loss](student, target)

    def _pair(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "guide":
            return on_one_grid(student, teacher, self.normalise, self.grid)
        if self.kind == "relations":
            student, teacher = on_one_grid(student, teacher, normalise=False, grid=self.grid)
            return relations_of(student), relations_of(teacher)
        return student, normalised(teacher)


def check_temperature(temperature: Schedule | None) -> None:
    """Raise an InputError if a temperature is 0 or below at any time."""
    if temperature is not None and min(temperature.values) <= 0:
        raise InputError(f"distill.temperature: {min(temperature.values):g} is not above 0")


class Needs(NamedTuple):
    """What an objective needs besides the student's heads."""

    logits: bool  # of the teacher
    links: tuple[Link, ...]
    dense: bool = False  # of the teacher at every place, and of the student

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """Names of the teacher's features, each once."""
        return tuple(dict.fromkeys(link.teacher for link in self.links))

    @property
    def teacher(self) -> bool:
        """Whether it needs a teacher."""
        return self.logits or bool(self.links)
