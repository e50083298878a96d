"""Losses: pure functions per example, and the one objective that weighs, casts and averages them."""

from deit_kd.losses.classification import soft_target_cross_entropy
from deit_kd.losses.dense import DenseTerm
from deit_kd.losses.guide import guide
from deit_kd.losses.hard import hard_distillation
from deit_kd.losses.links import Shapes, map_links, pooled_links
from deit_kd.losses.objective import CheckedTerms, Objective, Term, Terms, check_taught
from deit_kd.losses.pooled import pooled_cosine, pooled_huber
from deit_kd.losses.relations import relations
from deit_kd.losses.soft import soft_distillation
from deit_kd.losses.standardised import LEAST_STANDARDISED, standardised_distillation
from deit_kd.losses.terms import PEERS, FeatureTerm, LogitTerm, Needs

__all__ = [
    "LEAST_STANDARDISED",
    "PEERS",
    "CheckedTerms",
    "DenseTerm",
    "FeatureTerm",
    "LogitTerm",
    "Needs",
    "Objective",
    "Shapes",
    "Term",
    "Terms",
    "check_taught",
    "guide",
    "hard_distillation",
    "map_links",
    "pooled_cosine",
    "pooled_huber",
    "pooled_links",
    "relations",
    "soft_distillation",
    "soft_target_cross_entropy",
    "standardised_distillation",
]
