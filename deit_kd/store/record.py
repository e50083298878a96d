"""One answer as a record of fixed size: its largest logits and the mass of the rest (TinyViT, arXiv 2207.10666)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_LOGIT = torch.finfo(torch.float16).min
MISSING = {
    "label": -2,
    "logits": -math.inf,
    "classes": 0,
    "rest": 0.0,
    "dense": -2,
    "pooled": 0.0,
}  # the encoding of a missing answer
LEAST_GAP = 2.0**-24  # the smallest fp16 number: a tie in fp16 must not move the argmax


class Gap(NamedTuple):
    """How far records are from new answers to their views."""

    differences: Tensor  # [B]
    spread: Tensor  # [B], the standard deviation of each new answer; 1 where classes are compared

    @property
    def share(self) -> float:
        """The mean difference as a share of the mean spread."""
        return float(self.differences.mean() / self.spread.mean())


@dataclass(frozen=True)
class Record:
    """How answers of C classes are stored; logits are fp16, minus the largest of their row.

    - ``top`` 0: only the class of the largest logit;
    - ``top`` K < C: the K largest logits, their classes, and the log-sum-exp of the rest at T = 1 (fp32);
    - ``top`` >= C: all logits.

    With a `grid` there is also ``dense``, the class of each place (see `TeacherOutput.dense_labels`); with a `width`
    ``pooled``, the teacher's vector in fp16.

    The argmax of the decoded logits is that of the encoded ones, ties included.

    Args:
        classes: C.
        top: K.
        grid: h x w of the places; None for none.
        width: D of the pooled vector; None for none.
    """

    classes: int
    top: int
    grid: tuple[int, int] | None = None
    width: int | None = None

    @property
    def of_whole_images(self) -> Record:
        """The record of the teacher's answers alone."""
        return replace(self, grid=None, width=None)

    @property
    def holds_logits(self) -> bool:
        """Whether it holds more than a hard label."""
        return self.top > 0

    @cached_property
    def _example(self) -> dict[str, Tensor]:
        places = None if self.grid is None else torch.zeros(1, *self.grid, dtype=torch.long)
        vectors = None if self.width is None else torch.zeros(1, self.width)
        return self.encode(torch.zeros(1, self.classes), places, vectors)

    @property
    def bytes_per_view(self) -> int:
        """Size of one record."""
        return sum(column.nbytes for column in self._example.values())

    def empty(self, views: int, pinned: bool = False) -> dict[str, Tensor]:
        """Return columns for `views` records, to be filled, perhaps in pinned memory."""
        return {
            name: column.new_empty((views, *column.shape[1:]), pin_memory=pinned)
            for name, column in self._example.items()
        }

    def missing(self, views: int, device: torch.device | None = None) -> dict[str, Tensor]:
        """Return the columns of views without an answer because their photos cannot be read."""
        return {name: column.fill_(MISSING[name]).to(device) for name, column in self.empty(views).items()}

    @property
    def _index_type(self) -> torch.dtype:
        return torch.int16 if self.classes <= 2**15 else torch.int32

    def encode(
        self, logits: Tensor, dense_labels: Tensor | None = None, vectors: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the columns of logits [B, C], on their device: ``label`` [B], or ``logits`` [B, K] and the others.

        With a `grid`, the classes of places [B, h, w] are one more, ``dense``; with a `width`, vectors [B, D] are
        ``pooled``.
        """
        columns = self._encode(logits)
        if self.grid is not None:
            assert dense_labels is not None
            columns["dense"] = dense_labels.to(self._index_type)
        if self.width is not None:
            assert vectors is not None
            columns["pooled"] = vectors.half()
        return columns

    def _encode(self, logits: Tensor) -> dict[str, Tensor]:
        index_type = self._index_type
        logits = logits.float()
        largest, winner = logits.max(-1)[0], logits.argmax(-1)
        if not self.holds_logits:
            return {"label": torch.where(largest.isfinite(), winner, -1).to(index_type)}
        relative = logits - largest[:, None]
        stored = relative.clamp(LEAST_LOGIT, -LEAST_GAP).half()
        stored = stored.scatter(-1, winner[:, None], 0)
        stored = torch.where(largest.isfinite()[:, None], stored, torch.nan)
        if self.top >= self.classes:
            return {"logits": stored}
        best = stored.float().topk(self.top)
        rest = relative.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
        return {
            "logits": best.values.half(),
            "classes": best.indices.to(index_type),
            "rest": rest.clamp_min(LEAST_LOGIT),
        }

    def decode(self, columns: dict[str, Tensor]) -> Tensor:
        """Return logits [B, C] in fp32.

        Each class that was not kept gets an equal part of the rest's mass, which is exact at T = 1, but never more than
        the smallest kept logit. A hard label is decoded as a one-hot distribution.
        """
        if "label" in columns:
            label = columns["label"].long()[:, None]
            return torch.full((len(label), self.classes), LEAST_LOGIT, device=label.device).scatter_(1, label, 0)
        kept = columns["logits"].float()
        if "classes" not in columns:
            return kept
        share = columns["rest"] - math.log(self.classes - self.top)
        share = torch.minimum(share, kept[:, -1]).clamp_max(-LEAST_GAP)
        return share[:, None].repeat(1, self.classes).scatter_(1, columns["classes"].long(), kept)

    def names_its_classes(self, columns: dict[str, Tensor]) -> bool:
        """Return whether every class in the records is one of the C; a missing answer has none."""
        named = [columns[name][~is_missing(columns)] for name in ("label", "classes", "dense") if name in columns]
        return all(bool(((column >= 0) & (column < self.classes)).all()) for column in named)

    def gaps(
        self,
        columns: dict[str, Tensor],
        logits: Tensor,
        dense_labels: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> dict[str, Gap]:
        """Return how far records are from new answers to their views, for all that they hold; arguments as in `encode`.

        ``argmax`` and ``dense`` compare classes; ``logits`` are the kept ones and the mass of the rest, of which the
        largest difference counts; of ``pooled`` it is the root mean square.
        """
        logits = logits.float()
        alike = torch.ones(len(logits))
        found = {"argmax": Gap((self.decode(columns).argmax(-1) != logits.argmax(-1)).float(), alike)}
        if self.holds_logits:
            found["logits"] = Gap(self.gap(columns, logits), logits.std(-1))
        if self.grid is not None:
            assert dense_labels is not None
            found["dense"] = Gap((dense_labels != columns["dense"]).float().mean((1, 2)), alike)
        if self.width is not None:
            assert vectors is not None
            vectors = vectors.float()
            found["pooled"] = Gap((vectors - columns["pooled"].float()).square().mean(-1).sqrt(), vectors.std(-1))
        return found

    def gap(self, columns: dict[str, Tensor], logits: Tensor) -> Tensor:
        """Return the largest difference [B] between what is kept of logits and new `logits` [B, C]."""
        relative = logits.float() - logits.float().max(-1, keepdim=True)[0]
        if "classes" not in columns:
            return (relative.clamp_min(LEAST_LOGIT) - columns["logits"].float()).abs().max(-1)[0]
        classes = columns["classes"].long()
        rest = relative.scatter(-1, classes, -torch.inf).logsumexp(-1, keepdim=True)
        again = torch.cat([relative.gather(-1, classes), rest], dim=-1).clamp_min(LEAST_LOGIT)
        return (again - torch.cat([columns["logits"].float(), columns["rest"][:, None]], dim=-1)).abs().max(-1)[0]


def is_missing(columns: dict[str, Tensor]) -> Tensor:
    """Return which records [B] stand for views whose photos cannot be read."""
    if "label" in columns:
        return columns["label"] == MISSING["label"]
    return columns["logits"][:, 0] == MISSING["logits"]


def is_whole(columns: dict[str, Tensor]) -> bool:
    """Return whether every record came from an answer whose largest logit was finite, or is marked as missing."""
    if any(bool((columns[name] == -1).any()) for name in ("label", "dense") if name in columns):
        return False
    if "pooled" in columns and not bool(columns["pooled"].isfinite().all()):
        return False
    return not any(bool(columns[name].isnan().any()) for name in ("logits", "rest") if name in columns)
