"""Mixup and CutMix in pairs: positions 2m and 2m + 1 of an epoch are mixed with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deit_kd.interfaces import Batch, InputError, Missing
from deit_kd.randomness import generator


class Example(NamedTuple):
    """One view on its way into a batch."""

    image: Tensor  # [3, H, W]
    label: int
    epoch: int | None  # of the view; None in evaluation
    position: int
    photo: int = -1  # index in its split
    unreadable: str | None = None  # why there is no image, if there is none


def missing_of(examples: list[Example]) -> list[Missing]:
    """Return which of `examples` have no image."""
    return [
        Missing(row, example.photo, example.epoch, example.position, example.unreadable)
        for row, example in enumerate(examples)
        if example.unreadable is not None
    ]


@dataclass(frozen=True)
class Mixing:
    """Collates views into a batch and mixes its pairs; a pure function of (seed, epoch, pair).

    Both partners of a pair get the same share `lam`, as timm's ``pair`` mode does. If one of them cannot be read, the
    other is not mixed.

    Args:
        classes: C.
        seed: of the run.
        mixup: alpha of mixup's beta distribution (Zhang et al. 2018); 0 is off.
        cutmix: alpha of CutMix's (Yun et al. 2019); 0 is off.
        probability: that a pair is mixed at all.
        switch_probability: of CutMix, if both are on.
        label_smoothing: mass spread evenly over all classes.
    """

    classes: int
    seed: int
    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch_probability: float = 0.5
    label_smoothing: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether any pair is ever mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.probability > 0

    def __call__(self, examples: list[Example], stack: Callable[[list[Tensor]], Tensor] = torch.stack) -> Batch:
        """Return the batch of `examples`, whose positions are contiguous and start even when mixing is on.

        `stack` makes one tensor of the views, which is then mixed in place.
        """
        images = stack([example.image for example in examples])
        labels = torch.tensor([example.label for example in examples])
        view_ids = torch.tensor([(example.epoch, example.position) for example in examples])
        targets = smoothed_targets(labels, self.classes, self.label_smoothing)
        if self.is_on:
            for first in range(0, len(examples), 2):
                pair = slice(first, first + 2)
                self._mix_pair(examples[pair], images[pair], targets[pair])
        return Batch(images, targets, labels, view_ids).without(missing_of(examples))

    def _mix_pair(self, pair: list[Example], images: Tensor, targets: Tensor) -> None:
        epoch, position = pair[0].epoch, pair[0].position
        assert epoch is not None
        if position % 2 or len(pair) == 1:
            raise InputError(f"mixing needs whole pairs, but position {position} has lost its partner")
        if any(example.unreadable is not None for example in pair):
            return
        choices = generator("mixing", self.seed, epoch, position // 2)
        if choices.random() >= self.probability:
            return
        cut = self.cutmix > 0 and (self.mixup == 0 or choices.random() < self.switch_probability)
        alpha = self.cutmix if cut else self.mixup
        lam = float(choices.beta(alpha, alpha))
        if cut:
            lam = _exchange_box(images, lam, choices)
        else:
            images.copy_(images.lerp(images.flip(0), 1 - lam))
        targets.copy_(targets.lerp(targets.flip(0), 1 - lam))


def smoothed_targets(labels: Tensor, classes: int, label_smoothing: float) -> Tensor:
    """Return the targets [B, C] of `labels` [B] on their device; 0 for a photo without a label, -1."""
    smooth = label_smoothing / classes
    targets = torch.full((len(labels), classes), smooth, device=labels.device)
    targets.scatter_(1, labels.clamp_min(0)[:, None], 1 - label_smoothing + smooth)
    return targets.masked_fill_((labels < 0)[:, None], 0)  # without a label there is no classification loss


def _exchange_box(images: Tensor, lam: float, choices: np.random.Generator) -> float:
    """Exchange one box between two images [2, 3, H, W]; return the share that each keeps."""
    height, width = images.shape[-2:]
    box_height, box_width = int(height * sqrt(1 - lam)), int(width * sqrt(1 - lam))
    centre_y, centre_x = int(choices.integers(height)), int(choices.integers(width))
    top, bottom = max(0, centre_y - box_height // 2), min(height, centre_y + box_height // 2)
    left, right = max(0, centre_x - box_width // 2), min(width, centre_x + box_width // 2)
    box = images[..., top:bottom, left:right]
    box.copy_(box.flip(0))
    return 1 - (bottom - top) * (right - left) / (height * width)
