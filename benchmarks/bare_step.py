"""The student's step of a recipe alone: random images in memory, the teacher's answers known, no photo ever read."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import torch
from torch.nn.functional import one_hot

from deit_kd.config import Config
from deit_kd.data import Photos, Splits
from deit_kd.distributed import Processes
from deit_kd.engine import train
from deit_kd.interfaces import Batch, TeacherOutput
from deit_kd.kernels import preferred_attention
from deit_kd.runs.attention import attention_kernel
from deit_kd.runs.lesson import Lesson, connect
from deit_kd.runs.prepared import Run
from deit_kd.runs.run import build_trainer, prepare


class BareStep:
    """A recipe's trainer on one batch of random images.

    Args:
        config: the recipe; the whole batch is one micro-batch unless it accumulates.
        classes: that the student tells apart.
        processes: of the run.
    """

    def __init__(self, config: Config, classes: int, processes: Processes) -> None:
        self.batch = random_batch(config, classes, processes.device)
        answers = TeacherOutput(torch.randn(len(self.batch.labels), classes, device=processes.device))
        lesson = Lesson(lambda batch: answers)
        run = connect(prepare_bare(config, classes, processes), lesson)
        self.trainer = replace(build_trainer(run, lesson), accumulation_steps=1)
        self._attention = attention_kernel(run)

    def __call__(self, times: int = 1) -> None:
        """Do so many optimiser steps."""
        batches = itertools.repeat(self.batch)
        with preferred_attention(self._attention):
            train(self.trainer, batches, first_step=0, total_steps=times, after_step=lambda *_: None)


def prepare_bare(config: Config, classes: int, processes: Processes) -> Run:
    """Prepare a run whose photos suffice to deal a batch; no view of them is ever made."""
    count = config.train.batch_size * config.augment.repeats
    photos = Photos.of_arrays(
        names=class_names(count),
        labels=[index % classes for index in range(count)],
        classes=class_names(classes),
        arrays=np.zeros((count, 2, 2, 3), dtype=np.uint8),
    )
    return prepare(config.with_keys(data={"workers": 0, "cache": "none"}), processes, Splits(photos, photos))


def class_names(count: int) -> tuple[str, ...]:
    """Return names for `count` classes."""
    return tuple(f"{index:05d}" for index in range(count))


def random_batch(config: Config, classes: int, device: torch.device) -> Batch:
    """Return one micro-batch of random images."""
    size, side = config.train.batch_size // config.train.accumulation_steps, config.data.image_size
    labels = torch.randint(classes, (size,), device=device)
    return Batch(torch.randn(size, 3, side, side, device=device), one_hot(labels, classes).float(), labels)
