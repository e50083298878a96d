"""A small folder of photos and runs on it that took seconds; shared by the tests of what is done with a run."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deit_kd.cli import main

CLASSES = ("apple", "bread", "<b>cup", "door", "egg", "fork", "gate")


def write_photos(root: Path, classes: tuple[str, ...] = CLASSES, **counts: int) -> Path:
    """Write ``root/<split>/<class>/<index>.png``; the colour says the class."""
    for split, count in counts.items():
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([label, index, len(split)]).integers(0, 130, (18, 16 + index, 3))
                pixels[..., label % 3] += 40 + 12 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")
    return root


def train_tiny(root: Path, output: Path, *options: str) -> Path:
    """Train a student of 2 blocks for 2 epochs with a random teacher; return its run."""
    arguments = [
        *("--data.root", str(root), "--data.image_size", "16", "--data.workers", "0", "--data.crop_fraction", "1"),
        *("--augment.auto_augment", "null", "--augment.repeats", "1", "--optim.warmup_epochs", "0"),
        *("--student.name", "deit_tiny_distilled_patch16_224", "--student.drop_path", "0"),
        *("--student.args", '{"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}'),
        *("--teacher.name", "test_resnet", "--teacher.random_weights", "true"),
        *("--train.epochs", "2", "--train.batch_size", "14", "--train.precision", "off", "--train.device", "cpu"),
        *(
            "--train.ema_decay",
            "0",
            "--train.log_every_steps",
            "1",
            "--evaluate.report",
            "false",
            "--output",
            str(output),
            *options,
        ),
    ]
    assert main(["train", *arguments]) == 0
    return output


@lru_cache(maxsize=1)
def _home(base: Path) -> Path:
    home = base / "finished"
    write_photos(home / "photos", train=4, validation=5)
    train_tiny(home / "photos", home / "distilled")
    train_tiny(home / "photos", home / "plain", "--distill.kind", "none")
    return home


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``photos``, the run ``distilled`` and the run ``plain``, which has no distillation token."""
    return _home(tmp_path_factory.getbasetemp())
