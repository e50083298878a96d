"""How large everything is, on which device, with which photos, and the recipe that all sections begin with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from deit_kd.config import Config, parse_config
from deit_kd.data import Photos, Splits
from deit_kd.distributed import Processes
from on_gpu.card import Card, measured
from on_gpu.timing import Row

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "imagenet_tiny.yaml"
CLASSES = 1000

Point = tuple[str, Callable[[], list[Row]]]  # what is measured together, and its rows


@dataclass(frozen=True)
class Scale:
    """How large everything is; the defaults are for a GPU."""

    image_size: int = 224
    students: Mapping[str, str] = field(
        default_factory=lambda: {
            "DeiT-Ti": "deit_tiny_distilled_patch16_224",
            "DeiT-S": "deit_small_distilled_patch16_224",
            "DeiT-B": "deit_base_distilled_patch16_224",
        }
    )
    student_args: str = "{}"
    batches: tuple[int, ...] = (1024, 512, 256)  # the first is that of the goals
    compiled: bool = True
    teachers: tuple[str, ...] = ("regnety_160", "resnet50", "deit3_base_patch16_224")  # the first one teaches in loops
    teacher_batch: int = 256
    steps_a_timing: int = 10  # of a loop
    workers: int = max(1, min(14, (os.cpu_count() or 1) - 2))
    views: int = 1024
    pillow_views: int = 256
    photos: int = 300
    longest_side: int = 500  # pixels of a generated photo
    attention: tuple[int, int, int, int] = (256, 6, 198, 64)  # images, heads, tokens, width of a head
    copied_bytes: int = 1 << 31
    matmul_size: int = 8192
    rounds: int = 5
    seconds: float = 0.2  # that a timing lasts at least


TOY = Scale(
    image_size=32,
    students={"DeiT-Ti": "deit_tiny_distilled_patch16_224"},
    student_args='{"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}',
    batches=(4, 2),
    compiled=False,
    teachers=("test_resnet", "test_vit"),
    teacher_batch=2,
    steps_a_timing=2,
    workers=0,
    views=4,
    pillow_views=4,
    photos=8,
    longest_side=64,
    attention=(2, 2, 18, 16),
    copied_bytes=1 << 20,
    matmul_size=64,
    rounds=2,
    seconds=0.0,
)


@dataclass
class Setup:
    """What every section is given.

    Args:
        scale: how large everything is.
        processes: of this program; its device computes.
        photos: files, in `CLASSES` classes.
        output: folder of the results.
        tests: what pytest collects.
    """

    scale: Scale
    processes: Processes
    photos: Photos
    output: Path
    tests: str

    @property
    def device(self) -> torch.device:
        """What computes."""
        return self.processes.device

    @cached_property
    def card(self) -> Card:
        """The measured rates of the device."""
        scale = self.scale
        return measured(self.device, scale.copied_bytes, scale.matmul_size, scale.rounds, scale.seconds)

    def recipe(self, student: str, batch: int, **changes: str) -> Config:
        """Return the recipe of ImageNet for one of the scale's students; ``data__cache="memory"`` changes a key.

        Raises:
            InputError: a key or a value does not exist.
        """
        scale = self.scale
        keys = {
            "data.image_size": str(scale.image_size),
            "data.workers": str(scale.workers),
            "student.name": scale.students[student],
            "student.args": scale.student_args,
            "teacher.name": scale.teachers[0],
            "teacher.pretrained": "false",
            "teacher.random_weights": "true",
            "teacher.image_size": str(scale.image_size),
            "teacher.min_top1": "0",
            "train.batch_size": str(batch),
            "train.compile": "false",
            "train.device": str(self.device),
        } | {key.replace("__", "."): value for key, value in changes.items()}
        config, _ = parse_config(["--config", str(RECIPE), *(text for key in keys for text in (f"--{key}", keys[key]))])
        return config

    def tiled(self, count: int) -> Splits:
        """Return a training split of `count` photos, the same ones again and again."""
        return Splits(tile(self.photos, count), tile(self.photos, min(count, len(self.photos))))


def tile(photos: Photos, count: int) -> Photos:
    """Return `count` photos with labels in turn, as often the same ones as that takes."""
    again = photos.subset([index % len(photos) for index in range(count)])
    return replace(again, labels=np.arange(count) % len(photos.classes))
