"""Photos that a run could not read: they are listed in ``data_errors.jsonl``, and too many end the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deit_kd.console import say
from deit_kd.distributed import Processes
from deit_kd.files import write_atomically
from deit_kd.interfaces import Batch, InputError, counted
from deit_kd.interrupts import raise_pending
from deit_kd.run_folder import DATA_ERRORS_FILE, lines_until


class DataErrors:
    """``data_errors.jsonl``: a line for each view that is missing because its photo cannot be read.

    Every process notes what its own batches lack. `tell`, which all of them call, collects the notes, so that one
    process writes them and all stop together when there are too many.

    Args:
        folder: of the run, or of the label store.
        names: of the photos, by split.
        most: how many photos may be unreadable.
        processes: of the run.
        first_step: steps already done; lines after it, of a run that was cut short, are dropped.
        skips: whether anything can be missing; if not, nothing is exchanged or written.
    """

    def __init__(
        self,
        folder: Path,
        names: Mapping[str, Sequence[str]],
        *,
        most: int,
        processes: Processes,
        first_step: int = 0,
        skips: bool = True,
    ) -> None:
        self.step = first_step  # of what is noted now
        self._file = folder / DATA_ERRORS_FILE
        self._names, self._most, self._processes, self._skips = names, most, processes, skips
        self._lines: dict[tuple[Any, ...], dict[str, Any]] = {}  # by what they are about
        self._photos: dict[str, str] = {}  # the reason, by split and name
        self._keep(map(json.loads, processes.share(lines_until(self._file, first_step))))
        self._is_cut_back = False
        self._noted: list[dict[str, Any]] = []

    def watch(self, split: str, batches: Iterable[Batch], epoch: int | None = None) -> Iterator[Batch]:
        """Yield `batches` and note what they lack; `epoch` is the one being evaluated, for batches without views."""
        for batch in batches:
            raise_pending()
            self.note(split, batch, epoch)
            yield batch

    def note(self, split: str, batch: Batch, epoch: int | None = None) -> None:
        """Note what one batch of a split lacks."""
        for view in batch.missing:
            of_view = epoch if view.epoch is None else view.epoch
            self._noted.append(
                {
                    "step": 0 if of_view is None else self.step,  # a teacher is scored before the first step
                    "split": split,
                    "epoch": of_view,
                    "position": view.position,
                    "path": self._names[split][view.photo],
                    "reason": view.reason,
                }
            )

    def tell(self) -> None:
        """Write what all processes have noted since the last call.

        Raises:
            InputError: more photos than allowed cannot be read; on every process.
        """
        if not self._skips:
            return
        noted = [line for share in self._processes.gather(self._noted) for line in share]
        self._noted = []
        known = len(self._photos)
        new = self._keep(sorted(noted, key=_subject))
        if self._processes.is_main:
            self._write(new)
        found, last = len(self._photos), next(reversed(self._photos.values()), None)
        if found > self._most:
            raise InputError(
                f"data.max_errors: {found} photos are unreadable, more than {self._most}; the last: {last}"
            )
        if found > known and self._processes.is_main:
            say(f"left out: {counted(found, 'photo')} so far, the last: {last}")

    def views(self, split: str) -> int:
        """Return how many views of a split were missing, as of the last `tell`."""
        return sum(line["split"] == split for line in self._lines.values())

    def unreadable(self, split: str, step: int) -> dict[str, str]:
        """Return why photos of a split could not be read at one step, by name, as of the last `tell`."""
        return {
            line["path"]: line["reason"]
            for line in self._lines.values()
            if (line["split"], line["step"]) == (split, step)
        }

    def _keep(self, lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Remember those of `lines` that are about something new, and return them."""
        new = [line for line in lines if _subject(line) not in self._lines]
        for line in new:
            self._lines[_subject(line)] = line
            self._photos[f"{line['split']}/{line['path']}"] = line["reason"]
        return new

    def _write(self, new: list[dict[str, Any]]) -> None:
        if not self._file.parent.is_dir():
            return  # a dry run has no folder
        if self._is_cut_back:
            with open(self._file, "a") as file:
                file.write(_as_text(new))
        elif self._lines or self._file.is_file():
            write_atomically(self._file, _as_text(self._lines.values()).encode())
        self._is_cut_back = True


def merge(folder: Path, others: Iterable[Path]) -> None:
    """Add the lines of `others`, in their order, to those of `folder`, each view once."""
    files = [place / DATA_ERRORS_FILE for place in (folder, *others)]
    lines = {_subject(line): line for file in files for line in map(json.loads, lines_until(file, 0))}
    if lines:
        write_atomically(files[0], _as_text(lines.values()).encode())


def _subject(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a line is about, in the order of the file."""
    return line["step"], line["split"], -1 if line["epoch"] is None else line["epoch"], line["position"]


def _as_text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)
