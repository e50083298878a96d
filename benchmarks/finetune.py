"""Does fine-tuning a grafted ViT with distillation beat the same without, and training from scratch?

``python benchmarks/finetune.py --root DIR --output runs/finetune [--epochs 40] [--seeds 0 1] [--only NAME …]
[--any.recipe_key VALUE]``

Pre-trains a small plain ViT on every other class of an ImageFolder tree, then learns the remaining classes in several
ways, for each seed: grafted and distilled, with a guide until half of the run or to its end, or not distilled (alpha
0); plain; and from scratch with and without distillation. One teacher is fitted on the remaining classes for each seed.
Any key of the recipe can follow. Prints how much the graft itself changes the class head.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from deit_kd.config import Config, parse_config
from deit_kd.console import say
from deit_kd.distributed import Processes
from deit_kd.jobs.train import train
from deit_kd.origins import open_model
from deit_kd.run_folder import HEADS_FILE
from deit_kd.runs import parts
from deit_kd.runs.photos import build_evaluation_loader, build_splits

RECIPE = Path(__file__).parent.parent / "configs" / "photos.yaml"


def halve(root: Path, output: Path) -> tuple[Path, Path]:
    """Return two trees of links: every other class of `root`, and the others."""
    halves = output / "first_half", output / "second_half"
    for split in sorted(folder for folder in root.iterdir() if folder.is_dir()):
        for number, source in enumerate(sorted(folder for folder in split.iterdir() if folder.is_dir())):
            link = halves[number % 2] / split.name / source.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(source.resolve(), target_is_directory=True)
    return halves


def config_of(options: dict[str, Any], common: list[str]) -> Config:
    """Return the photos recipe with `common` and then `options` over it."""
    own = [item for key, value in options.items() for item in (f"--{key}", str(value))]
    return parse_config(["--config", str(RECIPE), "--student.name", "deit_tiny_patch16_224", *common, *own])[0]


def run(options: dict[str, Any], common: list[str], output: Path) -> dict[str, Any]:
    """Train one recipe, or go on with it; return its ``heads.json``."""
    resume = {"resume": "auto"} if (output / "config.yaml").is_file() else {}
    return train(config_of({**options, **resume, "output": output}, common))


@torch.no_grad()
def graft_changes(plain: Path, options: dict[str, Any], common: list[str]) -> str:
    """Say how far grafting a token moves the class head of the pre-trained model, on its own validation set."""
    config = config_of({**options, "student.checkpoint": plain}, common)
    classes = build_splits(config).validation.classes
    grafted = parts.build_student(config, classes, torch.device("cpu")).eval()
    model = open_model("benchmark", plain / "student").eval()
    loader = build_evaluation_loader(config, build_splits(config).validation, Processes(0, 1, torch.device("cpu")))
    changed = seen = 0
    distance = 0.0
    for batch in loader:
        before, after = model(batch.images).softmax(-1), grafted(batch.images).cls_logits.softmax(-1)
        distance += float((before - after).abs().sum(-1).sum()) / 2
        changed += int((before.argmax(-1) != after.argmax(-1)).sum())
        seen += len(before)
    return f"graft: total variation {distance / seen:.4f}, another decision on {100 * changed / seen:.2f} % of {seen}"


def guide(until: float) -> str:
    """Return the terms of a run with guide maps until a share of it."""
    return json.dumps([{"kind": "guide", "weight": {"start": 2.5, "until": until} if until < 1 else 2.5}])


def main() -> None:
    """Run all variants and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--teacher-epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", help="names of the ways, as printed")
    given, common = parser.parse_known_args()
    first, second = halve(given.root, given.output)
    warmup = {"optim.warmup_epochs": min(5, given.epochs - 1), "train.epochs": given.epochs}
    scores: dict[str, list[float]] = {}
    for seed in given.seeds:
        plain = given.output / f"pretrained-{seed}"
        base = {"data.root": first, "seed": seed, "distill.terms": [], **warmup}
        if not (plain / HEADS_FILE).is_file():
            run({**base, "distill.kind": "none"}, common, plain)
        say(graft_changes(plain, base, common))
        teach = {
            "teacher.fit.epochs": given.teacher_epochs,
            "teacher.fit.folder": given.output / "teachers",
            "teacher.fit.optim.warmup_epochs": min(2, given.teacher_epochs - 1),
        }
        target = {"data.root": second, "seed": seed, "distill.terms": [], **warmup}
        tuned = {"student.checkpoint": plain}
        variants = {
            "fine-tuned, distilled": {**target, **teach, **tuned},
            "fine-tuned, guide until 0.5": {**target, **teach, **tuned, "distill.terms": guide(until=0.5)},
            "fine-tuned, guide to the end": {**target, **teach, **tuned, "distill.terms": guide(until=1.0)},
            "fine-tuned, grafted, alpha 0": {**target, **teach, **tuned, "distill.alpha": 0},
            "fine-tuned, plain": {**target, **tuned, "distill.kind": "none"},
            "from scratch, distilled": {**target, **teach},
            "from scratch, guide until 0.5": {**target, **teach, "distill.terms": guide(until=0.5)},
            "from scratch, plain": {**target, "distill.kind": "none"},
        }
        for name, options in variants.items():
            if given.only and name not in given.only:
                continue
            heads = run(options, common, given.output / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}")["heads"]
            best = heads["fused"] if heads["fused"] is not None and options.get("distill.alpha") != 0 else heads["cls"]
            scores.setdefault(name, []).append(best["top1"])
    for name, found in scores.items():
        spread = f" (from {min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
        say(f"{name:30} {statistics.mean(found):.2f} % top-1{spread}")


if __name__ == "__main__":
    main()
