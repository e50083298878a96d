"""``deit-kd plot``: the curves of a run that is still going, or of several, in one image."""

from __future__ import annotations

from pathlib import Path

from deit_kd.console import say
from deit_kd.evaluation.curves import Records, charts_of, names_of, read_records, with_peers
from deit_kd.figures import as_png, line_charts
from deit_kd.files import write_atomically

CURVES_FILE = "curves.png"


def plot(folders: list[Path], file: Path | None) -> None:
    """Draw the curves of one or several runs into one image.

    Args:
        folders: of runs, finished or not.
        file: the PNG to write; None is ``curves.png`` in the first run.

    Raises:
        InputError: a folder has no records yet, or two have the same name.
    """
    runs: dict[str, Records] = {}
    for name, folder in names_of(folders).items():
        runs |= with_peers(name, read_records(folder))
    file = file or folders[0] / CURVES_FILE
    write_atomically(file, as_png(line_charts(list(charts_of(runs).values()), columns=2)))
    for name, records in runs.items():
        say(f"{name}: step {records[-1]['step']}")
    say(f"curves: {file}")
