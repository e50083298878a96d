"""What several test modules share: photos, recipes, and what is done with whole runs."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from deit_kd.cli import main
from deit_kd.distributed import Processes

REPOSITORY = Path(__file__).resolve().parents[1]
CLASSES = ("bars", "dots", "rings")
FIVE_CLASSES = tuple("abcde")
SEVEN_CLASSES = ("apple", "bread", "<b>cup", "door", "egg", "fork", "gate")
STUDENT = "deit_tiny_distilled_patch16_224"
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
STUDENT_ARGS = {"patch_size": 8, **TINY}
ONE_PROCESS = Processes(0, 1, torch.device("cpu"))
FIT_STEPS = 8  # optimiser steps of the teacher's fit in FULL; the student's 12 come after them
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


def as_arguments(**options: Any) -> list[str]:
    """Turn ``distill__kind="soft"`` into ``["--distill.kind", "soft"]``; None leaves an option out."""
    arguments = []
    for key, value in options.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            arguments += [f"--{key.replace('__', '.')}", text.strip('"')]
    return arguments


def tiny(root: Path, output: Path | None, **options: Any) -> list[str]:
    """Return the arguments of a run of seconds, with a random teacher unless `options` say otherwise.

    Keys may be written ``distill.kind`` or ``distill__kind``; None leaves an option to its default.
    """
    base: dict[str, Any] = {
        "data__root": root,
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
        "output": output,
    }
    return as_arguments(**{**base, **{key.replace(".", "__"): value for key, value in options.items()}})


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
        return heads_in(self.folder)


def short(root: Path, output: Path, **options: Any) -> list[str]:
    """Return the arguments of a run like those of `runs`: two epochs of two steps."""
    return tiny(root, output, **{"train__epochs": 2, "train__batch_size": 14, **options})


def records(folder: Path) -> list[dict[str, Any]]:
    """Return ``metrics.jsonl`` without its rates, which no run repeats."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "images_per_second"} for line in lines]


def heads_in(folder: Path) -> Any:
    """Return what the ``heads.json`` of a run, an evaluation or a report holds."""
    return json.loads((folder / "heads.json").read_text())


def evaluated(folder: Path, split: str = "validation") -> Any:
    """Return what ``deit-kd eval`` found of a run."""
    return heads_in(folder / "eval" / split)


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
def no_waiting(device: torch.device) -> Iterator[None]:
    """Raise where something waits for the GPU; nothing does for the CPU."""
    if device.type == "cpu":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CUDA's debug mode itself
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def before_steps(act: Callable[[int], None]) -> Iterator[None]:
    """Within the context, call `act` with the number of each optimiser step of this process (from 1) before it."""
    steps = itertools.count(1)
    hook = register_optimizer_step_pre_hook(lambda *_: act(next(steps)))
    try:
        yield
    finally:
        hook.remove()


def signal_in_step(number: int, step: int) -> AbstractContextManager[None]:
    """Send a signal to this process within its optimiser step `step` (from 1)."""
    return before_steps(lambda done: os.kill(os.getpid(), number) if done == step else None)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that `arguments` are refused with."""
    capsys.readouterr()
    code = main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def elsewhere(finished: Finished, home: Path) -> list[str]:
    """Return the arguments of the finished run, with its run and teachers under `home`."""
    return [*finished.arguments, "--output", str(home / "run"), "--teacher.fit.folder", str(home / "teachers")]


def assert_same_end(finished: Finished, home: Path) -> None:
    """Assert that the run and the teacher under `home` are those of the finished run, bit for bit."""
    teacher = next(finished.teachers.iterdir()).name
    for here, there in ((finished.teachers / teacher, home / "teachers" / teacher), (finished.folder, home / "run")):
        for file in ("student/model.safetensors", "student/config.json", "heads.json"):
            assert (here / file).read_bytes() == (there / file).read_bytes(), f"{there / file}"
        assert records(here) == records(there)


def newest_two(run: Path) -> list[Path]:
    """Return the files of the last two checkpoints, the newest last."""
    return sorted((run / "checkpoints").glob("step-*"))[-2:]


def copied(finished: Finished, home: Path) -> list[str]:
    """Copy the finished run to `home`; return the arguments that resume it there."""
    shutil.copytree(finished.folder, home / "run")
    shutil.copytree(finished.teachers, home / "teachers")
    return [*elsewhere(finished, home), "--resume", "auto"]
