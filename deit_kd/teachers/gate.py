"""The gate before training: a teacher that scores no better than guessing, or whose classes are swapped, is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import bmat, coo_matrix, csr_matrix, diags, identity
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from deit_kd.interfaces import InputError

FALSE_ALARMS = 0.00135  # share of correct teachers that may be refused: one side of three standard errors
LEAST_GAIN = 0.1  # of recall per class: with more photos a smaller gain is significant, but not a clear sign
LONGEST_LIST = 4


def least_top1(labels: Sequence[int] | np.ndarray) -> float:
    """Return the score that a teacher must beat, in percent: the largest class's share plus three standard errors.

    A teacher whose columns are in the wrong order scores about as well as guessing.
    """
    share = int(np.unique(labels, return_counts=True)[1].max()) / len(labels)
    return 100 * min(1.0, share + 3 * math.sqrt(share * (1 - share) / len(labels)))


def check_score(
    name: str, top1: float, nll: float, labels: Sequence[int] | np.ndarray, min_top1: float | None, fitted: bool = False
) -> None:
    """Raise an InputError unless the teacher's score on validation is good enough to teach.

    Args:
        name: of the teacher.
        top1: measured through the same resize as in training, in percent.
        nll: measured in the same way; not finite if an output is not.
        labels: of the validation images that could be read.
        min_top1: the recipe's minimum, in percent; None is `least_top1`.
        fitted: whether it was trained on these photos, so that its classes and preprocessing are right.
    """
    if not math.isfinite(nll):
        raise InputError(
            f"teacher: the outputs of {name} on the validation set are not finite; check its weights, or set "
            "teacher.precision off"
        )
    least = least_top1(labels) if min_top1 is None else min_top1
    if top1 < least:
        raise InputError(
            f"teacher.min_top1: {name} scores {top1:.2f} % on {len(labels)} validation images, below {least:.2f} %; "
            f"{_cure('classes, size or normalisation', fitted, min_top1, least)}, or lower teacher.min_top1"
        )


def check_features(
    name: str,
    score: Mapping[str, Any],
    labels: Sequence[int] | np.ndarray,
    least_score: float | None,
    fitted: bool = False,
) -> None:
    """Raise an InputError unless the features of a teacher without a head separate classes better than guessing.

    Args:
        name: of the teacher.
        score: of its k-NN on validation: ``knn`` in percent, and the training ``images`` that it is from.
        labels: of the validation set.
        least_score: the recipe's minimum, in percent; None is `least_top1`.
        fitted: whether it was trained on these photos.
    """
    least = least_top1(labels) if least_score is None else least_score
    if score["knn"] < least:
        raise InputError(
            f"teacher.min_top1: the features of {name} score {score['knn']:.2f} % by k-NN, from {score['images']} "
            f"training images to {len(labels)} of validation, below {least:.2f} %; "
            f"{_cure('size or normalisation', fitted, least_score, least)}, or lower teacher.min_top1"
        )


def _cure(doubtful: str, fitted: bool, asked: float | None, least: float) -> str:
    if asked is None and least >= 100:
        return "so few cannot tell it from guessing: validate on more (data.validation_fraction)"
    if fitted:
        return "it was fitted on too few steps: raise teacher.fit.epochs"
    return f"its {doubtful} may be wrong: see docs/guide/teachers.md"


def check_columns(
    facts: Mapping[str, Any], classes: Sequence[str], labels: np.ndarray, predictions: np.ndarray
) -> None:
    """Raise an InputError if the teacher's answers to the validation set are clearly those of other classes.

    Args:
        facts: of the teacher, with its ``name`` and its ``class_map``.
        classes: the dataset's names, in label order.
        labels: [n], of the validation set.
        predictions: [n], the teacher's classes; -1 where there is no answer.
    """
    cycles = exchanged_columns(labels, predictions, len(classes))
    if not cycles:
        return
    pairs = [pair for cycle in cycles for pair in zip(cycle, [*cycle[1:], cycle[0]], strict=True)]
    seen = []
    for label, column in pairs[:LONGEST_LIST]:
        answers = predictions[(labels == label) & (predictions >= 0)]
        own, other = (int((answers == place).sum()) for place in (label, column))
        seen.append(
            f"the column of {classes[column]!r} answers {other} of {len(answers)} photos of {classes[label]!r}, their "
            f"own column {own}"
        )
    more = f"; {len(pairs) - LONGEST_LIST} more" if len(pairs) > LONGEST_LIST else ""
    raise InputError(
        f"teacher.class_map: the columns of {facts['name']} seem to be in another order ({'; '.join(seen)}{more}); "
        f"give teacher.class_map a JSON of all classes{_entries(facts, classes, pairs)}, see docs/guide/teachers.md, "
        "or correct the folders of these photos; teacher.min_top1 0 lets it teach as it is"
    )


def _entries(facts: Mapping[str, Any], classes: Sequence[str], pairs: Sequence[tuple[int, int]]) -> str:
    """Return the class map entries that would correct the exchanged columns, if columns can be named."""
    if "members" in facts:
        return ", for the member that is wrong"
    known = facts.get("class_map") or {}
    groups = {
        classes[label]: [number for number, _ in known.get(classes[column], [])] or [column] for label, column in pairs
    }
    entries = {name: group[0] if len(group) == 1 else group for name, group in list(groups.items())[:LONGEST_LIST]}
    return f" with {json.dumps(entries, ensure_ascii=False)[:-1]}{', …' if len(pairs) > LONGEST_LIST else ''}}}"


def exchanged_columns(labels: np.ndarray, predictions: np.ndarray, classes: int) -> list[list[int]]:
    """Return the classes whose columns are exchanged, as cycles: each class answers in the column of the next one.

    A correct column, however weak the teacher, answers its own class's photos at least as often as any other class's.
    No other order of the columns then has a higher expected sum of recalls. The best order is found with the Hungarian
    method. Each of its cycles counts if its gain is clear: at least `LEAST_GAIN` per class, and larger than what chance
    gives any cycle of that length, except with probability `FALSE_ALARMS`.

    Args:
        labels: [n], of the photos.
        predictions: [n], the teacher's classes; -1 where there is no answer.
        classes: C.
    """
    asked = predictions >= 0
    pairs = (labels[asked], predictions[asked])
    counts = coo_matrix((np.ones(len(pairs[0])), pairs), shape=(classes, classes)).tocsr()  # [C, C], sparse
    photos = np.bincount(pairs[0], minlength=classes)
    order = _best_order(csr_matrix(diags(1 / np.maximum(photos, 1)) @ counts))
    return [cycle for cycle in _cycles(order) if _is_clear(np.array(cycle), counts, photos)]


def _best_order(rates: csr_matrix) -> np.ndarray:
    """Return the column [C] of each class for which the sum of `rates` [C, C] is largest.

    With many classes most rates are zero. A matching that may leave classes out is a full matching of twice the size,
    which scipy finds without a dense matrix; adding one to every edge changes nothing, and keeps zeros stored.
    """
    classes = rates.shape[0]
    alone = identity(classes, format="csr")
    rates = rates + 1e-9 * alone  # prefers the given order among equal ones
    edges, mirrored = rates.copy(), csr_matrix(rates.T)
    edges.data += 1
    mirrored.data[:] = 1
    rows, columns = min_weight_full_bipartite_matching(bmat([[edges, alone], [alone, mirrored]], "csr"), maximize=True)
    taken = (rows < classes) & (columns < classes)
    order, owner = np.full(classes, -1), np.full(classes, -1)
    order[rows[taken]] = columns[taken]
    owner[columns[taken]] = rows[taken]
    for row in np.flatnonzero(order < 0):  # closes a chain: its last class takes the column that its first one gave up
        first = row
        while owner[first] >= 0:
            first = owner[first]
        order[row], owner[first] = first, row
    return order


def _cycles(order: np.ndarray) -> list[list[int]]:
    """Return the cycles of a permutation [C] that move something."""
    cycles, known = [], set()
    for start in np.flatnonzero(order != np.arange(len(order))).tolist():
        if start not in known:
            cycle = [start]
            while (after := int(order[cycle[-1]])) != start:
                cycle.append(after)
            known.update(cycle)
            cycles.append(cycle)
    return cycles


def _is_clear(cycle: np.ndarray, counts: csr_matrix, photos: np.ndarray) -> bool:
    """Return whether such a gain of recall is very unlikely by chance for any cycle of that length (Chernoff bound).

    Chance is the worst correct teacher: a column answers photos of its own class and of the one before it equally
    often.
    """
    after = np.roll(cycle, -1)
    own, other = (np.asarray(counts[cycle, column]).ravel() for column in (cycle, after))
    photos, classes = photos[cycle], len(photos)
    gain = ((other - own) / np.maximum(photos, 1)).sum()
    if gain < LEAST_GAIN * len(cycle):
        return False
    rate_after = (other + np.roll(own, -1)) / np.maximum(photos + np.roll(photos, -1), 1)
    rate_own = np.roll(rate_after, 1)
    there = photos > 0
    n, up, down = photos[there], rate_after[there], rate_own[there]

    def log_bound(slope: float) -> float:
        moments = np.log1p(up * np.expm1(slope / n) + down * np.expm1(-slope / n))
        return float((n * moments).sum() - slope * gain)

    from scipy.optimize import minimize_scalar

    found: Any = minimize_scalar(log_bound, bounds=(0, 100 * n.min()), method="bounded")
    cycles_of_that_length = math.lgamma(classes + 1) - math.lgamma(classes - len(cycle) + 1) - math.log(len(cycle))
    return bool(found.fun + cycles_of_that_length < math.log(FALSE_ALARMS))
