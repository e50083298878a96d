"""Teachers: frozen networks that answer in the dataset's classes."""

from deit_kd.teachers.build import build_teacher
from deit_kd.teachers.frozen import FrozenTeacher

__all__ = ["FrozenTeacher", "build_teacher"]
