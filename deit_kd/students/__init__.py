"""Students: timm models that answer with a class head and, if they have the token, a distillation head."""

from deit_kd.students.build import build_student
from deit_kd.students.connectors import ConnectedStudent, Connectors
from deit_kd.students.heads import TimmStudent

__all__ = ["ConnectedStudent", "Connectors", "TimmStudent", "build_student"]
