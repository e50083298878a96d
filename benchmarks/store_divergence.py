"""Print how far a label store's records are from a trained teacher's logits, for docs/evidence/performance.md.

The divergence KL(full || record) is what soft distillation loses per view, at temperature T, in nats:

    python benchmarks/store_divergence.py --config configs/quickstart.yaml
    python benchmarks/store_divergence.py --digits_at_once 3 --config configs/quickstart.yaml

The teacher is the recipe's, fitted first where the recipe says so, asked for the training views of one epoch.
No set of 1,000 classes and no teacher of them is at hand everywhere: with ``--digits_at_once n`` three views are
read as one number, whose 10^n classes have as logits the sums of the digits' logits.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from deit_kd.config import Config, build_parser, parse_config
from deit_kd.distributed import start
from deit_kd.losses import soft_distillation
from deit_kd.runs.photos import build_splits
from deit_kd.runs.viewing import build_training_loader
from deit_kd.store import Record
from deit_kd.teaching.fit import online_teacher

TEMPERATURES = (1.0, 2.0, 4.0)
TOPS = (1, 3, 5, 10, 50, 100)


def answers(config: Config) -> Tensor:
    """Return the teacher's logits [n, C] for the views of the first epoch."""
    processes = start(config.train.device)
    splits = build_splits(config)
    loader = build_training_loader(config, splits.train, processes)
    teacher, _ = online_teacher(config, processes, splits)
    view_ids = np.stack([np.zeros(loader.views_per_epoch, dtype=np.int64), np.arange(loader.views_per_epoch)], axis=1)
    batches = loader.views(view_ids, config.evaluate.batch_size)
    return torch.cat([teacher(batch.to(processes.device)).logits.cpu() for batch in batches])


def at_once(logits: Tensor, digits: int) -> Tensor:
    """Return the logits [n / digits, C ** digits] of the numbers that consecutive views make."""
    whole = logits[: len(logits) // digits * digits].view(-1, digits, logits.shape[1])
    numbers = whole[:, 0]
    for digit in range(1, digits):
        numbers = (numbers[:, :, None] + whole[:, digit, None, :]).flatten(1)
    return numbers


def main() -> None:
    parser = build_parser("store_divergence")
    parser.add_argument("--digits_at_once", type=int, default=1)
    config, others = parse_config(sys.argv[1:], parser)
    logits = at_once(answers(config), others["digits_at_once"])
    classes = logits.shape[1]
    print(
        f"{len(logits)} views, {classes} classes, largest probability on average "
        f"{float(logits.softmax(-1).max(-1)[0].mean()):.3f}"
    )
    print("| K | bytes | " + " | ".join(f"T = {temperature:g}" for temperature in TEMPERATURES) + " |")
    print("|---|---|" + "---|" * len(TEMPERATURES))
    for top in [*(top for top in TOPS if top < classes), classes]:
        record = Record(classes, top)
        replayed = record.decode(record.encode(logits))
        cells = [
            float(soft_distillation(replayed, logits, temperature).mean()) / temperature**2
            for temperature in TEMPERATURES
        ]
        name = "all" if top == classes else str(top)
        print(f"| {name} | {record.bytes_per_view} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
