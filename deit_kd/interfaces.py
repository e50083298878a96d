"""The nouns that cross the borders between rooms: batches, outputs, and what a student and a teacher are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class InputError(Exception):
    """Something a person gave us cannot be used; the message is one line: value, reason, cure."""


def nearest(value: str, known: Iterable[str]) -> str:
    """Return `` (nearest: a, b)`` for the known names most like `value`, or an empty string."""
    close = difflib.get_close_matches(value, list(known), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""


def printable(text: str) -> str:
    """Return `text` on one line, with escapes for what a terminal would obey and what no encoding holds."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


class Batch(NamedTuple):
    """One block of views."""

    images: Tensor  # [B, 3, H, W], normalised for the student
    targets: Tensor  # [B, C], soft, after mixing and smoothing
    labels: Tensor  # [B], the class of each photo before mixing
    view_ids: Tensor | None = None  # [B, 2]: epoch and position, in host memory; None outside our loader

    def to(self, device: torch.device) -> Batch:
        """Move every tensor but `view_ids` to `device` without waiting for the copy.

        A label store finds its records by `view_ids`; read from a device, they would stop the loop at every step.
        """

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(moved(self.images), moved(self.targets), moved(self.labels), self.view_ids)


class StudentOutput(NamedTuple):
    """What a student answers, the same in train and in eval."""

    cls_logits: Tensor  # [B, C]
    dist_logits: Tensor | None = None  # [B, C]; None exactly when there is no distillation token
    features: tuple[Tensor, ...] | None = None


class TeacherOutput(NamedTuple):
    """What a teacher answers, in the dataset's classes."""

    logits: Tensor  # [B, C]
    features: tuple[Tensor, ...] | None = None


class Student(Protocol):
    """Anything that answers images with both heads."""

    def __call__(self, images: Tensor) -> StudentOutput: ...


class Teacher(Protocol):
    """Anything that answers a batch without gradient: a network, an ensemble, a label store."""

    def __call__(self, batch: Batch) -> TeacherOutput: ...


def head_probabilities(output: StudentOutput, fusion: str = "softmax") -> dict[str, Tensor]:
    """Return each head's class probabilities in fp32, and of both heads fused.

    Args:
        output: logits of one batch, each [B, C].
        fusion: ``softmax`` is the mean of the two softmaxes (DeiT, arXiv 2012.12877, section 4);
            ``logits`` is the softmax of the mean logits (the published deit and timm code).

    Returns:
        ``cls`` and, when the student has a distillation token, ``dist`` and ``fused``; each [B, C].
    """
    cls_logits = output.cls_logits.float()
    heads = {"cls": cls_logits.softmax(-1)}
    if output.dist_logits is None:
        return heads
    dist_logits = output.dist_logits.float()
    heads["dist"] = dist_logits.softmax(-1)
    if fusion == "softmax":
        heads["fused"] = (heads["cls"] + heads["dist"]) / 2
    else:
        heads["fused"] = ((cls_logits + dist_logits) / 2).softmax(-1)
    return heads
