"""Ways out: a student in the formats of other libraries, each read again by that library before it counts."""

from deit_kd.exports.about import About
from deit_kd.exports.compare import export, missing_libraries, read_again, write
from deit_kd.exports.distilled_vit import CannotHold
from deit_kd.exports.formats import FORMATS

__all__ = ["FORMATS", "About", "CannotHold", "export", "missing_libraries", "read_again", "write"]
