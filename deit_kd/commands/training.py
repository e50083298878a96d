"""``deit-kd train`` and ``bench``: commands about a recipe."""

from __future__ import annotations

from deit_kd.commands.shared import Arguments, named_file
from deit_kd.config import build_parser, parse_config
from deit_kd.places import check_training


def train(arguments: Arguments) -> None:
    """Train a student, or say what that needs (``--dry-run``)."""
    parser = build_parser("deit-kd train")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="take two steps and one evaluation batch, print memory, time and disk, write nothing",
    )
    config, others = parse_config(arguments, parser)
    check_training(config)
    if others["dry_run"]:
        from deit_kd.jobs.dry_run import dry_run

        dry_run(config)
        return
    from deit_kd.jobs.train import train

    train(config)


def bench(arguments: Arguments) -> None:
    """Time the training loop and its parts."""
    parser = build_parser("deit-kd bench")
    parser.add_argument("--rounds", type=int, default=7, help="how often to time each part")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps in each timing")
    parser.add_argument("--photos", type=int, default=2048, help="training photos to use; a store is filled with them")
    parser.add_argument(
        "--other_compile", type=bool, default=False, help="also time the step with train.compile reversed"
    )
    parser.add_argument("--json", type=str, default=None, help="file for the numbers")
    config, others = parse_config(arguments, parser)
    check_training(config)
    from deit_kd.jobs.bench import bench

    bench(
        config,
        others["rounds"],
        others["steps"],
        others["photos"],
        others["other_compile"],
        named_file("--json", others["json"]),
    )
