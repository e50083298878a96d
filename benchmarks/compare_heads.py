"""Compare the heads that `side_by_side.py` saved: a table over seeds, and paired bootstrap intervals over images.

python benchmarks/compare_heads.py OUTPUT --base none --variants soft hard --seeds 0 1 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table


def right(folder: Path, variant: str, seed: int) -> dict[str, np.ndarray]:
    """Return for each head whether it was right [n]; ``logits`` is the fusion by mean of logits."""
    with np.load(folder / f"{variant}-{seed}.npz") as saved:
        columns = {name: saved[name] for name in saved.files}
    labels = columns.pop("labels")
    if "fused" in columns:
        # The softmax of mean logits is the normalised geometric mean, which has the same argmax.
        columns["logits"] = np.log(columns["cls"]) + np.log(columns["dist"])
    return {head: probabilities.argmax(1) == labels for head, probabilities in columns.items()}


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
    base = np.stack([right(options.folder, options.base, seed)["cls"] for seed in options.seeds])
    table = Table(title=f"top-1 %, {base.shape[1]} images, seeds {options.seeds}")
    for column in ("variant", "head", "mean", "by seed", f"over {options.base}'s cls", "95 % interval"):
        table.add_column(column)
    for variant in [options.base, *options.variants]:
        by_seed = [right(options.folder, variant, seed) for seed in options.seeds]
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
