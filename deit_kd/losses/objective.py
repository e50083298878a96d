"""The objective: the one cast to fp32, the one mean over the batch, the one place that weighs the terms."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deit_kd.interfaces import InputError, StudentOutput, TeacherOutput, nearest
from deit_kd.losses.classification import soft_target_cross_entropy
from deit_kd.losses.dense import DenseTerm
from deit_kd.losses.terms import LOGIT_LOSSES, PEERS, FeatureTerm, LogitTerm, Needs
from deit_kd.schedules import Schedule, always, silence

Term = LogitTerm | DenseTerm | FeatureTerm
NO_TERM: Mapping[str, Tensor] = {}


class Terms(NamedTuple):
    """The loss of a batch and its terms before weighing; scalars, in fp32."""

    loss: Tensor
    classification: Tensor
    distillation: Tensor
    others: Mapping[str, Tensor] = NO_TERM  # by the kind of each further term that has not ended
    cosines: Mapping[str, Tensor] = NO_TERM  # between student and teacher, by the kind of each feature term


class CheckedTerms(NamedTuple):
    """The terms of a batch, and what in it was not finite; still on its device, without a synchronisation."""

    terms: Terms
    is_finite: Tensor  # [B], whether all terms of a view are
    teacher_not_finite: Tensor  # how many of the teacher's B answers have a logit that is not finite


def _mean(losses: Tensor) -> Tensor:
    return losses.mean() if len(losses) else losses.sum()  # 0 for a batch without a readable image


class Objective:
    """``(1 - alpha) * classification(cls, targets) + alpha * distillation(dist, teacher) + sum of weight * term``.

    Args:
        kind: of the distillation term: ``none`` (classification alone), ``soft``, ``hard`` or ``standardised``.
        alpha: weight of the distillation term, 0 to 1, or its schedule. With kind ``none``, 1 ignores the labels, so
            that only the further terms teach, and a schedule gives the labels the weight 1 - alpha; any other constant
            has no effect.
        temperature: T of the distillation term, or its schedule; None is 3, and depends on the number of classes for
            ``standardised``.
        scale: ``batchmean`` averages over the batch; ``numel`` divides by the classes too, as the
            published deit code does, which makes the soft term exactly C times smaller.
        terms: further terms, at most one of each kind; terms whose weight is always 0 are dropped.

    Raises:
        InputError: `kind` or `scale` is unknown, `alpha` or `temperature` out of range, a term appears twice, or
            nothing teaches in a part of the run.
    """

    def __init__(
        self,
        kind: str = "hard",
        alpha: float | Schedule = 0.5,
        temperature: float | Schedule | None = None,
        scale: str = "batchmean",
        terms: Sequence[Term] = (),
    ) -> None:
        if kind != "none" and kind not in LOGIT_LOSSES:
            known = ["none", *LOGIT_LOSSES]
            raise InputError(f"distill.kind: {kind!r} is unknown; use one of {', '.join(known)}{nearest(kind, known)}")
        self.kind = kind
        self.scale = scale
        self.terms = tuple(term for term in terms if not term.weight.is_always(0))
        self._alpha = acting_alpha(kind, alpha if isinstance(alpha, Schedule) else always(alpha))
        out_of_range = [value for value in self._alpha.values if not 0 <= value <= 1]
        if out_of_range:
            raise InputError(f"distill.alpha: {out_of_range[0]} is not between 0 and 1")
        if scale not in ("batchmean", "numel"):
            raise InputError(f"distill.scale: {scale!r} is unknown; use batchmean or numel")
        if isinstance(temperature, float | int):
            temperature = always(temperature)
        self._distillation = None if kind == "none" else LogitTerm(kind, self._alpha, temperature)
        kinds = [kind, *(term.kind for term in terms)]
        twice = next((name for name in kinds if kinds.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"distill.terms: {twice} appears twice; keep one")
        check_taught(kind, self._alpha, [term.weight for term in self.terms])

    @property
    def learns_from_labels(self) -> bool:
        """Whether the labels are used at any time."""
        return self.kind != "none" or not self._alpha.is_always(1)

    @property
    def distils(self) -> bool:
        """Whether it has a distillation term that has not ended."""
        return self._distillation is not None

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """Alpha, and the weights of the further terms."""
        return self._alpha, *(term.weight for term in self.terms)

    def changing(self, place: float) -> dict[str, float]:
        """Return those of ``alpha`` and ``temperature`` that change over the run, at the share `place` of it."""
        temperature = None if self._distillation is None else self._distillation.temperature
        both = {"alpha": self._alpha, "temperature": temperature}
        return {name: value.at(place) for name, value in both.items() if value is not None and value.changes}

    @property
    def further_terms(self) -> tuple[str, ...]:
        """The kinds of the further terms."""
        return tuple(term.kind for term in self.terms)

    @property
    def active(self) -> tuple[str, ...]:
        """The kinds of the terms that use the teacher: the distillation term and the further terms."""
        return (self.kind,) * self.distils + self.further_terms

    @property
    def needs(self) -> Needs:
        """What it needs besides the student's heads."""
        links = tuple(link for term in self.terms if isinstance(term, FeatureTerm) for link in term.links)
        dense = any(isinstance(term, DenseTerm) for term in self.terms)
        of_teacher = (term for term in self.terms if term.kind != PEERS and not isinstance(term, FeatureTerm))
        return Needs(self.distils or any(of_teacher), links, dense)

    def remaining(self, place: float) -> Objective:
        """Return this objective without the terms that have ended for good at the share `place` of the run."""
        rest = copy.copy(self)
        # Peers answer one another to the end, so dropping that term would save nothing.
        rest.terms = tuple(term for term in self.terms if term.kind == PEERS or not term.weight.is_over(place))
        # An alpha that is 0 from the start is still measured: only a schedule ends.
        if self._alpha.is_over(place) and self._alpha.changes:
            rest._distillation = None
        return rest

    def __call__(
        self, student: StudentOutput, teacher: TeacherOutput | None, targets: Tensor, place: float = 0.0
    ) -> Terms:
        """Return the mean loss and terms of one batch; zeros if it is empty. See `checked`."""
        return self.checked(student, teacher, targets, place).terms

    def checked(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        targets: Tensor,
        place: float = 0.0,
        peers: Tensor | None = None,
    ) -> CheckedTerms:
        """Return the mean loss and terms of one batch, zeros if it is empty, and what was not finite.

        A view whose teacher's or peers' answer is not finite has 0 for each term of these logits.

        Args:
            student: logits of any float type, [B, C] each, and the features that `needs` names.
            teacher: logits for the same views, [B, C], and features; None only if nothing is needed.
            targets: [B, C].
            place: share of the run that is done.
            peers: log-probabilities [B, C] of what the student's peers answer; None only without a term ``peers``.

        Raises:
            InputError: the student has no distillation head, or the teacher lacks what is needed.
        """
        with torch.autocast(student.cls_logits.device.type, enabled=False):
            classification = soft_target_cross_entropy(student.cls_logits.float(), targets.float())
            losses = {"classification": classification, "distillation": torch.zeros_like(classification)}
            cosines: dict[str, Tensor] = {}
            answered = torch.ones_like(classification, dtype=torch.bool)
            if self._distillation is not None:
                losses["distillation"], answered = _logit_losses(self._distillation, student, teacher, place)
            elif student.dist_logits is not None:  # ended for good, but DDP waits for a gradient of every parameter
                losses["distillation"] = 0 * student.dist_logits.float().sum(-1)
            for term in self.terms:
                if isinstance(term, LogitTerm) and term.kind == PEERS:
                    losses[PEERS], _ = _logit_losses(term, student, TeacherOutput(peers), place)
                elif isinstance(term, LogitTerm):
                    losses[term.kind], there = _logit_losses(term, student, teacher, place)
                    answered = answered & there
                elif isinstance(term, DenseTerm):
                    losses[term.kind], there = _dense_losses(term, student, teacher, place)
                    answered = answered & there
                else:
                    losses[term.kind], cosines[term.kind] = term.per_example(*_features(student, teacher, term), place)
            is_finite = torch.stack(list(losses.values())).detach().sum(0).isfinite()
            means = {kind: _mean(loss) for kind, loss in losses.items()}
            if self.scale == "numel":
                means["distillation"] = means["distillation"] / targets.shape[-1]
            terms = Terms(
                self._weighed(means, place),
                means.pop("classification"),
                means.pop("distillation"),
                means,
                {kind: _mean(cosine) for kind, cosine in cosines.items()},
            )
            return CheckedTerms(terms, is_finite, (~answered).float().sum())

    def _weighed(self, means: Mapping[str, Tensor], place: float) -> Tensor:
        loss, alpha = means["classification"], self._alpha.at(place)
        loss = (1 - alpha) * loss + alpha * means["distillation"]
        for term in self.terms:
            loss = loss + term.weight.at(place) * means[term.kind]
        return loss


def acting_alpha(kind: str, alpha: Schedule) -> Schedule:
    """Return the alpha that acts: without a distillation term, a constant below 1 does not weaken the labels."""
    return always(0) if kind == "none" and not alpha.changes and not alpha.is_always(1) else alpha


def check_taught(kind: str, alpha: Schedule, weights: Sequence[Schedule]) -> None:
    """Refuse an objective whose every weight is 0 in a part of the run; arguments as for `Objective`.

    Raises:
        InputError: no labels are learned from in that part, and no term, with its `weights`, has a weight above 0.
    """
    alpha = acting_alpha(kind, alpha)
    # With a distillation term, the labels' weight and its own add up to 1.
    silent = None if kind != "none" else silence([alpha._replace(start=1 - alpha.start, end=1 - alpha.end), *weights])
    if silent is None:
        return
    first, last = silent
    if silent == (0, 1):
        raise InputError("distill.alpha: 1 ignores the labels, and nothing else teaches; add a term")
    when, cure = f"between {first:g} and {last:g}", "last longer"
    if last == 1:
        when, cure = f"after {first:g}", "last"
    elif first == 0:
        when, cure = f"before {last:g}", "begin earlier"
    raise InputError(
        f"distill.terms: nothing teaches {when} of the run; let a term {cure}, or give the labels a weight "
        "(distill.alpha)"
    )


def _logit_losses(
    term: LogitTerm, student: StudentOutput, teacher: TeacherOutput | None, place: float
) -> tuple[Tensor, Tensor]:
    """Return a term [B] of each view, and whether the teacher's answer [B] is finite; the term is 0 where it is not."""
    if student.dist_logits is None:
        raise InputError(f"distill.kind {term.kind!r} needs a student with a distillation token")
    if teacher is None or teacher.logits is None:
        lacking = "a teacher" if teacher is None else "a teacher with a head"
        raise InputError(f"distill.kind {term.kind!r} needs {lacking}")
    dist_logits, taught = student.dist_logits.float(), teacher.logits.float()
    answered = taught.isfinite().all(-1)
    # The argmax of NaN is not a label, and 0 times NaN is not 0: the student's own logits replace such an answer.
    taught = taught.where(answered[:, None], dist_logits.detach())
    return term.per_example(dist_logits, taught, place) * answered, answered


def _dense_losses(
    term: DenseTerm, student: StudentOutput, teacher: TeacherOutput | None, place: float
) -> tuple[Tensor, Tensor]:
    if student.dense_logits is None or teacher is None:
        lacking = "a teacher" if teacher is None else "a student that answers at every place"
        raise InputError(f"distill.terms: dense needs {lacking}")
    return term.per_example(student.dense_logits, teacher, place)


def _features(
    student: StudentOutput, teacher: TeacherOutput | None, term: FeatureTerm
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    if student.features is None or teacher is None or teacher.features is None:
        lacking = "student with connectors" if student.features is None else "teacher that is asked for features"
        raise InputError(f"distill.terms: {term.kind} needs a {lacking}")
    return student.features, teacher.features
