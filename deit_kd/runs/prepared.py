"""One run, prepared: its parts before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler

from deit_kd.config import Config
from deit_kd.data import Splits, TrainingLoader
from deit_kd.distributed import Processes
from deit_kd.interfaces import Batch
from deit_kd.losses import Objective
from deit_kd.runs.data_errors import DataErrors
from deit_kd.students import Connectors, TimmStudent

AfterEpoch = Callable[[int, Callable[[], None]], None]  # of an epoch, and the heartbeat to call


@dataclass(frozen=True)
class Peer:
    """A further student of a run, which trains together with the student."""

    name: str  # of its folder and its records
    config: Config  # the recipe as the peer sees it: it is the student
    student: TimmStudent
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    objective: Objective


@dataclass
class Run:
    """Everything of one run but its teacher; nothing is written yet."""

    config: Config
    processes: Processes
    splits: Splits
    folder: Path
    loader: TrainingLoader
    validation: Iterable[Batch]
    student: TimmStudent
    optimizer: torch.optim.Optimizer
    data_facts: dict[str, str]  # a hash of each split
    schedule: Scheduler
    checkpoint: Any  # named parts, or None
    errors: DataErrors  # photos that cannot be read
    objective: Objective = field(default_factory=lambda: Objective("none"))  # replaced once its lesson is known
    connectors: Connectors | None = None  # of the features that are compared
    peers: tuple[Peer, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the dataset."""
        return self.splits.train.classes
