"""Two teachers: one reads a label store, the other fills a store while it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from deit_kd.interfaces import POOLED, Batch, InputError, TeacherOutput
from deit_kd.store.ahead import Checksums, ReadAhead
from deit_kd.store.folder import LabelStore, epoch_part

VIEWS_PER_PIECE = 4096
ADD_A_COLUMN = "build another store with this term in its recipe (deit-kd store build)"
SECONDS_PER_PIECE = 60.0  # the most work that a slow teacher loses when it is killed


class StoredTeacher:
    """Answers views with the records of a store, without running a network.

    Args:
        store: holds the epochs of the views.
        epochs: how many of them a run cycles.
        checksums: of its epochs; by default all have been compared already.
    """

    def __init__(self, store: LabelStore, epochs: int, checksums: Checksums | None = None) -> None:
        self.store = store
        self._checksums = checksums or Checksums(store)
        self._ahead: ReadAhead | None = None
        self._dense = self._vectors = False
        self.facts: dict[str, Any] = {**store.manifest["teacher"], "store": store.digest, "view_epochs": epochs}

    def lines(self, role: str = "teacher") -> list[str]:
        """Return the lines to print about it."""
        return []

    @property
    def grid(self) -> tuple[int, int] | None:
        """The grid of its dense labels; None if it has none."""
        return self.store.record.grid

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the features that it can answer with, by name.

        Raises:
            InputError: it has none.
        """
        if self.store.record.width is None:
            raise InputError(f"distill.terms: {self.store.folder} has no column for features; {ADD_A_COLUMN}")
        return {POOLED: torch.Size([self.store.record.width])}

    def ask_for(self, features: Sequence[str]) -> None:
        """From now on, also answer with these features: ``pooled`` or none.

        Raises:
            InputError: the store has others, or none.
        """
        for name in features:
            if name != POOLED or self.store.record.width is None:
                raise InputError(f"distill.terms: {self.store.folder} has no column for {name}; {ADD_A_COLUMN}")
        self._vectors = bool(features)

    def ask_for_dense(self, asked: bool) -> None:
        """From now on, also answer with dense labels, or no longer.

        Raises:
            InputError: the store has none.
        """
        if asked and self.grid is None:
            raise InputError(f"distill.terms: {self.store.folder} has no column for dense; {ADD_A_COLUMN}")
        self._dense = asked

    @contextmanager
    def reading_ahead(self, blocks: Iterable[Tensor], epochs: Iterable[int], pinned: bool) -> Iterator[None]:
        """Let threads, which end with the context, read what will be asked for; the arguments are `ReadAhead`'s.

        The answers are the same. What cannot be read raises its error when it is asked for.
        """
        with closing(ReadAhead(self.store, self._checksums, blocks, epochs, pinned)) as self._ahead:
            try:
                yield
            finally:
                self._ahead = None

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Answer the views of `batch` with logits [B, C] in fp32, on the device of its images.

        Raises:
            InputError: a view is not in the store, the store has one that `batch` lacks, or a part is damaged.
        """
        if batch.view_ids is None:
            raise InputError("teacher.store: answers only views of the training loader, which have view_ids")
        view_ids = batch.view_ids.cpu()
        for epoch in set(view_ids[:, 0].tolist()):
            self._checksums.expect(epoch_part(epoch))
        device = batch.images.device
        records = None if self._ahead is None else self._ahead.next(view_ids)
        if records is None:
            records = self.store.find(view_ids, pinned=device.type == "cuda")
        self.store.expect_missing(batch.missing_ids())
        unasked = {"dense": not self._dense, POOLED: not self._vectors}
        sent = {name: _sent(column, device) for name, column in records.items() if not unasked.get(name, False)}
        features = {POOLED: sent[POOLED].float()} if POOLED in sent else None
        return TeacherOutput(self.store.record.decode(sent), features, dense_labels=sent.get("dense"))


def _sent(column: Tensor, device: torch.device) -> Tensor:
    """Return `column` on `device`; a copy to CUDA from memory that is not pinned would wait for what it is doing."""
    return column.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else column.to(device)


class RecordingTeacher:
    """Runs another teacher and keeps its answers to views; call `flush` at the end of an epoch.

    Views that a batch lacks are marked as missing.

    Args:
        teacher: to run.
        store: this process may write pieces to it.
        shares: gives the share of dense logits [B] in the target of views [B, 2]; only for a store with dense labels.
    """

    def __init__(self, teacher: Any, store: LabelStore, shares: Callable[[Tensor], Tensor] | None = None) -> None:
        self.store = store
        self.teacher = teacher
        self._shares = shares
        if store.record.grid is not None:
            teacher.ask_for_dense(True)
        if store.record.width is not None:
            teacher.ask_for((POOLED,))
        self._kept: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._views, self._since = 0, time.monotonic()

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Answer `batch` as the other teacher does."""
        answer: TeacherOutput = self.teacher(batch)
        logits = answer.needed_logits()
        if batch.view_ids is not None:
            view_ids = batch.view_ids.clone()  # or a file would stay open for each of a worker's tensors
            vectors = None if self.store.record.width is None else (answer.features or {})[POOLED]
            records = self.store.record.encode(logits, self._dense_labels(answer, view_ids), vectors)
            self._kept.append((view_ids, records))
            if batch.missing:
                marks = self.store.record.missing(len(batch.missing), logits.device)
                self._kept.append((batch.missing_ids(), marks))
            self._views += batch.places
            if self._views >= VIEWS_PER_PIECE or time.monotonic() - self._since >= SECONDS_PER_PIECE:
                self.flush()
        return answer

    def _dense_labels(self, answer: TeacherOutput, view_ids: Tensor) -> Tensor | None:
        if self.store.record.grid is None:
            return None
        assert self._shares is not None
        mixed = answer.mixed(_sent(self._shares(view_ids), answer.needed_logits().device))
        return mixed.argmax(-1).where(mixed.isfinite().all(-1), -1)

    def ask_for(self, features: Sequence[str]) -> None:
        """Ask the other teacher for these features; a store with pooled vectors needs them always."""
        kept = [] if self.store.record.width is None else [POOLED]
        self.teacher.ask_for(tuple(dict.fromkeys([*features, *kept])))

    def ask_for_dense(self, asked: bool) -> None:
        """Ask the other teacher for logits at each place, or no longer; a store with dense labels needs them always."""
        self.teacher.ask_for_dense(asked or self.store.record.grid is not None)

    @property
    def grid(self) -> tuple[int, int] | None:
        """The grid of the other teacher's dense logits."""
        grid: tuple[int, int] | None = self.teacher.grid
        return grid

    @property
    def facts(self) -> dict[str, Any]:
        """What a run records about the other teacher."""
        facts: dict[str, Any] = self.teacher.facts
        return facts

    def lines(self, role: str = "teacher") -> list[str]:
        """Return the lines to print about the other teacher."""
        lines: list[str] = self.teacher.lines(role)
        return lines

    def state_dict(self) -> dict[str, Any]:
        """Return the other teacher's weights."""
        return self.teacher.state_dict()

    def flush(self) -> None:
        """Write what is still in memory.

        Raises:
            InputError: an answer was not finite, or the disk is full.
        """
        self._since = time.monotonic()
        if not self._kept:
            return
        view_ids = torch.cat([ids.cpu() for ids, _ in self._kept])
        columns = {
            name: torch.cat([records[name] for _, records in self._kept]).cpu() for name in self.store.record.empty(0)
        }
        self._kept, self._views = [], 0
        for epoch in view_ids[:, 0].unique().tolist():
            rows = view_ids[:, 0] == epoch
            records = {name: column[rows] for name, column in columns.items()}
            self.store.write_piece(epoch_part(epoch), view_ids[rows, 1], records)
