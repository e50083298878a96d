"""A store that many machines build: each answers its share of the views on its own, and joining finishes."""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict

from deit_kd.console import duration_text
from deit_kd.files import held, read_json, write_json, write_unless_there
from deit_kd.interfaces import InputError, counted
from deit_kd.store.folder import LabelStore, epoch_part, said_clearly
from deit_kd.store.manifest import PARTS, VALIDATION

PLAN = "plan.json"
PROGRESS = "progress.json"
SECONDS_UNTIL_SILENT = 600.0  # a part that has not written its progress for so long is not being built


class Plan(TypedDict):
    """What all parts of a store agree on, and what divides the views among them."""

    parts: int
    epochs: int
    batch_size: int


class Progress(TypedDict):
    """How far one part is."""

    done: int
    views: int
    views_per_second: float
    at: float  # seconds since the epoch, when this was written


@dataclass(frozen=True)
class Division:
    """How the views of a store are divided: each part has the same number of blocks, in a row.

    A block is a batch of an epoch. So the teacher sees the batches that it would see if one process built the store,
    and nearly every epoch belongs to one part alone, which finishes it. The first part also answers the validation set.

    Args:
        plan: of the store.
        views: of an epoch.
        validation: images.
    """

    plan: Plan
    views: int
    validation: int

    @property
    def _block(self) -> int:
        return self.plan["batch_size"] + self.plan["batch_size"] % 2

    @property
    def _blocks_per_epoch(self) -> int:
        return -(-self.views // self._block)

    def _cut(self, number: int) -> int:
        """Return how many blocks the first `number` parts have."""
        validation = -(-self.validation // self._block)
        whole = validation + self.plan["epochs"] * self._blocks_per_epoch
        return max(0, number * whole // self.plan["parts"] - validation)

    def positions(self, number: int) -> dict[int, range]:
        """Return the positions of part `number` (from 1), by epoch."""
        first, last, per_epoch = self._cut(number - 1), self._cut(number), self._blocks_per_epoch
        found = {}
        for epoch in range(first // per_epoch, -(-last // per_epoch)):
            start = max(first - epoch * per_epoch, 0) * self._block
            stop = min((last - epoch * per_epoch) * self._block, self.views)
            if start < stop:
                found[epoch] = range(start, stop)
        return found

    def parts_of(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the number [n] of the part that each view [n] belongs to."""
        cuts = [self._cut(number) for number in range(1, self.plan["parts"] + 1)]
        return np.searchsorted(cuts, epoch * self._blocks_per_epoch + positions // self._block, side="right") + 1


@dataclass(frozen=True)
class Share:
    """One part of a store, numbered from 1, and the plan that it belongs to."""

    number: int
    plan: Plan

    @classmethod
    def parse(cls, text: str, epochs: int, batch_size: int) -> Share:
        """Return the share called `text`, such as ``3/16``.

        Raises:
            InputError: it is not two numbers, or the first is out of range.
        """
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if found is None:
            raise InputError(f"--part: {text!r} is not a part; write 3/16 for the third of 16")
        number, parts = int(found[1]), int(found[2])
        if not 1 <= number <= parts:
            raise InputError(f"--part: {text} is out of range; parts are numbered from 1/{parts} to {parts}/{parts}")
        return cls(number, {"parts": parts, "epochs": epochs, "batch_size": batch_size})

    @property
    def name(self) -> str:
        """Its name for people."""
        return f"{self.number}/{self.plan['parts']}"

    def folder(self, store: str | Path) -> Path:
        """Return the folder of its own files in a store."""
        return Path(store).expanduser() / PARTS / f"{self.number}-of-{self.plan['parts']}"

    @contextmanager
    def lock(self, store: str) -> Iterator[None]:
        """Lock this part of a store; other parts may be built meanwhile, but nothing else may write to the store.

        Raises:
            InputError: another process builds this part, or writes to the whole store.
        """
        busy = f"--part: {self.name} of {store} is being built by another process; wait for it, or build another part"
        with LabelStore.lock(store, shared=True), held(self.folder(store), busy):
            yield

    def refuse_other(self, store: str | Path) -> None:
        """Raise an InputError if the store is being built by another plan."""
        there = plan_of(store)
        if there is None or there == self.plan:
            return
        file = Path(store).expanduser() / PARTS / PLAN
        raise InputError(
            f"--part: {store} is being built in {_said(there)}, not in {_said(self.plan)}; use the same, or delete "
            f"{file} to divide it anew (what was answered is kept)"
        )

    def agree(self, store: str | Path) -> None:
        """Write the plan, or raise an InputError if another part has written another one."""
        place = Path(store).expanduser()
        with said_clearly(place):
            write_unless_there(place / PARTS / PLAN, self.plan)
        self.refuse_other(store)

    def positions(self, store: LabelStore) -> dict[int, range]:
        """Return the positions that it answers, by epoch."""
        return Division(self.plan, store.manifest["views"], store.manifest["validation"]).positions(self.number)

    def finished(self, store: LabelStore) -> list[str]:
        """Return which files of the store it has a share in and are complete."""
        parts = [epoch_part(epoch) for epoch in self.positions(store)] + [VALIDATION] * (self.number == 1)
        return [part for part in parts if store.holds(part)]

    def tell(self, store: str | Path, done: int, views: int, views_per_second: float) -> None:
        """Write how far this part is."""
        progress = Progress(done=done, views=views, views_per_second=views_per_second, at=time.time())
        with said_clearly(Path(store).expanduser()):
            write_json(self.folder(store) / PROGRESS, progress)


def _said(plan: Plan) -> str:
    return (
        f"{counted(plan['parts'], 'part')} of {counted(plan['epochs'], 'epoch')} with --batch_size {plan['batch_size']}"
    )


def plan_of(store: str | Path) -> Plan | None:
    """Return the plan of a store that is being built in parts; None if it is not."""
    file = Path(store).expanduser() / PARTS / PLAN
    return read_json(file, Plan) if file.is_file() else None


def all_progress(store: str | Path, plan: Plan) -> list[Progress | None]:
    """Return how far each part is; None if it has not begun."""
    files = [Share(number, plan).folder(store) / PROGRESS for number in range(1, plan["parts"] + 1)]
    return [read_json(file, Progress) if file.is_file() else None for file in files]


def seconds_left(told: Sequence[Progress | None], views: int, now: float) -> float | None:
    """Return how long all parts will take if those being built go on as they do; None if none is being built.

    Args:
        told: how far each part is.
        views: of all parts.
        now: seconds since the epoch.
    """
    active = [part for part in told if part and part["done"] < part["views"] and part["views_per_second"] > 0]
    active = [part for part in active if now - part["at"] < SECONDS_UNTIL_SILENT]
    left = views - sum(part["done"] for part in told if part)
    if not active or left <= 0:
        return None
    together = left / sum(part["views_per_second"] for part in active)
    return max(together, *((part["views"] - part["done"]) / part["views_per_second"] for part in active))


def progress_of_parts(store: LabelStore, plan: Plan) -> str:
    """Say how far all parts of a store are."""
    told, views = all_progress(store.folder, plan), plan["epochs"] * store.manifest["views"]
    if all(part and part["done"] == part["views"] for part in told):
        return f"all {len(told)} parts are done: deit-kd store build --join finishes"
    seconds = seconds_left(told, views, time.time())
    done, begun = sum(part["done"] for part in told if part), sum(part is not None for part in told)
    left = "" if seconds is None else f", {duration_text(seconds)} left"
    return f"{begun} of {len(told)} parts have begun, {100 * done / views:.1f} % of {views} views are answered{left}"


def missing_parts(store: LabelStore, plan: Plan) -> Counter[int]:
    """Return how many answers each part still lacks, by its number; the first also lacks the validation set's."""
    division = Division(plan, store.manifest["views"], store.manifest["validation"])
    lacking: Counter[int] = Counter()
    if not store.holds(VALIDATION):
        lacking[1] += store.manifest["validation"]
    for epoch in range(plan["epochs"]):
        numbers, counts = np.unique(division.parts_of(epoch, store.missing(epoch_part(epoch))), return_counts=True)
        lacking.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
    return lacking


def forget_parts(store: LabelStore) -> None:
    """Delete what was kept to build the store in parts."""
    folder = store.folder / PARTS
    if folder.is_symlink():
        raise InputError(
            f"teacher.store: {folder} is a link, and is deleted once the parts are joined; remove the link"
        )
    shutil.rmtree(folder)
