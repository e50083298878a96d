"""The label store: a teacher's answers to every view, kept on disk and replayed for any student."""

from deit_kd.store.folder import VALIDATION, VIEWS_FIELD, LabelStore, epoch_part
from deit_kd.store.record import Record
from deit_kd.store.teacher import RecordingTeacher, StoredTeacher

__all__ = [
    "VALIDATION",
    "VIEWS_FIELD",
    "LabelStore",
    "Record",
    "RecordingTeacher",
    "StoredTeacher",
    "epoch_part",
]
