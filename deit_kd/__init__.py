"""Distil vision transformers in DeiT style, with two token heads scored separately."""

import importlib
import typing

import deit_kd.openmp  # noqa: F401 - before torch

if typing.TYPE_CHECKING:
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

# Subpackages are imported on first use, so that the command line can report a misspelt key without waiting for torch.
_ROOMS = {
    "engine": ["Distiller"],
    "interfaces": ["Batch", "InputError", "StudentOutput", "TeacherOutput", "head_probabilities"],
    "losses": ["Objective", "Terms", "hard_distillation", "soft_distillation", "soft_target_cross_entropy"],
    "store": ["LabelStore", "StoredTeacher"],
    "students": ["TimmStudent"],
    "teachers": ["FrozenTeacher"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> typing.Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
