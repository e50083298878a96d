"""Scores of heads: exact counts during training, and a full evaluation of a split's probabilities afterwards."""

from deit_kd.metrics.answered import Answered, agreement, answered, joined, ranks, score
from deit_kd.metrics.calibration import (
    BINS,
    calibration_gaps,
    expected_calibration_error,
    fit_fusion_weight,
    fit_temperature,
    reliability,
    scale_temperature,
)
from deit_kd.metrics.comparison import class_accuracies, disagreement_matrix, followed, mcnemar
from deit_kd.metrics.heads import every_head, judge, names_in_every_head, per_image
from deit_kd.metrics.intervals import bootstrap_means, interval
from deit_kd.metrics.neighbours import neighbour_classes, score_neighbours
from deit_kd.metrics.paired import compare_heads
from deit_kd.metrics.representation import linear_cka, token_cosines

__all__ = [
    "BINS",
    "Answered",
    "agreement",
    "answered",
    "bootstrap_means",
    "calibration_gaps",
    "class_accuracies",
    "compare_heads",
    "disagreement_matrix",
    "every_head",
    "expected_calibration_error",
    "fit_fusion_weight",
    "fit_temperature",
    "followed",
    "interval",
    "joined",
    "judge",
    "linear_cka",
    "mcnemar",
    "names_in_every_head",
    "neighbour_classes",
    "per_image",
    "ranks",
    "reliability",
    "scale_temperature",
    "score",
    "score_neighbours",
    "token_cosines",
]
