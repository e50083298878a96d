"""The executor's views: whole and by primitive, beside Pillow's on one core."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch

from deit_kd.config import Config
from deit_kd.data.photos import Photos
from deit_kd.randomness import seed_view
from deit_kd.views import Drawing, Executor, Operation, PhotoBuffer, Rows, draw, reference, training_transform
from on_gpu.setup import CLASSES, Point, Setup
from on_gpu.timing import Row, microseconds, rounded, take_turns

WHOLE = {"RandAugment": "rand-m9-mstd0.5-inc1", "three-augment": "3a"}  # of augment.auto_augment
BARE, TIME, BEYOND = "crop and resize", "µs a view", "beyond a bare view, µs"
OPERATIONS = {  # every view has the operation, with a usual argument
    "affine, bilinear": (Operation.ROTATE, 15.0, False),
    "affine, bicubic": (Operation.ROTATE, 15.0, True),
    "table": (Operation.POSTERIZE, 4.0, False),
    "table from a histogram": (Operation.EQUALIZE, 0.0, False),
    "blend with the mean": (Operation.CONTRAST, 1.5, False),
    "blend with grey": (Operation.COLOR, 1.5, False),
    "blend with 3 x 3": (Operation.SHARPNESS, 1.5, False),
    "blur": (Operation.BLUR, 1.0, False),
}
PYTORCH = "PyTorch"
SEED = 0

Made = tuple[str, str]  # a view, and what makes it
Act = Callable[[], object]


def points(setup: Setup) -> Iterator[Point]:
    """Yield whole views, beside Pillow's, then single primitives and mixing."""
    for name, policy in WHOLE.items():
        yield f"whole views, {name}", partial(_whole, setup, name, policy)
    for by in _executors(_recipe(setup), setup.device):
        yield f"primitives by {by}", partial(_primitives, setup, by)
    yield "mixing", partial(_mixing, setup)


def _whole(setup: Setup, name: str, policy: str) -> list[Row]:
    """Return the rows of drawing and making views, and of Pillow's, decoded photos given."""
    views, config = setup.scale.views, _recipe(setup)
    photos, buffer = _decoded(setup)
    drawing = _drawing(config, auto_augment=policy)
    which, view_ids, sizes = _dealt(photos, views)
    rows, executors = draw(drawing, SEED, view_ids, sizes), _executors(config, setup.device)
    acts: dict[Made, Act] = {(name, by): partial(make, buffer, which, rows) for by, make in executors.items()}
    acts[f"{name}: only the rows", "host"] = lambda: draw(drawing, SEED, view_ids, sizes)
    on_device = _timed(setup, acts, views)
    some = setup.scale.pillow_views
    (pillow,) = _timed(setup, {(name, "Pillow, one core"): _pillow(config, photos, policy, some)}, some)
    for row in on_device[: len(executors)]:
        if "failed" not in row | pillow:
            row["Pillow's core / this"] = rounded(pillow[TIME] / row[TIME])
    return [*on_device, pillow]


def _primitives(setup: Setup, by: str) -> list[Row]:
    """Return the rows of views with one primitive each, and what that adds to a bare view."""
    config = _recipe(setup)
    photos, buffer = _decoded(setup)
    which, view_ids, sizes = _dealt(photos, setup.scale.views)
    drawing = _drawing(config, auto_augment=None, color_jitter=0.0, horizontal_flip=0.0, erasing=1.0)
    noisy = draw(drawing, SEED, view_ids, sizes)
    bare = replace(noisy, erasing=np.zeros_like(noisy.erasing))
    kinds = {BARE: bare, "flip": replace(bare, flip=~bare.flip), "noise": noisy}
    kinds |= {name: _with_operation(bare, *operation) for name, operation in OPERATIONS.items()}
    make = _executors(config, setup.device)[by]
    acts = {(name, by): partial(make, buffer, which, rows) for name, rows in kinds.items()}
    of_bare, *others = _timed(setup, acts, len(bare))
    for row in others:
        if "failed" not in of_bare | row:
            row[BEYOND] = rounded(row[TIME] - of_bare[TIME])
    return [of_bare, *others]


def _mixing(setup: Setup) -> list[Row]:
    config, device, views = _recipe(setup), setup.device, setup.scale.views
    _, view_ids, sizes = _dealt(_decoded(setup)[0], views)
    rows, executors = draw(_drawing(config), SEED, view_ids, sizes), _executors(config, device)
    images = torch.randn(views, 3, config.data.image_size, config.data.image_size, device=device)
    targets = torch.rand(views, CLASSES, device=device)
    return _timed(setup, {("mixing alone", PYTORCH): lambda: executors[PYTORCH].mix(images, targets, rows)}, views)


def _timed(setup: Setup, acts: Mapping[Made, Act], views: int) -> list[Row]:
    scale, named = setup.scale, {" by ".join(made): act for made, act in acts.items()}
    clock, failed = take_turns(setup.device, named, images=views, rounds=scale.rounds, seconds=scale.seconds)
    found = {name: microseconds(rates) for name, rates in clock.rates.items()}
    found |= {name: {"failed": why} for name, why in failed.items()}
    return [{"what": what, "made by": by, **found[f"{what} by {by}"]} for what, by in acts]


def _recipe(setup: Setup) -> Config:
    return setup.recipe(next(iter(setup.scale.students)), setup.scale.batches[0])


def _settings(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """Return keys of the sections ``data`` and ``augment``."""
    known = {**config.data.model_dump(), **config.augment.model_dump()}
    return {name: known[name] for name in names}


def _drawing(config: Config, **changes: Any) -> Drawing:
    """Return how the recipe's views are made; `changes` are fields of `Drawing`."""
    return Drawing(**_settings(config, (field.name for field in fields(Drawing))) | changes)


def _executors(config: Config, device: torch.device) -> dict[str, Executor]:
    """Return the executor as a loop uses it and, if Triton's kernels make its views, one that does without."""
    data = config.data
    first, second = (
        Executor(image_size=data.image_size, mean=data.mean, std=data.std, device=device) for _ in range(2)
    )
    second._primitives = reference
    return {"Triton": first, PYTORCH: second} if first.uses_kernels else {PYTORCH: second}


def _decoded(setup: Setup) -> tuple[Photos, PhotoBuffer]:
    """Return the photos, decoded in host memory and on the device."""
    photos = setup.photos.cached("memory", torch.device("cpu"))
    decoded = photos.decoded
    assert decoded is not None
    edges = torch.from_numpy(np.stack((decoded.offsets, decoded.heights, decoded.widths))).to(setup.device)
    return photos, PhotoBuffer(decoded.pixels.to(setup.device), edges[0], edges[1].int(), edges[2].int())


def _dealt(photos: Photos, views: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the photo [n], epoch and position [n, 2] and size [n, 2] of each view."""
    decoded = photos.decoded
    assert decoded is not None
    which = np.arange(views) % len(photos)
    view_ids = np.stack((np.zeros(views, np.int64), np.arange(views)), 1)
    return which, view_ids, np.stack((decoded.heights[which], decoded.widths[which]), 1)


def _with_operation(bare: Rows, operation: Operation, argument: float, bicubic: bool) -> Rows:
    one = (len(bare), 1)
    return replace(
        bare,
        operations=np.full(one, operation, np.int32),
        arguments=np.full(one, argument),
        operation_bicubic=np.full(one, bicubic),
    )


def _pillow(config: Config, photos: Photos, policy: str, views: int) -> Callable[[], None]:
    """Return what makes so many of Pillow's views, one after the other."""
    settings = _settings(config, signature(training_transform).parameters) | {"auto_augment": policy}
    transform = training_transform(**settings)

    def make() -> None:
        for position in range(views):
            seed_view(SEED, 0, position)
            transform(photos.image(position % len(photos)))

    return make
