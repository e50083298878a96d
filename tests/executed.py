"""What the tests of the executor share: real photos in one buffer, rows, and Pillow as the judge of its pixels."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import auto_augment as timm_operations
from torch import Tensor

from deit_kd.views import Drawing, Executor, Operation, PhotoBuffer, Rows, draw

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = tuple(min(255, round(255 * value)) for value in MEAN)  # timm's colour outside an image


def drawing(**options: Any) -> Drawing:
    """Return DeiT's augmentation at 24 px."""
    recipe: dict[str, Any] = {
        "image_size": 24,
        "interpolation": "random",
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.3,
        "horizontal_flip": 0.5,
        "scale": (0.08, 1.0),
        "ratio": (3 / 4, 4 / 3),
        "erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
    }
    return Drawing(**{**recipe, **options})


def view_ids(count: int, epoch: int = 3) -> np.ndarray:
    """Return the ids [count, 2] of the first positions of an epoch."""
    return np.stack((np.full(count, epoch), np.arange(count)), 1)


@lru_cache
def photos() -> tuple[np.ndarray, ...]:
    """Return parts of two real photos, in several shapes and scales, with noise, one colour and few levels beside."""
    flower, china = (Image.fromarray(load_sample_image(name)) for name in ("flower.jpg", "china.jpg"))
    random = np.random.default_rng(0)
    return (
        *(np.asarray(flower.crop((200, 100, 200 + width, 100 + height))) for width, height in ((61, 40), (24, 24))),
        *(np.asarray(china.resize(size)) for size in ((80, 53), (20, 90), (33, 21))),
        random.integers(0, 256, (47, 50, 3), dtype=np.uint8),
        np.full((30, 30, 3), (200, 0, 255), np.uint8),
        random.choice(np.array((0, 9, 255), np.uint8), (26, 31, 3)),
    )


def buffer(images: tuple[np.ndarray, ...]) -> PhotoBuffer:
    """Return `images` [h, w, 3] as the executor reads them."""
    ends = np.cumsum([image.size for image in images])
    shapes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int32)
    pixels = torch.from_numpy(np.concatenate([image.ravel() for image in images]))
    return PhotoBuffer(pixels, torch.from_numpy(np.concatenate(([0], ends[:-1]))), shapes[:, 0], shapes[:, 1])


def drawn(count: int, images: tuple[np.ndarray, ...] | None = None, **options: Any) -> tuple[np.ndarray, Rows]:
    """Return which of `images` (the photos) each of `count` views shows, and the rows of the views."""
    images = images or photos()
    which = np.arange(count) % len(images)
    return which, draw(drawing(**options), 0, view_ids(count), np.array([images[each].shape[:2] for each in which]))


def executor(**options: Any) -> Executor:
    return Executor(**{"image_size": 24, "mean": MEAN, "std": STD, **options})


def levels(views: Tensor) -> np.ndarray:
    """Return the levels [n, 3, H, W] that normalised views were made of."""
    values = views * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return (values * 255).round().int().numpy()


def plain(rows: Rows) -> Rows:
    """Return `rows` without erasing, so that every pixel is Pillow's."""
    return replace(rows, erasing=np.zeros_like(rows.erasing))


def by_pillow(photo: np.ndarray, rows: Rows, row: int, size: int = 24) -> np.ndarray:
    """Return the levels [3, size, size] that Pillow makes of `photo` by one row."""
    top, left, height, width = rows.crop[row].tolist()
    image = Image.fromarray(photo).crop((left, top, left + width, top + height))
    cubic = Image.Resampling.BICUBIC if rows.resize_bicubic[row] else Image.Resampling.BILINEAR
    # In two steps, since versions of Pillow differ in which they begin with.
    upright = height - size > 2 * max(0, width - size)
    image = image.resize((width, size) if upright else (size, height), cubic).resize((size, size), cubic)
    if rows.flip[row]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for slot in range(rows.operations.shape[1]):
        image = operated(
            image, rows.operations[row, slot], rows.arguments[row, slot], rows.operation_bicubic[row, slot]
        )
    return np.asarray(image).transpose(2, 0, 1).astype(int)


def operated(image: Image.Image, operation: int, argument: float, bicubic: bool) -> Image.Image:
    """Return `image` after timm's own function of one operation."""
    filters = {"resample": Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR, "fillcolor": FILL}
    function = _FUNCTIONS.get(Operation(operation))
    if function is None:
        return image
    if operation in (Operation.AUTO_CONTRAST, Operation.EQUALIZE, Operation.INVERT):
        return function(image)
    whole = operation in (Operation.POSTERIZE, Operation.SOLARIZE, Operation.SOLARIZE_ADD)
    return function(image, int(argument) if whole else float(argument), **filters)


_FUNCTIONS = {
    Operation.SHEAR_X: timm_operations.shear_x,
    Operation.SHEAR_Y: timm_operations.shear_y,
    Operation.TRANSLATE_X: timm_operations.translate_x_abs,
    Operation.TRANSLATE_Y: timm_operations.translate_y_abs,
    Operation.ROTATE: timm_operations.rotate,
    Operation.AUTO_CONTRAST: timm_operations.auto_contrast,
    Operation.EQUALIZE: timm_operations.equalize,
    Operation.INVERT: timm_operations.invert,
    Operation.POSTERIZE: timm_operations.posterize,
    Operation.SOLARIZE: timm_operations.solarize,
    Operation.SOLARIZE_ADD: lambda image, add, **_: timm_operations.solarize_add(image, add),
    Operation.BRIGHTNESS: timm_operations.brightness,
    Operation.CONTRAST: timm_operations.contrast,
    Operation.COLOR: timm_operations.color,
    Operation.SHARPNESS: timm_operations.sharpness,
    Operation.BLUR: timm_operations.gaussian_blur,
}
