"""``deit-kd report``: one page that a person can look at, with every figure and number beside it."""

from __future__ import annotations

from pathlib import Path

from deit_kd.distributed import process_group
from deit_kd.evaluation.page import write_report


def report(folders: list[Path], folder: Path | None, device: str = "auto") -> Path:
    """Write ``report.html`` about finished runs.

    Args:
        folders: of the runs; several that saw the same photos are compared image by image, and several folds of one
            recipe are one student.
        folder: where it goes; None is ``RUN/report`` for one run and ``runs/report`` for several.
        device: that the students run on.

    Raises:
        InputError: a folder is no finished run, or its photos are not there any more.
    """
    with process_group(device) as processes:
        return write_report(folders, folder, processes)
