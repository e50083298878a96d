"""What several tests share: a tiny image folder, tiny recipes, and one finished run."""

from __future__ import annotations

import os

# Before torch and huggingface_hub are imported: nothing is downloaded, and this process and those that tests
# start compute with the same number of threads, so that their results can be compared bit for bit.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import deit_kd.jobs.train  # noqa: F401 - a verb imports its job when it is called; here its warnings are not tests'
from deit_kd.cli import main
from deit_kd.data import Photos, Splits, TrainingLoader, build_splits, build_training_loader
from deit_kd.distributed import Processes
from deit_kd.students import TimmStudent, build_student

REPOSITORY = Path(__file__).resolve().parents[1]
CLASSES = ("bars", "dots", "rings")
STUDENT = "deit_tiny_distilled_patch16_224"
STUDENT_ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ONE_PROCESS = Processes(0, 1, torch.device("cpu"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

torch.set_num_threads(1)


def draw(label: int, index: int) -> Image.Image:
    """Return a small noisy image whose pattern and colour depend on the class."""
    noise = np.random.default_rng(1000 * label + index)
    y, x = np.mgrid[0:24, 0 : 20 + index % 5]
    pattern = (x % 4 < 2, (x % 4 < 2) & (y % 4 < 2), np.hypot(x - 10, y - 12) % 6 < 3)[label]
    image = noise.integers(0, 120, (*pattern.shape, 3))
    image[..., label] += 100 * pattern
    return Image.fromarray(image.astype(np.uint8))


def write_photos(root: Path, counts: dict[str, int], classes: tuple[str, ...] = CLASSES) -> Path:
    """Write ``root/<split>/<class>/<index>.png``; an empty split name writes no split folder."""
    for split, count in counts.items():
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                draw(label % 3, index + 500 * (split == "validation")).save(folder / f"{index:03d}.png")
    return root


@pytest.fixture(scope="session")
def photos_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 21 validation photos of 3 classes."""
    return write_photos(tmp_path_factory.mktemp("photos"), {"train": 16, "validation": 7})


def as_arguments(**options: Any) -> list[str]:
    """Turn ``distill__kind="soft"`` into ``["--distill.kind", "soft"]``; None leaves an option out."""
    arguments = []
    for key, value in options.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            arguments += [f"--{key.replace('__', '.')}", text.strip('"')]
    return arguments


def tiny(root: Path, output: Path, **options: Any) -> list[str]:
    """Return the arguments of a run of seconds, with a random teacher unless `options` say otherwise."""
    base: dict[str, Any] = {
        "data__root": str(root),
        "data__image_size": 16,
        "data__crop_fraction": 1.0,
        "data__workers": 0,
        "augment__auto_augment": "null",
        "augment__repeats": 1,
        "student__name": STUDENT,
        "student__args": STUDENT_ARGS,
        "student__drop_path": 0.0,
        "teacher__name": "test_resnet",
        "teacher__random_weights": True,
        "optim__lr": 1e-3,
        "optim__lr_reference_batch": 0,
        "optim__warmup_epochs": 0,
        "train__epochs": 1,
        "train__batch_size": 8,
        "train__precision": '"off"',
        "train__ema_decay": 0,
        "train__device": "cpu",
        "train__log_every_steps": 1,
        "evaluate__report": False,
        "output": str(output),
    }
    return as_arguments(**{**base, **options})


# Everything random at once, and the teacher is fitted first.
FULL = {
    "data__workers": 2,
    "augment__auto_augment": "rand-m9-mstd0.5-inc1",
    "augment__repeats": 2,
    "student__drop_path": 0.2,
    "teacher__random_weights": None,
    "teacher__min_top1": 0,  # two epochs of toy images: it is too young for the gate
    "teacher__fit__epochs": 2,
    "teacher__fit__batch_size": 12,
    "teacher__fit__ema_decay": 0.75,
    "teacher__fit__optim__lr": 4e-3,
    "teacher__fit__optim__warmup_epochs": 0,
    "distill__kind": "soft",
    "optim__clip_grad_norm": 1.0,
    "train__epochs": 2,
    "train__accumulation_steps": 2,
    "train__ema_decay": 0.8,
    "train__log_every_steps": 4,
    "train__checkpoint_every_steps": 2,
}


@dataclass(frozen=True)
class Finished:
    """A finished run and the arguments that made it."""

    folder: Path
    teachers: Path
    arguments: list[str]

    @property
    def heads(self) -> Any:
        """What ``heads.json`` holds."""
        return json.loads((self.folder / "heads.json").read_text())


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, photos_root: Path) -> Finished:
    """A run with a fitted teacher, never broken off."""
    home = tmp_path_factory.mktemp("finished")
    arguments = tiny(photos_root, home / "run", **FULL, teacher__fit__folder=str(home / "teachers"))
    assert main(["train", *arguments]) == 0
    return Finished(home / "run", home / "teachers", arguments)


SEVEN_CLASSES = ("apple", "bread", "<b>cup", "door", "egg", "fork", "gate")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``photos`` and two runs on them: ``distilled``, and ``plain`` without a distillation token."""
    home = tmp_path_factory.mktemp("runs")
    write_photos(home / "photos", {"train": 4, "validation": 5}, SEVEN_CLASSES)
    for name, kind in (("distilled", "hard"), ("plain", "none")):
        assert main(["train", *short(home / "photos", home / name, distill__kind=kind)]) == 0
    return home


def short(root: Path, output: Path, **options: Any) -> list[str]:
    """Return the arguments of a run like those of `runs`: two epochs of two steps."""
    return tiny(root, output, **{"train__epochs": 2, "train__batch_size": 14, **options})


def records(folder: Path) -> list[dict[str, Any]]:
    """Return ``metrics.jsonl`` without its rates, which no run repeats."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "images_per_second"} for line in lines]


def folder_splits(root: Path | None, **options: Any) -> Splits:
    """Return the photos under `root`, whose fifth is for validation unless they say or `options` say otherwise."""
    base: dict[str, Any] = {
        "name": "folder",
        "root": None if root is None else str(root),
        "train_split": "train",
        "validation_split": "validation",
        "validation_fraction": 0.2,
        "folds": None,
        "fold": None,
        "download": False,
    }
    return build_splits(**{**base, **options})


def training_loader(photos: Photos, transform: Any, **options: Any) -> TrainingLoader:
    """Return the loader of one process that mixes, one epoch in batches of 8 unless `options` say otherwise."""
    base: dict[str, Any] = {
        "seed": 0,
        "repeats": 1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mix_probability": 1.0,
        "mix_switch_probability": 0.5,
        "label_smoothing": 0.1,
        "batch_size": 8,
        "accumulation_steps": 1,
        "epochs": 1,
        "rank": 0,
        "processes": 1,
        "workers": 0,
        "pin_memory": False,
    }
    return build_training_loader(photos, transform, **{**base, **options})


def tiny_student(**options: Any) -> TimmStudent:
    """Return a small distilled student of 3 classes at 16 px."""
    base: dict[str, Any] = {
        "name": STUDENT,
        "pretrained": False,
        "checkpoint": None,
        "args": STUDENT_ARGS,
        "drop_path": 0.0,
        "classes": CLASSES,
        "image_size": 16,
        "distilled": True,
        "seed": 0,
    }
    return build_student(**{**base, **options})


def array_photos(count: int, size: int = 12, classes: int = 3) -> Photos:
    """Return `count` images in memory, photo i with label i mod `classes`."""
    arrays = np.random.default_rng(0).integers(0, 255, (count, size, size, 3)).astype(np.uint8)
    return Photos(
        names=[f"{i:04d}" for i in range(count)],
        labels=[i % classes for i in range(count)],
        classes=tuple(f"class{c}" for c in range(classes)),
        arrays=arrays,
    )


def evaluated(folder: Path, split: str = "validation") -> Any:
    """Return what ``deit-kd eval`` found of a run."""
    return json.loads((folder / "eval" / split / "heads.json").read_text())


def assert_same_scores(evaluation: Any, trained: Any) -> None:
    """Assert that an evaluation holds what the ``heads.json`` of a run does."""
    assert (evaluation["n"], evaluation["weights"]) == (trained["n"], trained["weights"])
    assert evaluation["agreement"] == pytest.approx(trained["agreement"])
    for name, score in {**trained["heads"], "teacher": trained["teacher"]}.items():
        found = {**evaluation["heads"], "teacher": evaluation["teacher"]}[name]
        assert (found is None) == (score is None)
        assert score is None or {key: found[key] for key in score} == pytest.approx(score)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return every file under `folder` by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def signal_in_step(number: int, step: int) -> Iterator[None]:
    """Send a signal to this process within its optimiser step `step` (from 1)."""
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        if done == step:
            os.kill(os.getpid(), number)

    hook = register_optimizer_step_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()
