"""The gate before training: a teacher that scores like guessing is refused, since it may have its classes wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from deit_kd.interfaces import InputError


def least_top1(labels: Sequence[int]) -> float:
    """Return what a teacher must beat, in percent: the largest class's share and three standard errors of it.

    A teacher whose columns are in a wrong order scores about what guessing does.
    """
    share = max(Counter(labels).values()) / len(labels)
    return 100 * min(1.0, share + 3 * math.sqrt(share * (1 - share) / len(labels)))


def check_score(name: str, top1: float, nll: float, labels: Sequence[int], min_top1: float | None) -> None:
    """Raise an InputError unless the teacher's score on validation lets it teach.

    Args:
        name: of the teacher.
        top1: measured through the same resize as in training, in percent.
        nll: measured alike; not finite where an output is not.
        labels: of the validation set.
        min_top1: what the recipe asks for, in percent; None is `least_top1`.
    """
    if not math.isfinite(nll):
        raise InputError(
            f"teacher: {name} answers the validation set with outputs that are not finite; check its "
            "weights, or set teacher.precision off"
        )
    least = least_top1(labels) if min_top1 is None else min_top1
    if top1 < least:
        raise InputError(
            f"teacher.min_top1: {name} scores {top1:.2f} % on {len(labels)} validation images, below {least:.2f} %; "
            "its classes, size or normalisation may be wrong: see docs/teachers.md, or lower teacher.min_top1"
        )
