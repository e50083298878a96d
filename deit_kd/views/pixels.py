"""The most expensive stages of a view, bit-identical to torchvision's, in fewer passes over the pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter, Normalize, ToTensor
from torchvision.transforms import functional as F


def in_fewer_passes(stages: list[Callable]) -> list[Callable]:
    """Return `stages` with torchvision's colour jitter and its tensor-and-normalise replaced by the faster ones."""
    quick: list[Callable] = []
    for stage in stages:
        if isinstance(stage, ColorJitter):
            quick.append(QuickJitter(stage))
        elif isinstance(stage, Normalize) and quick and isinstance(quick[-1], ToTensor):
            quick[-1] = ToNormalised(stage)
        else:
            quick.append(stage)
    return quick


class QuickJitter:
    """torchvision's colour jitter: the same draws, the same order, the same pixels."""

    def __init__(self, jitter: ColorJitter) -> None:
        self.jitter = jitter

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return `image` (RGB) with brightness, contrast, saturation and hue changed in a random order."""
        jitter = self.jitter
        order, *factors = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for index in order.tolist():
            if factors[index] is not None:
                image = _ADJUST[index](image, factors[index])
        return image


def _adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    # Pillow's own computes the mean from a histogram, in Python.
    grey = np.asarray(image.convert("L"))
    mean = int(int(grey.sum()) / grey.size + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


_ADJUST = (F.adjust_brightness, _adjust_contrast, F.adjust_saturation, F.adjust_hue)


class ToNormalised:
    """torchvision's ``ToTensor`` and ``Normalize`` in one buffer."""

    def __init__(self, normalize: Normalize) -> None:
        self._mean = torch.as_tensor(normalize.mean, dtype=torch.float32).view(3, 1, 1)
        self._std = torch.as_tensor(normalize.std, dtype=torch.float32).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return `image` (RGB) as [3, H, W]."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return values.div_(255).sub_(self._mean).div_(self._std)
