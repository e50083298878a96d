"""Distil vision transformers in DeiT style, with two token heads measured apart."""

import deit_kd.openmp  # noqa: F401 - before torch
from deit_kd.engine import Distiller
from deit_kd.interfaces import Batch, InputError, StudentOutput, TeacherOutput, head_probabilities
from deit_kd.losses import Objective, Terms, hard_distillation, soft_distillation, soft_target_cross_entropy
from deit_kd.store import LabelStore, StoredTeacher
from deit_kd.students import TimmStudent
from deit_kd.teachers import FrozenTeacher

__all__ = [
    "Batch",
    "Distiller",
    "FrozenTeacher",
    "InputError",
    "LabelStore",
    "Objective",
    "StoredTeacher",
    "StudentOutput",
    "TeacherOutput",
    "Terms",
    "TimmStudent",
    "hard_distillation",
    "head_probabilities",
    "soft_distillation",
    "soft_target_cross_entropy",
]
__version__ = "0.1.0"
