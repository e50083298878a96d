"""From a photo to a view: by timm's transforms and Pillow, or from rows of parameters on a device."""

from deit_kd.views.executor import EXECUTOR_VERSION, Executor, PhotoBuffer
from deit_kd.views.policy import Operation
from deit_kd.views.rows import Drawing, Rows, draw
from deit_kd.views.transforms import Transform, evaluation_transform, training_transform

__all__ = [
    "EXECUTOR_VERSION",
    "Drawing",
    "Executor",
    "Operation",
    "PhotoBuffer",
    "Rows",
    "Transform",
    "draw",
    "evaluation_transform",
    "training_transform",
]
