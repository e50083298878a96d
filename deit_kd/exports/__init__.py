"""Exports a student in the formats of other libraries; each export is read again by its library before it is kept."""

from deit_kd.exports.about import About
from deit_kd.exports.compare import export, missing_libraries, read_again, write
from deit_kd.exports.formats import FORMATS
from deit_kd.exports.opened import OpenedModel, open_exported
from deit_kd.exports.plain_vit import CannotHold
from deit_kd.exports.traced import OPSET, Choices

__all__ = [
    "FORMATS",
    "OPSET",
    "About",
    "CannotHold",
    "Choices",
    "OpenedModel",
    "export",
    "missing_libraries",
    "open_exported",
    "read_again",
    "write",
]
