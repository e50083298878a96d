"""How many steps should the average of the weights span? Several averages follow one run, and its end scores them all.

``python benchmarks/average_span.py --config RECIPE [--shares 0.02 0.08] [--seeds 0 1] [--any.recipe_key VALUE]``

Trains the student of a recipe once for each seed (its teacher first, where the recipe fits one) and prints top-1 and
NLL of every head for each span, given as a share of the run's steps; 0 is no average. No run folder is written.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from torch import nn

from deit_kd.asking import evaluate
from deit_kd.config import Config, parse_config
from deit_kd.distributed import process_group
from deit_kd.engine import StepResult, train
from deit_kd.jobs.bench import print_markdown
from deit_kd.optim import WeightAverage
from deit_kd.runs.lesson import connect
from deit_kd.runs.run import build_trainer, prepare
from deit_kd.teaching.ready import ready_lesson

HEADS = ("cls", "dist", "fused")


def scores_by_share(config: Config, shares: list[float]) -> tuple[int, dict[str, dict[str, Any]]]:
    """Train one run to its end; return its steps, and the scores of every head by share."""
    with process_group(config.train.device) as processes:
        run = prepare(config, processes)
        lesson = ready_lesson(run)
        run = connect(run, lesson)
        trainer = build_trainer(run, lesson)
        steps = run.loader.total_steps
        averages = {share: WeightAverage(run.student, 1 - 1 / max(1.0, share * steps)) for share in shares if share}

        def follow(step: int, result: StepResult) -> None:
            for average in averages.values():
                average.follow(run.student, step, applied=result.terms[3] == 0)

        train(trainer, run.loader.batches(0, lent=True), first_step=0, total_steps=steps, after_step=follow)
        models: dict[str, nn.Module] = {
            "0": run.student,
            **{f"{s:g}": average.module for s, average in averages.items()},
        }
        found = evaluate(
            models,
            run.validation,
            classes=len(run.classes),
            total=len(run.splits.validation),
            processes=processes,
            precision=config.train.precision,
            fusion=config.evaluate.fusion,
        )
        return steps, {share: result["heads"] for share, result in found.items()}


def main() -> None:
    """Train for each seed and print one table: means over the seeds, and the fused head's top-1 of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.02, 0.04, 0.08, 0.12, 0.2, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given, recipe = parser.parse_known_args()
    recipe = [*recipe, "--train.ema_decay", "0"]
    runs = [scores_by_share(parse_config([*recipe, "--seed", str(s)])[0], given.shares) for s in given.seeds]
    steps, first = runs[0]
    heads = [head for head in HEADS if first["0"][head] is not None]
    rows = []
    for share in first:
        span = float(share) * steps
        found = [scores[share] for _, scores in runs]
        means = [statistics.mean(one[head][key] for one in found) for head in heads for key in ("top1", "nll")]
        each = " ".join(f"{one[heads[-1]]['top1']:.1f}" for one in found)
        decay = f"{1 - 1 / span:.5f}" if span > 1 else "none"
        rows.append([f"{100 * float(share):g} %", f"{span:.0f}", decay, *(f"{mean:.3f}" for mean in means), each])
    columns = [f"{head} {key}" for head in heads for key in ("top-1", "NLL")]
    print_markdown(("share of the run", "steps", "decay", *columns, "by seed"), rows)


if __name__ == "__main__":
    main()
