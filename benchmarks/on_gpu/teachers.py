"""Forms of a teacher: precision of its weights, memory format, compiled or not; cuDNN searches as in a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import timm
import torch

from deit_kd.config import IMAGENET_MEAN, IMAGENET_STD
from deit_kd.interfaces import Batch
from deit_kd.kernels import choose_kernels
from deit_kd.models.create import size_argument
from deit_kd.teachers import FrozenTeacher
from on_gpu.setup import CLASSES, Point, Setup
from on_gpu.timing import Row, rounded, spread, take_turns


class Form(NamedTuple):
    """How a teacher is held and run."""

    dtype: torch.dtype
    channels_last: bool
    compiled: bool = False

    def __str__(self) -> str:
        words = ["bf16" if self.dtype == torch.bfloat16 else "fp32", "channels-last" if self.channels_last else "NCHW"]
        return ", ".join(words + ["compiled"] * self.compiled)


NOT_COMPILED = [Form(dtype, layout) for dtype in (torch.bfloat16, torch.float32) for layout in (True, False)]
OURS = NOT_COMPILED[0]  # what a recipe has unless it says otherwise
COMPILED = [OURS, *(OURS._replace(channels_last=layout, compiled=True) for layout in (True, False))]


def points(setup: Setup) -> Iterator[Point]:
    """Yield the forms of each teacher that are not compiled, then those that are, beside one that is not."""
    for name in setup.scale.teachers:
        yield name, partial(_rows, setup, name, NOT_COMPILED)
    if setup.scale.compiled:
        for name in setup.scale.teachers:
            yield f"{name}, compiled", partial(_rows, setup, name, COMPILED)


def _rows(setup: Setup, name: str, forms: list[Form]) -> list[Row]:
    scale, device = setup.scale, setup.device
    size = scale.image_size
    images = torch.randn(scale.teacher_batch, 3, size, size, device=device)
    labels = torch.zeros(len(images), dtype=torch.long, device=device)
    batch = Batch(images, images.new_zeros(len(images), CLASSES), labels)
    choose_kernels(device, deterministic=False)
    asked = {str(form): partial(_teacher(name, form, size, device), batch) for form in forms}
    clock, failed = take_turns(device, asked, images=len(images), rounds=scale.rounds, seconds=scale.seconds)
    ours = clock.rates.get(str(OURS))
    rows: list[Row] = [{"teacher": name, "form": form, "failed": why} for form, why in failed.items()]
    for form, rates in clock.rates.items():
        row: Row = {"teacher": name, "form": form, **spread(rates)}
        if ours is not None:
            times = [rate / other for rate, other in zip(rates, ours, strict=True)]
            row[f"times {OURS}"] = rounded(statistics.median(times))
        rows.append(row)
    return rows


def _teacher(name: str, form: Form, size: int, device: torch.device) -> FrozenTeacher:
    return FrozenTeacher(
        timm.create_model(name, num_classes=CLASSES, **size_argument(name, size)),
        student_mean=IMAGENET_MEAN,
        student_std=IMAGENET_STD,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        dtype=form.dtype,
        channels_last=form.channels_last,
        compiled=form.compiled,
    ).to(device)
