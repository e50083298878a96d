"""``deit-kd report``: one page to look at, with every figure and number beside it."""

from __future__ import annotations

from pathlib import Path

from deit_kd.distributed import process_group
from deit_kd.evaluation.page import write_report


def report(folders: list[Path], folder: Path | None, device: str) -> None:
    """Write ``report.html`` about finished runs.

    Args:
        folders: of the runs; several that saw the same photos are compared image by image, and several folds of one
            recipe are one student.
        folder: where it goes; None is ``RUN/report`` for one run and ``runs/report`` for several.
        device: where the students run.

    Raises:
        InputError: a folder is not a finished run, or its photos are gone.
    """
    with process_group(device) as processes:
        write_report(folders, folder, processes)
