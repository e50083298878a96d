"""Scores are exact counts, and nothing is given that makes no sense."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deit_kd.interfaces import StudentOutput, head_log_probabilities
from deit_kd.metrics import agreement, answered, joined, judge, per_image, ranks, scale_temperature
from deit_kd.metrics import score as score_of
from tests.helpers import ONE_PROCESS


def score(probabilities: Tensor, labels: list[int]) -> Any:
    rows = answered(probabilities.log(), torch.tensor(labels))
    return score_of(rows, probabilities.shape[-1], len(labels), ONE_PROCESS)


def test_top1_top5_and_nll_worked_by_hand() -> None:
    ranks = torch.tensor([0.3, 0.2, 0.18, 0.12, 0.1, 0.06, 0.04]).expand(4, 7)
    result = score(ranks, [0, 1, 4, 5])
    assert result["top1"] == 25
    assert result["top5"] == 75
    assert result["nll"] == pytest.approx(-math.log(0.3 * 0.2 * 0.1 * 0.06) / 4)


def test_of_classes_that_tie_the_first_is_the_answer_everywhere() -> None:
    tied = torch.tensor([[0.1, 0.3, 0.1, 0.3, 0.1, 0.1]]).expand(6, 6)
    labels = torch.arange(6)
    rows = answered(tied, labels)
    assert rows.predicted.tolist() == tied.argmax(-1).tolist() == [1] * 6
    assert ranks(tied, labels).tolist() == [2, 0, 3, 1, 4, 5]
    for name, values in per_image(tied, rows).items():
        if name in ("top1", "top5"):
            assert values.mean().item() == pytest.approx(score_of(rows, 6, 6, ONE_PROCESS)[name])


def test_what_is_not_a_number_is_no_right_answer() -> None:
    assert ranks(torch.full((2, 3), torch.nan), torch.tensor([0, 2])).tolist() == [3, 3]


@pytest.mark.parametrize(("classes", "is_null"), [(2, True), (5, True), (6, False)])
def test_top5_of_five_classes_or_fewer_is_null(classes: int, is_null: bool) -> None:
    assert (score(torch.eye(classes), list(range(classes)))["top5"] is None) == is_null


def test_batches_of_any_size_give_the_same_counts() -> None:
    probabilities, labels = torch.rand(50, 8).softmax(-1), torch.randint(8, (50,))
    batches = zip(probabilities.split(7), labels.split(7), strict=True)
    parts = joined(answered(some, few) for some, few in batches)
    expected = score_of(answered(probabilities, labels), 8, 50, ONE_PROCESS)
    assert score_of(parts, 8, 50, ONE_PROCESS) == expected


@pytest.mark.parametrize("gap", [50.0, 90.0, 200.0, 3000.0])
def test_nll_is_exact_however_certain_a_wrong_answer_is(gap: float) -> None:
    """A softmax in fp32 ends at 1e-45, and a clamp of it ends every NLL at 87.5."""
    student = StudentOutput(torch.tensor([[gap, 0.0]]), torch.tensor([[2 * gap, 0.0]]))
    label = torch.tensor([1])
    judged = judge(student, label, teacher_logits=student.cls_logits, others={}, fusion="softmax", seed=0)
    rows = answered(head_log_probabilities(student)["fused"], label)
    fused = gap + math.log(2)  # half of exp(-gap); the other head adds nothing that fp32 holds
    assert judged["heads"]["cls"]["nll"] == judged["teacher"]["nll"] == pytest.approx(gap)
    assert judged["heads"]["dist"]["nll"] == pytest.approx(2 * gap)
    assert judged["heads"]["fused"]["nll"] == pytest.approx(fused)
    assert judged["heads"]["fused_logits"]["nll"] == pytest.approx(1.5 * gap)
    assert score_of(rows, 2, 1, ONE_PROCESS)["nll"] == pytest.approx(fused)
    assert float(scale_temperature(student.cls_logits.log_softmax(-1), 0.5)[0, 1]) == pytest.approx(-2 * gap)


def test_agreement_is_a_fraction_and_null_without_a_partner() -> None:
    predictions = {"cls": torch.tensor([0, 1, 2, 3]), "dist": torch.tensor([0, 1, 2, 0]), "fused": torch.zeros(4)}
    assert agreement(predictions, 4, ONE_PROCESS) == {"cls_teacher": None, "dist_teacher": None, "cls_dist": 0.75}
