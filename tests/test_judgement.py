"""Scores, intervals and tests of heads agree with what a hand or another library computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deit_kd.interfaces import StudentOutput
from deit_kd.metrics import (
    answered,
    bootstrap_means,
    calibration_gaps,
    class_accuracies,
    disagreement_matrix,
    every_head,
    expected_calibration_error,
    fit_fusion_weight,
    fit_temperature,
    interval,
    judge,
    linear_cka,
    mcnemar,
    per_image,
    reliability,
    scale_temperature,
    token_cosines,
)
from deit_kd.metrics.heads import weighted


def guesses(images: int = 500, classes: int = 6, sharpness: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits that are calibrated at temperature `sharpness`, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return logits * sharpness, labels


def test_scores_of_one_image_are_those_of_a_hand() -> None:
    log_probabilities = torch.tensor([[0.5, 0.3, 0.2]]).log()
    values = per_image(log_probabilities, answered(log_probabilities, torch.tensor([1])))
    assert "top5" not in values  # of 3 classes
    assert float(values["top1"]) == 0
    assert float(values["nll"]) == pytest.approx(-math.log(0.3))
    assert float(values["brier"]) == pytest.approx(0.5**2 + 0.7**2 + 0.2**2)


def test_ece_of_two_bins_is_that_of_a_hand() -> None:
    # Two images at confidence .9, one right: gap .4. Two at .6, both right: gap .4.
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert expected_calibration_error(probabilities, torch.tensor([0, 1, 0, 0])) == pytest.approx(0.4)


def test_the_gaps_that_are_drawn_from_add_up_to_torchmetrics_ece() -> None:
    logits, labels = guesses(sharpness=2)
    probabilities = logits.softmax(-1)
    own = float(calibration_gaps(probabilities, labels).mean(0).abs().sum())
    assert own == pytest.approx(expected_calibration_error(probabilities, labels), abs=1e-6)


def test_reliability_counts_every_image_once_a_certain_one_too() -> None:
    rows = reliability(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.52, 0.48]]), torch.tensor([0, 0, 1]))
    counts: list[Any] = [row["n"] for row in rows]
    assert sum(counts) == 3
    assert counts[-1] == 1
    assert rows[-1]["accuracy"] == 1
    assert rows[0] == {"from": 0, "to": 1 / 15, "n": 0, "confidence": None, "accuracy": None}


def test_a_confidence_on_an_edge_belongs_to_the_bin_above() -> None:
    edge = float(torch.linspace(0, 1, 16)[9])
    rows = reliability(torch.tensor([[edge, 1 - edge]]), torch.tensor([0]))
    assert [row["n"] for row in rows].index(1) == 9


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_temperature_scaling_finds_what_the_logits_were_multiplied_by(sharpness: float) -> None:
    logits, labels = guesses(images=4000, sharpness=sharpness)
    found = fit_temperature(logits.log_softmax(-1), labels)
    assert found == pytest.approx(sharpness, rel=0.08)
    torch.testing.assert_close(scale_temperature(logits.log_softmax(-1), found), (logits / found).log_softmax(-1))


@pytest.mark.parametrize("fusion", ["softmax", "logits"])
@pytest.mark.parametrize("useful_head", ["cls", "dist"])
def test_the_best_fusion_weight_leaves_out_a_head_that_guesses(fusion: str, useful_head: str) -> None:
    good, labels = guesses()
    noise = 5 * torch.randn(good.shape, generator=torch.Generator().manual_seed(1))
    output = StudentOutput(good, noise) if useful_head == "cls" else StudentOutput(noise, good)
    weight = fit_fusion_weight(output, labels, lambda both, weight: weighted(fusion, both, weight))
    assert weight > 0.9 if useful_head == "cls" else weight < 0.1


def test_equal_weights_are_the_two_fusions() -> None:
    output = StudentOutput(guesses(seed=0)[0], guesses(seed=1)[0])
    for fusion in ("softmax", "logits"):
        torch.testing.assert_close(weighted(fusion, output, 0.5), every_head(output)[f"fused_{fusion}"])


def test_the_bootstrap_finds_the_standard_error_of_a_mean() -> None:
    values = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    low, high = interval(bootstrap_means(values, seed=0)[:, 1])
    standard_error = float(values[:, 1].std()) / 20
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error, rel=0.1)
    assert low < float(values[:, 1].mean()) < high


def test_the_bootstrap_draws_the_same_images_for_every_column_and_every_time() -> None:
    values = torch.randn(50, 1).repeat(1, 2)
    means = bootstrap_means(values, seed=3, draws=20)
    assert torch.equal(means[:, 0], means[:, 1])
    assert torch.equal(means, bootstrap_means(values, seed=3, draws=20))
    assert not torch.equal(means, bootstrap_means(values, seed=4, draws=20))


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (3, 3, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (4, 1, 12 / 32)],
)
def test_mcnemar_is_the_exact_sign_test(only_first: int, only_second: int, p: float) -> None:
    first = torch.tensor([True] * only_first + [False] * only_second + [True, False])
    second = torch.tensor([False] * only_first + [True] * only_second + [True, False])
    assert mcnemar(first, second) == {
        "only_first": only_first,
        "only_second": only_second,
        "p": pytest.approx(p),
    }


def test_the_disagreement_matrix_counts_images_that_differ() -> None:
    found = disagreement_matrix({"truth": torch.tensor([0, 1, 2, 3]), "cls": torch.tensor([0, 1, 0, 0])})
    assert found == {"names": ["truth", "cls"], "matrix": [[0, 0.5], [0.5, 0]]}


def test_accuracy_by_class_leaves_out_a_class_without_images() -> None:
    labels = torch.tensor([0, 0, 2])
    found = class_accuracies({"cls": torch.tensor([0, 1, 2])}, labels, classes=3)
    assert found == {"support": [2, 0, 1], "cls": [50.0, None, 100.0]}


def test_cka_is_one_up_to_rotation_and_scale_and_small_for_strangers() -> None:
    features = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
    assert linear_cka(features, 3 * features @ rotation + 1) == pytest.approx(1)
    assert linear_cka(features, torch.randn(300, 8, generator=torch.Generator().manual_seed(2))) < 0.1
    assert linear_cka(features, torch.ones(300, 4)) == 0


def test_token_cosines_compare_the_first_two_tokens() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [9.0, 9.0]], [[1.0, 2.0], [2.0, 4.0], [9.0, 9.0]]])
    torch.testing.assert_close(token_cosines(tokens), torch.tensor([math.sqrt(0.5), 1.0]))


def test_a_judgement_holds_every_head_and_its_intervals() -> None:
    (cls, labels), (dist, _), (teacher, _) = guesses(seed=0), guesses(seed=1), guesses(seed=2)
    judged = judge(
        StudentOutput(cls, dist),
        labels,
        teacher_logits=teacher,
        others={"other": {"cls": dist.argmax(-1), "dist": cls.argmax(-1), "fused": teacher.argmax(-1)}},
        fusion="logits",
        seed=0,
    )
    assert judged["heads"]["fused"] == judged["heads"]["fused_logits"] != judged["heads"]["fused_softmax"]
    for score in (*judged["heads"].values(), judged["teacher"]):
        assert score["intervals"].keys() == {"top1", "top5", "nll", "brier", "ece"}
        for key, (low, high) in score["intervals"].items():
            # Resampled noise adds to a sum of absolute gaps: the interval of the ECE may lie above it.
            assert low <= score[key] <= high or key == "ece"
    assert judged["disagreement"]["names"] == ["truth", "cls", "dist", "fused", "teacher", "other"]
    assert [(row["first"], row["second"]) for row in judged["comparisons"]] == [
        *(("cls", "dist"), ("cls", "fused"), ("dist", "fused")),
        *(("fused", "other"), ("cls", "other, cls"), ("dist", "other, dist")),
    ]
    own, crossed = judged["comparisons"][0], judged["comparisons"][4]
    assert (own["difference"], own["interval"], own["p"]) == (
        crossed["difference"],
        crossed["interval"],
        crossed["p"],
    )  # its class head is the other's distillation head, and the other way round


def test_temperature_and_weight_are_scored_on_images_that_they_were_not_fitted_on() -> None:
    logits, labels = guesses(images=40, sharpness=4)
    judged = judge(StudentOutput(logits, logits), labels, teacher_logits=None, others={}, fusion="softmax", seed=0)
    scaled = judged["temperature"]["cls"]
    assert scaled["after"]["nll"] < scaled["before"]["nll"]
    assert judged["heads"]["cls"]["nll"] != scaled["before"]["nll"]  # half of the images, not all


def test_a_student_with_one_head_is_judged_by_it_alone() -> None:
    logits, labels = guesses(images=30)
    judged = judge(StudentOutput(logits), labels, teacher_logits=None, others={}, fusion="softmax", seed=0)
    assert [name for name, score in judged["heads"].items() if score is not None] == ["cls"]
    assert judged["fusion_weight"] is None
    assert judged["comparisons"] == []
    assert judged["agreement"] == {"cls_teacher": None, "dist_teacher": None, "cls_dist": None}


def test_a_certain_image_and_a_nearly_certain_one_share_a_bin() -> None:
    probabilities = torch.tensor([[1.0, 0.0], [0.95, 0.05]])
    labels = torch.tensor([1, 0])  # gap -1 and .05: .475 together, .525 apart
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.475)
    assert float(calibration_gaps(probabilities, labels).mean(0).abs().sum()) == pytest.approx(0.475)


def test_another_student_stands_in_for_no_head_and_for_no_teacher_whatever_it_is_called() -> None:
    logits, labels = guesses()
    wrong = (labels + 1) % 6
    others = {name: {"cls": wrong} for name in ("teacher", "cls", "small")}
    judged = judge(
        StudentOutput(logits, logits.flip(0)), labels, teacher_logits=logits, others=others, fusion="softmax", seed=0
    )
    names, matrix = judged["disagreement"]["names"], judged["disagreement"]["matrix"]
    assert names == ["truth", "cls", "dist", "fused", "teacher", "teacher (student)", "cls (student)", "small"]
    assert matrix[names.index("cls")][names.index("teacher")] == 0
    assert matrix[names.index("truth")][names.index("cls (student)")] == 1
