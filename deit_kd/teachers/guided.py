"""Answers from one teacher, feature maps from another: a label store or a large network, and a small one online."""

from __future__ import annotations

from deit_kd.interfaces import Batch, Teacher, TeacherOutput
from deit_kd.teachers.frozen import FrozenTeacher


class GuidedTeacher:
    """Answers a batch with the logits of one teacher, also those at places, and the features of another.

    Args:
        answers: gives the logits; None if only features are compared.
        guide: gives the features.
    """

    def __init__(self, answers: Teacher | None, guide: FrozenTeacher) -> None:
        self.answers = answers
        self.guide = guide

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Answer `batch` with logits [B, C] and features."""
        answer = TeacherOutput(None) if self.answers is None else self.answers(batch)
        return answer._replace(features=self.guide(batch).features)
