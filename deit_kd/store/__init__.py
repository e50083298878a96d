"""The label store: a teacher's answers to every view, kept on disk and replayed for any student."""

from deit_kd.store.ahead import Checksums
from deit_kd.store.folder import LabelStore, epoch_part
from deit_kd.store.manifest import MANIFEST, PARTS, VALIDATION, VIEWS_FIELD
from deit_kd.store.record import Gap, Record
from deit_kd.store.shares import (
    Division,
    Plan,
    Share,
    forget_parts,
    missing_parts,
    plan_of,
    progress_of_parts,
    seconds_left,
)
from deit_kd.store.teacher import RecordingTeacher, StoredTeacher

__all__ = [
    "MANIFEST",
    "PARTS",
    "VALIDATION",
    "VIEWS_FIELD",
    "Checksums",
    "Division",
    "Gap",
    "LabelStore",
    "Plan",
    "Record",
    "RecordingTeacher",
    "Share",
    "StoredTeacher",
    "epoch_part",
    "forget_parts",
    "missing_parts",
    "plan_of",
    "progress_of_parts",
    "seconds_left",
]
