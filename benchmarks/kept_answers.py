"""Keep what the arms of a study answered about each photo, and compare them, on whatever machine each was trained.

    python benchmarks/kept_answers.py docs/evidence/folds.parquet --add runs/arms/joined/recipe runs/arms/joined/soft
    python benchmarks/kept_answers.py docs/evidence/folds.parquet --base recipe

What is added is the folder of an evaluation: that of `deit-kd eval`, or one that `folds.py` has joined. Its name is the
arm's; an arm that is there already is replaced. The file holds one row for each photo, and one column for each head.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from compare_heads import answers, paired_interval, speaker
from rich.console import Console
from rich.table import Table

from deit_kd.interfaces import InputError


def add(file: Path, folders: Sequence[Path]) -> None:
    """Add the answers of evaluations to a file.

    Raises:
        InputError: an evaluation is of other photos than those in the file.
    """
    kept = parquet.read_table(file).to_pydict() if file.is_file() else {}
    for folder in folders:
        said = answers(folder)
        photos = {name: said.pop(name) for name in ("path", "label")}
        if kept and any(kept[name] != column for name, column in photos.items()):
            raise InputError(f"--add: {folder} is of other photos than {file}; name another file")
        others = {name: column for name, column in kept.items() if not name.startswith(f"{folder.name}/")}
        heads = {f"{folder.name}/{head}": column for head, column in said.items()}
        kept = {**photos, **others, **heads}
    coded = {name: arrow.array(column).dictionary_encode() for name, column in kept.items() if name != "path"}
    table = arrow.table({"path": arrow.array(kept["path"])} | coded)
    parquet.write_table(table, file, compression="zstd", compression_level=19)


def compare(file: Path, base: str) -> Table:
    """Return the top-1 of every head of every arm, and its difference from the base's fused head."""
    kept = parquet.read_table(file).to_pydict()
    labels = np.array(kept["label"])
    right = {name: np.array(column) == labels for name, column in kept.items() if "/" in name}
    heads = [name.removeprefix(f"{base}/") for name in right if name.startswith(f"{base}/")]
    if not heads:
        arms = sorted({name.split("/")[0] for name in right})
        raise InputError(f"--base: {base!r} is not in {file}; use one of {', '.join(arms)}")
    main_head = f"{base}/{speaker(heads)}"
    table = Table(title=f"top-1 %, {len(labels)} photos, each scored once")
    for column in ("arm", "head", "top-1", f"over {main_head}", "95 % interval", "alone right"):
        table.add_column(column)
    for name, own in right.items():
        gains = own.astype(float) - right[main_head]
        low, high = paired_interval(gains[None])
        alone = f"{int((gains > 0).sum())} : {int((gains < 0).sum())}"
        compared = (f"{100 * gains.mean():+.1f}", f"{low:+.1f} to {high:+.1f}", alone)
        table.add_row(*name.split("/"), f"{100 * own.mean():.1f}", *(compared if gains.any() else ("", "", "")))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--add", type=Path, nargs="+", default=[])
    parser.add_argument("--base", default=None)
    options = parser.parse_args()
    if options.add:
        add(options.file, options.add)
    if options.base is not None:
        Console(width=110).print(compare(options.file, options.base))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
