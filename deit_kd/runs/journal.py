"""The records of a run as it goes: ``metrics.jsonl``, TensorBoard, Weights & Biases and the progress bar."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import importlib.util
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch.utils.tensorboard import SummaryWriter

from deit_kd.console import console, progress_bar, say
from deit_kd.files import write_atomically
from deit_kd.interfaces import InputError, printable
from deit_kd.run_folder import METRICS_FILE, lines_until


def check_tracking(wandb: bool) -> None:
    """Raise an InputError if Weights & Biases is asked for but not installed."""
    if wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("tracking.wandb: true, but wandb is not installed; pip install wandb, or set it to false")


class WandbBoard:
    """Weights & Biases, with TensorBoard's interface; a resumed run continues there, too."""

    def __init__(self, folder: Path, project: str, recipe: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        identity = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
        self._run = wandb.init(
            project=project, name=folder.name, id=identity, resume="allow", dir=str(folder), config=dict(recipe)
        )

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Log one number."""
        self._run.log({name: value}, step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class Journal:
    """Writes ``metrics.jsonl`` and ``tensorboard/``, and reports progress; silent outside the main process.

    Args:
        folder: of the run.
        title: of the progress line.
        total_steps: of the run.
        first_step: steps already done; records after it, of a run that was cut short, are dropped.
        is_main: whether this process writes and prints.
        wandb_project: also log to this Weights & Biases project, unless it is None.
        recipe: kept there as the run's config.
    """

    def __init__(
        self,
        folder: Path,
        *,
        title: str,
        total_steps: int,
        first_step: int,
        is_main: bool,
        wandb_project: str | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self._is_main = is_main
        self._metrics = folder / METRICS_FILE
        self._progress: Progress | None = None
        if not is_main:
            return
        write_atomically(self._metrics, "".join(lines_until(self._metrics, first_step)).encode())
        self._boards: list[Any] = [SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)]
        if wandb_project is not None:
            self._boards.append(WandbBoard(folder, wandb_project, recipe or {}))
        self._first_step, self._total_steps, self._since = first_step, total_steps, time.perf_counter()
        if console.is_terminal:
            self._progress = progress_bar()
            self._task = self._progress.add_task(printable(title), total=total_steps, completed=first_step, note="")
            self._progress.start()

    def record(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        """Append one record, and its numbers to TensorBoard."""
        if not self._is_main:
            return
        with open(self._metrics, "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **fields}) + "\n")
        for name, value in _numbers_of(fields):
            for board in self._boards:
                board.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, note: str) -> None:
        """Move the bar, or print a line if there is no terminal."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, note=note)
        elif self._is_main:
            per_step = (time.perf_counter() - self._since) / max(1, step - self._first_step)
            left = datetime.timedelta(seconds=round(per_step * (self._total_steps - step)))
            say(f"{note}  {left} left")

    def close(self) -> None:
        """Stop the bar and flush the files."""
        if self._progress is not None:
            self._progress.stop()
        if self._is_main:
            for board in self._boards:
                board.close()


def _numbers_of(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    numbers: list[tuple[str, float]] = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            numbers += _numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            numbers.append((prefix + name, value))
    return numbers
