"""The full evaluation of a student's heads from the logits of one split."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from deit_kd.distributed import Processes
from deit_kd.interfaces import StudentOutput, head_log_probabilities
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


def every_head(output: StudentOutput) -> dict[str, Tensor]:
    """Return the log-probabilities [n, C] of ``cls`` and, with a distillation head, of both and of both fusions."""
    heads = head_log_probabilities(output, "softmax")
    if output.dist_logits is None:
        return heads
    return {
        "cls": heads["cls"],
        "dist": heads["dist"],
        "fused_softmax": heads["fused"],
        "fused_logits": head_log_probabilities(output, "logits")["fused"],
    }


def weighted(fusion: str, output: StudentOutput, weight: float) -> Tensor:
    """Return fused log-probabilities [n, C] with `weight` on the class head."""
    cls_logits, dist_logits = output.cls_logits.float(), output.dist_logits
    assert dist_logits is not None
    if fusion == "softmax":
        log_weight = torch.tensor([weight, 1 - weight]).log()
        return torch.logaddexp(
            cls_logits.log_softmax(-1) + log_weight[0], dist_logits.float().log_softmax(-1) + log_weight[1]
        )
    return torch.lerp(dist_logits.float(), cls_logits, weight).log_softmax(-1)


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


PREDICTORS = ("truth", "teacher", "cls", "dist", "fused")


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
    students = {name: answers[_speaker(answers)] for name, answers in others.items()}
    heads = every_head(output)
    both_heads = output.dist_logits is not None
    teacher = None if teacher_logits is None else teacher_logits.float().log_softmax(-1)
    scored = {**heads, **({} if teacher is None else {"teacher": teacher})}
    truth = labels if right is None else right
    own = {name: likeliest(truth, values) for name, values in scored.items()}
    rows = {name: answered(values, own[name]) for name, values in scored.items()}
    scores = {name: _score(values, rows[name], own[name], seed) for name, values in scored.items()}
    if both_heads:
        scores["fused"] = scores[f"fused_{fusion}"]
    speakers = {"cls": "cls", "dist": "dist", "fused": f"fused_{fusion}", "teacher": "teacher"}
    predictions = {name: rows[speaker].predicted for name, speaker in speakers.items() if speaker in rows}
    if teacher is None and teacher_predictions is not None:
        predictions["teacher"] = teacher_predictions
        scores["teacher"] = _score_of_classes(teacher_predictions, truth, seed)
    fitted, held_out = _halves(len(labels), seed)
    return {
        "heads": {name: scores.get(name) for name in ("cls", "dist", "fused", "fused_softmax", "fused_logits")},
        "teacher": scores.get("teacher"),
        "agreement": agreement(predictions, len(labels), ALONE),
        "comparisons": _comparisons(predictions, others, truth, seed),
        "disagreement": disagreement_matrix({"truth": truth, **predictions, **students}),
        "by_class": class_accuracies({**predictions, **students}, labels, output.cls_logits.shape[-1], right),
        "fusion_weight": _fit_fusion(output, truth, fitted, held_out) if both_heads else None,
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


def _speaker(predictions: Mapping[str, Tensor]) -> str:
    """Return the main head of a student."""
    return "fused" if "fused" in predictions else "cls"


def _comparisons(
    predictions: Mapping[str, Tensor], others: Mapping[str, Mapping[str, Tensor]], truth: Tensor, seed: int
) -> list[dict[str, Any]]:
    """Compare each pair of a student's heads, and each head with the same head of the others or with their only one."""
    heads = [head for head in ("cls", "dist", "fused") if head in predictions]
    pairs = {pair: (predictions[pair[0]], predictions[pair[1]]) for pair in combinations(heads, 2)}
    for name, theirs in others.items():
        speaker = _speaker(theirs)
        for head in sorted(heads, key=_speaker(predictions).__ne__):
            against = head if head in theirs and head != _speaker(predictions) else speaker
            called = name if against == speaker else f"{name}, {against}"
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
    assert output.dist_logits is not None
    halves = [StudentOutput(output.cls_logits[half], output.dist_logits[half]) for half in (fitted, held_out)]
    result = {}
    for fusion in FUSIONS:
        weigh = partial(weighted, fusion)
        weight = fit_fusion_weight(halves[0], truth[fitted], weigh) if len(fitted) else 0.5
        result[fusion] = {
            "weight_of_cls": weight,
            "weighted": _short_score(weigh(halves[1], weight), truth[held_out]),
            "equal": _short_score(weigh(halves[1], 0.5), truth[held_out]),
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
