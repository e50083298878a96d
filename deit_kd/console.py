"""Output for the user: lines, progress bars, sizes and durations."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from deit_kd.interfaces import printable

SECONDS_BETWEEN_LINES = 30


class ViewMeter:
    """Shows how many views are done, how fast, and the time left; silent outside the main process.

    Args:
        total: views.
        is_main: whether this process prints.
    """

    def __init__(self, total: int, is_main: bool) -> None:
        self._total, self._is_main = total, is_main
        self._done = self._asked = 0
        self._since = self._said = time.perf_counter()
        self._progress = progress_bar() if is_main and console.is_terminal else None
        if self._progress is not None:
            self._task = self._progress.add_task("views", total=total, note="")

    def __enter__(self) -> ViewMeter:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    @property
    def done(self) -> int:
        """How many views are done, including those from before."""
        return self._done

    @property
    def rate(self) -> float:
        """How many views a second are done; 0 before the first."""
        return self._asked / max(time.perf_counter() - self._since, 1e-9)

    def advance(self, views: int) -> None:
        """Count views that were just done; without a terminal, print a line now and then."""
        self._asked += views
        self._done = min(self._total, self._done + views)
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)
        elif time.perf_counter() - self._said > SECONDS_BETWEEN_LINES:
            self._say(f"{self._done}/{self._total} views")

    def reach(self, done: int, note: str) -> None:
        """Set the number of finished views to `done`, including those from before."""
        self._done = done
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)
        else:
            self._say(note)

    def _say(self, note: str) -> None:
        self._said = time.perf_counter()
        if self._is_main and self._asked:
            left = duration_text((self._total - self._done) / self.rate)
            say(f"{note}, {self.rate:.0f} views/s, {left} left")


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
        console=console,
    )


class _PlainConsole(Console):
    """Names of folders and classes are plain text: neither markup nor control sequences."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


# When writing to a file, rich would wrap every table at 80 columns.
_width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
console = _PlainConsole(highlight=False, soft_wrap=True, markup=False, emoji=False, width=_width)


def say(line: str) -> None:
    """Print one line unchanged."""
    console.print(line)


def score_text(score: Mapping[str, Any], digits: int) -> str:
    """Return a teacher's score in percent: its top-1 or, without a head, that of its k-NN."""
    return f"k-NN {score['knn']:.{digits}f}" if "knn" in score else f"top-1 {score['top1']:.{digits}f}"


def size_text(count: float) -> str:
    """Return bytes in a readable form."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def duration_text(seconds: float) -> str:
    """Return seconds in a readable form."""
    return str(timedelta(seconds=round(seconds)))
