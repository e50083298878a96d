"""Compare the heads of runs over seeds: a table, and paired bootstrap intervals over images.

    for run in RUNS/*; do deit-kd eval $run; done
    python benchmarks/compare_heads.py RUNS --base none --variants soft hard --seeds 0 1 2

Each run lies in ``RUNS/<variant>-<seed>``; ``deit-kd eval`` wrote what its heads said about every image. All heads are
compared with the base's fused head, or with its class head where it has no other.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from rich.console import Console
from rich.table import Table

from deit_kd.evaluation.written import PREDICTIONS_FILE


def answers(folder: Path) -> dict[str, list[str]]:
    """Return the path and the label of every image that an evaluation scored, by path, and each head's answer."""
    said = parquet.read_table(folder / PREDICTIONS_FILE).sort_by("path").to_pydict()
    heads = [name.removesuffix("_top5") for name in said if name.endswith("_top5")]
    firsts = {head: [first for first, *_ in said[f"{head}_top5"]] for head in heads}
    teacher = {"teacher": said["teacher_top1"]} if "teacher_top1" in said else {}
    return {"path": said["path"], "label": said["label"], **firsts, **teacher}


def right(run: Path) -> dict[str, np.ndarray]:
    """Return for each head whether it was right [n], by the images' paths."""
    said = answers(run / "eval" / "validation")
    labels = np.array(said["label"])
    return {head: np.array(own) == labels for head, own in said.items() if head not in ("path", "label", "teacher")}


def speaker(heads: Collection[str]) -> str:
    """Return the head that speaks for a student: the fused one, or the class head where there is no other."""
    return "fused_softmax" if "fused_softmax" in heads else "cls"


def paired_interval(gains: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval, over images, of the mean of `gains` [seeds, n] in percent."""
    per_image = gains.mean(0)
    picks = np.random.default_rng(0).integers(len(per_image), size=(draws, len(per_image)))
    low, high = np.percentile(per_image[picks].mean(1), [2.5, 97.5])
    return 100 * low, 100 * high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", default="none")
    parser.add_argument("--variants", nargs="+", default=["soft", "hard"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    of_base = [right(options.folder / f"{options.base}-{seed}") for seed in options.seeds]
    main_head = speaker(of_base[0])
    base = np.stack([heads[main_head] for heads in of_base])
    table = Table(title=f"top-1 %, {base.shape[1]} images, seeds {options.seeds}")
    for column in ("variant", "head", "mean", "by seed", f"over {options.base}'s {main_head}", "95 % interval"):
        table.add_column(column)
    for variant in [options.base, *options.variants]:
        by_seed = [right(options.folder / f"{variant}-{seed}") for seed in options.seeds]
        for head in by_seed[0]:
            correct = np.stack([result[head] for result in by_seed])
            gains = correct.astype(float) - base
            low, high = paired_interval(gains)
            each = " ".join(f"{100 * row.mean():.1f}" for row in correct)
            compared = [f"{100 * gains.mean():+.1f}", f"{low:+.1f} to {high:+.1f}"]
            table.add_row(variant, head, f"{100 * correct.mean():.1f}", each, *(compared if gains.any() else ["", ""]))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
