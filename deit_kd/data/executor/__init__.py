"""Views made on a device: rows of parameters (`rows.py`) and photos become batches (`executor.py`)."""

from deit_kd.data.executor.executor import EXECUTOR_VERSION, Executor, PhotoBuffer
from deit_kd.data.executor.policy import Operation
from deit_kd.data.executor.rows import Drawing, Rows, draw

__all__ = ["EXECUTOR_VERSION", "Drawing", "Executor", "Operation", "PhotoBuffer", "Rows", "draw"]
