"""Transforms from an image to a view: timm's augmentation for training, resize and crop for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment
from timm.data.transforms import ResizeKeepRatio
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torch import Tensor
from torchvision.transforms import Compose

from deit_kd.interfaces import InputError, Preprocessing, Statistics
from deit_kd.views.pixels import in_fewer_passes

Transform = Callable[[Image.Image], Tensor]


def training_transform(
    *,
    image_size: int,
    mean: Statistics,
    std: Statistics,
    interpolation: str,
    auto_augment: str | None,
    color_jitter: float,
    horizontal_flip: float,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    erasing: float,
) -> Transform:
    """Return timm's training transform: PIL image to normalised [3, H, W].

    `auto_augment` is timm's policy string (``rand-m9-mstd0.5-inc1``, ``3a`` for three-augment, …) or None.

    Raises:
        InputError: timm does not know the policy.
    """
    try:
        transform = transforms_imagenet_train(
            img_size=image_size,
            scale=scale,
            ratio=ratio,
            hflip=horizontal_flip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            interpolation=interpolation,
            mean=mean,
            std=std,
            re_prob=erasing,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(
            f"augment.auto_augment: {auto_augment!r} is not a timm policy; use rand-m9-mstd0.5-inc1, 3a or null"
        ) from error
    _keep_one_bit_of_posterise(transform)
    return Compose(in_fewer_passes(transform.transforms))


def evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """Return timm's evaluation transform: resize, centre crop, normalise; PIL image to [3, H, W]."""
    transform = transforms_imagenet_eval(
        img_size=preprocessing.image_size,
        crop_pct=preprocessing.crop_fraction,
        crop_mode=preprocessing.crop_mode,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    resizes: list[Any] = [stage for stage in transform.transforms if isinstance(stage, ResizeKeepRatio)]
    for resize in resizes:
        resize.get_params = _at_least_one_pixel  # timm's can round a side of a long thin photo to 0
    return Compose(in_fewer_passes(transform.transforms))


def _at_least_one_pixel(*arguments: Any) -> list[int]:
    return [max(1, edge) for edge in ResizeKeepRatio.get_params(*arguments)]


def _keep_one_bit_of_posterise(transform: Any) -> None:
    # timm's ``inc1`` asks for 0 bits in about 1 view of 650, which Pillow 13 refuses; its other increasing
    # policies (v0r, augmix) do so at magnitude 10.
    for stage in transform.transforms:
        for operation in _operations(stage):
            if operation.name.startswith("Posterize"):
                operation.level_fn = _AtLeastOneBit(operation.level_fn)


def _operations(stage: Any) -> list[AugmentOp]:
    if isinstance(stage, AutoAugment):
        return [operation for sub_policy in stage.policy for operation in sub_policy]
    return stage.ops if isinstance(stage, RandAugment | AugMixAugment) else []


class _AtLeastOneBit:
    def __init__(self, level_fn: Callable[..., tuple[int, ...]]) -> None:
        self._level_fn = level_fn

    def __call__(self, *args: Any) -> tuple[int, ...]:
        bits, *rest = self._level_fn(*args)
        return (max(1, bits), *rest)
