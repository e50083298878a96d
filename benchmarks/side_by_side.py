"""Train several students side by side on the same views, and compare their heads image by image.

Every view, every initial weight and every drop-path choice is a pure function of the recipe's seed, so each
student comes out as ``deit-kd train`` would have made it alone; but the photos are read once and the teacher is
asked once. Variants differ in the options given after their names:

    python benchmarks/side_by_side.py OUTPUT --config configs/photos.yaml --data.root PHOTOS \\
        --teacher.checkpoint TEACHER --teacher.fit.epochs 0 --seed 0 \\
        --variant none --distill.kind none --variant soft --distill.kind soft --variant hard --distill.kind hard

Writes ``OUTPUT/<variant>-<seed>.npz`` (labels [n] and each head's probabilities [n, C]) and
``OUTPUT/<variant>-<seed>.json`` (the scores of every epoch); `compare_heads.py` reads them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from deit_kd.config import Config, parse_config
from deit_kd.distributed import start
from deit_kd.engine import autocast, evaluate, score_teacher
from deit_kd.interfaces import Batch, Teacher, TeacherOutput, head_probabilities
from deit_kd.jobs import parts
from deit_kd.jobs.run import Run, build_trainer, prepare


class AskedOnce:
    """A teacher that answers the same batch again without thinking again."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._batch: Batch | None = None
        self._answer: TeacherOutput | None = None

    def __call__(self, batch: Batch) -> TeacherOutput:
        if self._answer is None or self._batch is None or batch.images is not self._batch.images:
            self._batch, self._answer = batch, self._teacher(batch)
        return self._answer


def read_variants(arguments: list[str], output: Path) -> dict[str, Config]:
    """Return the config of each variant: the common options, then its own."""
    common, *own = " ".join(arguments).split("--variant ")
    configs = {}
    for text in own:
        name, *options = text.split()
        configs[name], _ = parse_config([*common.split(), *options, "--output", str(output / "unused" / name)])
    shared = {(c.data, c.augment, c.seed, c.train.batch_size, c.train.epochs) for c in configs.values()}
    assert len(shared) == 1, "the variants differ in what makes their views"
    return configs


@torch.inference_mode()
def probabilities(run: Run, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return labels [n] and each head's probabilities [n, C] on the validation split."""
    model.eval()
    columns: dict[str, list[torch.Tensor]] = {}
    for batch in run.validation:
        with autocast(run.processes.device, run.config.train.precision):
            output = model(batch.images)
        for name, value in {"labels": batch.labels, **head_probabilities(output)}.items():
            columns.setdefault(name, []).append(value)
    return {name: torch.cat(values).numpy() for name, values in columns.items()}


def main() -> None:
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    configs = read_variants(sys.argv[2:], output)
    first = next(iter(configs.values()))
    processes = start(first.train.device)
    splits = parts.build_splits(first)
    runs = {name: prepare(config, processes, splits) for name, config in configs.items()}
    teacher = None
    if any(config.distill.kind != "none" for config in configs.values()):
        teaching = next(config for config in configs.values() if config.distill.kind != "none")
        network = parts.build_teacher(teaching, splits.train.classes, processes, teaching.teacher.checkpoint)
        score, _ = score_teacher(
            network,
            next(iter(runs.values())).validation,
            classes=len(splits.train.classes),
            total=len(splits.validation),
            processes=processes,
        )
        print(f"teacher {score}", flush=True)
        teacher = AskedOnce(network)
    trainers = {
        name: build_trainer(run, teacher if run.config.distill.kind != "none" else None) for name, run in runs.items()
    }
    loader = next(iter(runs.values())).loader
    history: dict[str, list[object]] = {name: [] for name in runs}
    since = time.perf_counter()
    for step, batch in enumerate(loader.batches(0)):
        for trainer in trainers.values():
            trainer.model.train()
            trainer.step(iter([batch]), step)
        if (step + 1) % loader.steps_per_epoch:
            continue
        for name, trainer in trainers.items():
            models = {"model": trainer.model} | ({} if trainer.ema is None else {"ema": trainer.ema.module})
            scores = evaluate(
                models,
                runs[name].validation,
                classes=len(splits.train.classes),
                total=len(splits.validation),
                processes=processes,
                precision=first.train.precision,
                fusion="softmax",
            )
            history[name].append(scores)
            tops = {
                which: {head: round(s["top1"], 1) for head, s in result["heads"].items() if s}
                for which, result in scores.items()
            }
            print(f"{time.perf_counter() - since:6.0f} s  epoch {len(history[name])}  {name}  {tops}", flush=True)
    for name, trainer in trainers.items():
        final = trainer.model if trainer.ema is None else trainer.ema.module
        stem = f"{name}-{first.seed}"
        np.savez(output / f"{stem}.npz", **probabilities(runs[name], final))
        record = {"recipe": configs[name].model_dump(mode="json"), "epochs": history[name]}
        (output / f"{stem}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
