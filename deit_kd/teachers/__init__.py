"""Teachers: frozen networks that answer in the dataset's classes."""

from deit_kd.teachers.build import build_teacher
from deit_kd.teachers.class_map import ClassMap, build_class_map
from deit_kd.teachers.ensemble import EnsembleTeacher
from deit_kd.teachers.frozen import FrozenTeacher
from deit_kd.teachers.gate import check_columns, check_features, check_score, exchanged_columns, least_top1
from deit_kd.teachers.guided import GuidedTeacher

NetworkTeacher = FrozenTeacher | EnsembleTeacher  # teachers that run one or several networks

__all__ = [
    "ClassMap",
    "EnsembleTeacher",
    "FrozenTeacher",
    "GuidedTeacher",
    "NetworkTeacher",
    "build_class_map",
    "build_teacher",
    "check_columns",
    "check_features",
    "check_score",
    "exchanged_columns",
    "least_top1",
]
