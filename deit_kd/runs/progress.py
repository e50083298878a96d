"""How far a run is, and the results of its steps since the last record."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit_kd.distributed import Processes
from deit_kd.engine import STEP_TERMS, StepResult, result_columns


class BadStep(NamedTuple):
    """A step that was left out, as one process saw it."""

    step: int  # from 1
    terms: dict[str, float]
    is_finite: list[bool]  # the loss of each view


class Progress:
    """How far a run is: steps done, their results since the last record, and the best epoch.

    Results stay on the device until the next record.

    Args:
        device: of the results.
        further_terms: kinds of the further terms of the student's objective.
        peers: the same of each peer's, by its name.
    """

    def __init__(
        self,
        device: torch.device,
        further_terms: Sequence[str] = (),
        peers: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        self._device = device
        self._further_terms, self._peers = further_terms, peers
        self.step = 0
        self.best_top1 = -1.0
        self.epoch_is_scored = True
        self.bad_in_a_row = 0
        self.unanswered_in_a_row = 0  # steps in which an answer of the teacher was not finite
        self.bad_steps: list[BadStep] = []  # since the last record, in this process
        self._results: list[StepResult] = []
        columns = result_columns([further_terms, *peers.values()])
        self._earlier = torch.zeros(0, columns, device=device)  # rows that a checkpoint kept since the last record
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time until now from the rate."""
        self._since, self._steps_since = time.perf_counter(), 0

    def add(self, result: StepResult) -> None:
        """Count one step."""
        self.step += 1
        self._steps_since += 1
        self._results.append(result)

    def read(self, processes: Processes, batch_size: int, overdue: bool = False) -> tuple[dict[str, Any], bool]:
        """Return the means over finite steps and processes, and start over; the one place that waits for the device.

        Also returns whether any process is `overdue`.
        """
        rows = self._rows()
        finite = rows.isfinite().all(1) if self._peers else rows[:, :3].isfinite().all(1)
        sums = rows.where(finite[:, None], 0.0).sum(0)
        counts = [finite.sum()[None], torch.tensor([float(overdue)]).to(rows)]
        parts = [rows[:, 4], sums[:3], sums[len(STEP_TERMS) :], *counts]  # the first by step
        all_sums = processes.sum(torch.cat(parts)).tolist()
        not_finite, (*terms, count, overdue_anywhere) = all_sums[: len(rows)], all_sums[len(rows) :]
        means = iter([value / count if count else None for value in terms])
        left_out = rows[:, 3].tolist()  # the same in every process
        self.bad_steps = [self._bad_step(index - len(rows)) for index, bad in enumerate(left_out) if bad]
        for bad in left_out:
            self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        for unanswered in not_finite:
            self.unanswered_in_a_row = self.unanswered_in_a_row + 1 if unanswered else 0
        elapsed = time.perf_counter() - self._since
        record: dict[str, Any] = {
            **_losses(means),
            "bad_steps": len(self.bad_steps),
            "teacher_not_finite": int(sum(not_finite)),
            "images_per_second": self._steps_since * batch_size / elapsed,
        }
        record |= _terms(means, self._further_terms)
        if self._peers:
            record["peers"] = {name: _losses(means) | _terms(means, kinds) for name, kinds in self._peers.items()}
        self._results, self._earlier = [], self._earlier[:0]
        self.restart_clock()
        return record, bool(overdue_anywhere)

    def _rows(self) -> Tensor:
        """Return the terms [steps, columns] since the last record, of this process."""
        return torch.cat([self._earlier, *(result.terms[None] for result in self._results)])

    def _bad_step(self, index: int) -> BadStep:
        """Return the step at `index` from the end; which views were finite is not known from before a checkpoint."""
        terms = dict(zip(STEP_TERMS[:3], self._rows()[index, :3].tolist(), strict=True))
        known = -index <= len(self._results)
        is_finite = self._results[index].is_finite.tolist() if known else []
        return BadStep(self.step + 1 + index, terms, is_finite)

    def state(self, processes: Processes) -> dict[str, Any]:
        """Return what a checkpoint keeps; all processes must call it."""
        mine = self._rows()
        rows = torch.zeros(processes.count, *mine.shape, device=self._device)
        rows[processes.rank] = mine
        return {
            "step": self.step,
            "best_top1": self.best_top1,
            "epoch_is_scored": self.epoch_is_scored,
            "bad_in_a_row": self.bad_in_a_row,
            "unanswered_in_a_row": self.unanswered_in_a_row,
            "rows": processes.sum(rows),
        }

    def load_state(self, state: dict[str, Any], processes: Processes) -> None:
        """Restore a state that `state()` returned, also with another number of processes."""
        self.step, self.best_top1 = state["step"], state["best_top1"]
        self.epoch_is_scored, self.bad_in_a_row = state["epoch_is_scored"], state["bad_in_a_row"]
        self.unanswered_in_a_row = state.get("unanswered_in_a_row", 0)
        rows = state["rows"].to(self._device)
        self._earlier = rows[processes.rank] if len(rows) == processes.count else rows.mean(0)


def _losses(means: Iterator[float | None]) -> dict[str, Any]:
    return {name: next(means) for name in STEP_TERMS[:3]}


def _terms(means: Iterator[float | None], kinds: Sequence[str]) -> dict[str, Any]:
    """Return ``{"terms": …}``, the mean and the cosine of each further term; empty if there are none."""
    measured = {kind: {"loss": next(means), "cosine": next(means)} for kind in kinds}
    return {"terms": measured} if measured else {}
