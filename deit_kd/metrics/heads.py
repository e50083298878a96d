"""The full evaluation of a student's heads from the logits of one split."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, reduce
from itertools import combinations
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from deit_kd.distributed import Processes
from deit_kd.interfaces import (
    ANSWERS,
    HEADS,
    StudentOutput,
    head_log_probabilities,
    pair_log_probabilities,
    reported,
    speaker,
)
from deit_kd.metrics.answered import Answered, agreement, answered, is_right, likeliest, score
from deit_kd.metrics.calibration import (
    calibration_gaps,
    expected_calibration_error,
    fit_fusion_weight,
    fit_temperature,
    reliability,
    scale_temperature,
)
from deit_kd.metrics.comparison import class_accuracies, disagreement_matrix, mcnemar
from deit_kd.metrics.intervals import bootstrap_means, interval
from deit_kd.randomness import generator

FUSIONS = ("softmax", "logits")
ALONE = Processes(0, 1, torch.device("cpu"))  # the answers of all processes have been joined already


def every_head(output: StudentOutput, fusion: str = "softmax") -> dict[str, Tensor]:
    """Return the log-probabilities [n, C] of each head and, if there are several, of all of them by both fusions.

    With three heads each two of them are also fused, by `fusion`.
    """
    heads = head_log_probabilities(output, "softmax")
    fused = heads.pop("fused", None)
    if fused is None:
        return heads
    by_logits = head_log_probabilities(output, "logits")["fused"]
    pairs = pair_log_probabilities(output, fusion)
    return {**heads, "fused_softmax": fused, "fused_logits": by_logits, **pairs}


def names_in_every_head(fusion: str) -> dict[str, str]:
    """Return under which name `every_head` and a table of scores have each of a student's answers and the teacher."""
    return {**{head: head for head in HEADS}, "fused": f"fused_{fusion}", "teacher": "teacher"}


def weighted(fusion: str, output: StudentOutput, weight: float) -> Tensor:
    """Return fused log-probabilities [n, C] with `weight` on the class head; the other heads share the rest."""
    cls_logits, *others = (logits.float() for logits in output.logits.values())
    if fusion == "softmax":
        log_weight = torch.tensor([weight, (1 - weight) / len(others)]).log()
        rest = (logits.log_softmax(-1) + log_weight[1] for logits in others)
        return reduce(torch.logaddexp, rest, cls_logits.log_softmax(-1) + log_weight[0])
    return torch.lerp(torch.stack(others).mean(0), cls_logits, weight).log_softmax(-1)


def per_image(log_probabilities: Tensor, rows: Answered) -> dict[str, Tensor]:
    """Return each image's ``top1`` and ``top5`` (0 or 100), ``nll`` in nats and ``brier``, all [n] in float64.

    Brier's score is the squared distance of the probabilities from the truth, summed over classes (0 to 2).
    There is no ``top5`` where C <= 5.

    Args:
        log_probabilities: [n, C].
        rows: the result of `answered` for them.
    """
    values = {"top1": 100.0 * rows.top1.double()}
    if log_probabilities.shape[-1] > 5:
        values["top5"] = 100.0 * rows.top5.double()
    values["nll"] = rows.nll
    values["brier"] = log_probabilities.double().exp().square().sum(-1) - 2 * (-rows.nll).exp() + 1
    return values


PREDICTORS = ("truth", "teacher", *ANSWERS)


def judge(
    output: StudentOutput,
    labels: Tensor,
    *,
    teacher_logits: Tensor | None,
    others: Mapping[str, Mapping[str, Tensor]],
    fusion: str,
    seed: int,
    teacher_predictions: Tensor | None = None,
    right: Tensor | None = None,
) -> dict[str, Any]:
    """Return the scores, intervals, tests and calibration of every head over one split.

    Args:
        output: logits of the split, [n, C] each.
        labels: [n].
        teacher_logits: [n, C], or None without a teacher.
        others: predictions [n] of other students by name and head; a name that is also a head's or the teacher's gets
            ``(student)`` appended.
        fusion: which one is called ``fused``: ``softmax`` or ``logits``.
        seed: of the bootstrap and of the two halves.
        teacher_predictions: [n], of a teacher whose logits are not known; only its ``top1`` can be scored.
        right: bool [n, C], the right answers in place of the labels, which then only sort ``by_class``. NLL, Brier's
            score and calibration are those of the right class that a head finds likeliest.

    Returns:
        JSON: ``heads`` and ``teacher`` (``top1`` and ``top5`` in percent, ``nll``, ``brier``, ``ece``, and their
        95 % ``intervals``), ``agreement``, ``comparisons`` (McNemar), ``disagreement``, ``by_class``,
        ``fusion_weight`` and ``temperature`` (fitted on one half, scored on the other), ``reliability``. What a student
        without a distillation head lacks is None.
    """
    others = {f"{name} (student)" if name in PREDICTORS else name: answers for name, answers in others.items()}
    students = {name: answers[speaker(answers)] for name, answers in others.items()}
    heads = every_head(output, fusion)
    has_several = len(output.logits) > 1
    teacher = None if teacher_logits is None else teacher_logits.float().log_softmax(-1)
    scored = {**heads, **({} if teacher is None else {"teacher": teacher})}
    truth = labels if right is None else right
    own = {name: likeliest(truth, values) for name, values in scored.items()}
    rows = {name: answered(values, own[name]) for name, values in scored.items()}
    scores = {name: _score(values, rows[name], own[name], seed) for name, values in scored.items()}
    if has_several:
        scores["fused"] = scores[f"fused_{fusion}"]
    names = names_in_every_head(fusion)
    predictions = {name: rows[own_name].predicted for name, own_name in names.items() if own_name in rows}
    if teacher is None and teacher_predictions is not None:
        predictions["teacher"] = teacher_predictions
        scores["teacher"] = _score_of_classes(teacher_predictions, truth, seed)
    fitted, held_out = _halves(len(labels), seed)
    return {
        "heads": {name: scores.get(name) for name in (*reported(scores), "fused_softmax", "fused_logits")},
        "teacher": scores.get("teacher"),
        "agreement": agreement(predictions, len(labels), ALONE),
        "comparisons": _comparisons(predictions, others, truth, seed),
        "disagreement": disagreement_matrix({"truth": truth, **predictions, **students}),
        "by_class": class_accuracies({**predictions, **students}, labels, output.cls_logits.shape[-1], right),
        "fusion_weight": _fit_fusion(output, truth, fitted, held_out) if has_several else None,
        "temperature": {name: _fit_temperature(values, own[name], fitted, held_out) for name, values in heads.items()},
        "reliability": {name: reliability(values.exp(), own[name]) for name, values in scored.items()},
    }


def _score(log_probabilities: Tensor, rows: Answered, labels: Tensor, seed: int) -> dict[str, Any]:
    values, probabilities = per_image(log_probabilities, rows), log_probabilities.exp()
    gaps = calibration_gaps(probabilities, labels)
    means = bootstrap_means(torch.cat([torch.stack(list(values.values()), dim=1), gaps], dim=1), seed)
    spread = {name: interval(means[:, column]) for column, name in enumerate(values)}
    spread["ece"] = interval(means[:, len(values) :].abs().sum(-1))
    return {
        **score(rows, log_probabilities.shape[-1], len(labels), ALONE),
        "brier": float(values["brier"].mean()),
        "ece": expected_calibration_error(probabilities, labels),
        "intervals": spread,
    }


def _score_of_classes(predictions: Tensor, truth: Tensor, seed: int) -> dict[str, Any]:
    right = 100.0 * is_right(predictions, truth).double()
    unknown = dict.fromkeys(("top5", "nll", "brier", "ece"))
    spread = interval(bootstrap_means(right[:, None], seed)[:, 0])
    return {"top1": float(right.mean()), **unknown, "intervals": {"top1": spread}}


def _comparisons(
    predictions: Mapping[str, Tensor], others: Mapping[str, Mapping[str, Tensor]], truth: Tensor, seed: int
) -> list[dict[str, Any]]:
    """Compare each pair of a student's heads, and each head with the same head of the others or with their only one."""
    heads = [head for head in ANSWERS if head in predictions]
    pairs = {pair: (predictions[pair[0]], predictions[pair[1]]) for pair in combinations(heads, 2)}
    for name, theirs in others.items():
        main = speaker(theirs)
        for head in sorted(heads, key=speaker(predictions).__ne__):
            against = head if head in theirs and head != speaker(predictions) else main
            called = name if against == main else f"{name}, {against}"
            pairs[head, called] = predictions[head], theirs[against]
    right = {pair: (is_right(ours, truth), is_right(theirs, truth)) for pair, (ours, theirs) in pairs.items()}
    if not right:
        return []
    differences = torch.stack([100 * (ours.double() - theirs.double()) for ours, theirs in right.values()], dim=1)
    means = bootstrap_means(differences, seed)
    return [
        {
            "first": first,
            "second": second,
            **mcnemar(ours, theirs),
            "difference": float(differences[:, column].mean()),
            "interval": interval(means[:, column]),
        }
        for column, ((first, second), (ours, theirs)) in enumerate(right.items())
    ]


def _halves(images: int, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.from_numpy(generator("halves", seed).permutation(images))
    return order[: images // 2], order[images // 2 :]


def _fit_fusion(output: StudentOutput, truth: Tensor, fitted: Tensor, held_out: Tensor) -> dict[str, Any]:
    first, second = (output.mapped(itemgetter(half)) for half in (fitted, held_out))
    equal = 1 / len(output.logits)
    result = {}
    for fusion in FUSIONS:
        weigh = partial(weighted, fusion)
        weight = fit_fusion_weight(first, truth[fitted], weigh) if len(fitted) else equal
        result[fusion] = {
            "weight_of_cls": weight,
            "weighted": _short_score(weigh(second, weight), truth[held_out]),
            "equal": _short_score(weigh(second, equal), truth[held_out]),
        }
    return result


def _fit_temperature(log_probabilities: Tensor, labels: Tensor, fitted: Tensor, held_out: Tensor) -> dict[str, Any]:
    temperature = fit_temperature(log_probabilities[fitted], labels[fitted]) if len(fitted) else 1.0
    after = scale_temperature(log_probabilities[held_out], temperature)
    return {
        "temperature": temperature,
        "before": _short_score(log_probabilities[held_out], labels[held_out]),
        "after": _short_score(after, labels[held_out]),
    }


def _short_score(log_probabilities: Tensor, truth: Tensor) -> dict[str, float | None]:
    labels = likeliest(truth, log_probabilities)
    found = score(answered(log_probabilities, labels), log_probabilities.shape[-1], len(labels), ALONE)
    ece = expected_calibration_error(log_probabilities.exp(), labels)
    return {"top1": found["top1"], "nll": found["nll"], "ece": ece}
