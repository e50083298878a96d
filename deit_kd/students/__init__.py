"""Students: timm models that answer with a class head and, if they have the token, a distillation head."""

from deit_kd.students.build import build_student
from deit_kd.students.connectors import ConnectedStudent, Connectors
from deit_kd.students.heads import TimmStudent
from deit_kd.students.quantized import QuantizedStudent, int8_kernels, open_quantized, save_quantized

__all__ = [
    "ConnectedStudent",
    "Connectors",
    "QuantizedStudent",
    "TimmStudent",
    "build_student",
    "int8_kernels",
    "open_quantized",
    "save_quantized",
]
