"""Losses: pure functions per example, and the one objective that weighs, casts and averages them."""

from deit_kd.losses.classification import soft_target_cross_entropy
from deit_kd.losses.hard import hard_distillation
from deit_kd.losses.objective import CheckedTerms, Objective, Terms
from deit_kd.losses.soft import soft_distillation

__all__ = ["CheckedTerms", "Objective", "Terms", "hard_distillation", "soft_distillation", "soft_target_cross_entropy"]
