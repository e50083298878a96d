"""What feature terms cost: the same step with them and after they are over, in turns, teacher included.

    python benchmarks/guide_cost.py --config configs/photos.yaml --data.root PHOTOS --data.workers 0 --rounds 7

The teacher need not be fitted: one with random weights stands in for it.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from dataclasses import replace

from deit_kd.config import build_parser, parse_config
from deit_kd.console import console
from deit_kd.distributed import finish, start
from deit_kd.engine import train
from deit_kd.interfaces import InputError
from deit_kd.runs.lesson import build_distiller, connect
from deit_kd.runs.run import build_trainer, prepare
from deit_kd.teaching.ready import ready_lesson


def main() -> None:
    parser = build_parser("guide_cost")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    config, options = parse_config(sys.argv[1:], parser)
    if not config.distill.needs_features:
        raise InputError("distill.terms: no term compares features; name a recipe with a guide")
    processes = start(config.train.device)
    run = prepare(config, processes)
    lesson = ready_lesson(run, may_fit=False)
    run = connect(run, lesson)
    trainer = build_trainer(run, lesson)
    held = [batch.to(processes.device) for batch in itertools.islice(run.loader.batches(0), 2)]
    seconds: dict[str, list[float]] = {"with": [], "over": []}
    for _ in range(options["rounds"] + 1):
        for name, step in (("with", 0), ("over", run.loader.total_steps)):
            trainer.distiller = build_distiller(run, replace(lesson), step)  # a lesson lets go of who is not needed
            train(trainer, itertools.cycle(held), first_step=0, total_steps=1, after_step=lambda step, result: None)
            since = time.perf_counter()
            train(
                trainer,
                itertools.cycle(held),
                first_step=0,
                total_steps=options["steps"],
                after_step=lambda step, result: result.terms.tolist(),
            )
            seconds[name].append((time.perf_counter() - since) / options["steps"])
    finish()
    ratios = [a / b for a, b in zip(seconds["with"][1:], seconds["over"][1:], strict=True)]
    for name, label in (("with", "with the terms"), ("over", "after they are over")):
        console.print(f"{label}: {config.train.batch_size / statistics.median(seconds[name][1:]):.1f} images/s")
    console.print(
        f"ratio of the steps' times: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
