"""The parameters of views as rows of numbers, pure functions of (seed, epoch, position), apart from all pixels."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import RandomHorizontalFlip

from deit_kd.views import counter
from deit_kd.views.pixels import QuickJitter
from deit_kd.views.policy import Operation, Policy, on_grid, read_policy
from deit_kd.views.transforms import training_transform

_TRIES = 10  # of timm, for a box that fits


@dataclass(frozen=True)
class Drawing:
    """How views are made; the fields are those of the recipe's sections ``data`` and ``augment``.

    Raises:
        InputError: the policy is unknown, or one that only Pillow's views have.
    """

    image_size: int
    interpolation: str
    auto_augment: str | None
    color_jitter: float
    horizontal_flip: float
    scale: tuple[float, float]
    ratio: tuple[float, float]
    erasing: float
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    mix_switch_probability: float = 0.5

    def __post_init__(self) -> None:
        _stages(self)

    @property
    def mixes(self) -> bool:
        """Whether any pair is ever mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_probability > 0


@dataclass(frozen=True, eq=False)
class Rows:
    """The parameters of n views, in host memory; boxes are top, left, height, width in pixels."""

    view_ids: np.ndarray  # [n, 2] int64: epoch and position
    crop: np.ndarray  # [n, 4] int32, of the photo
    resize_bicubic: np.ndarray  # [n] bool: bicubic or bilinear
    flip: np.ndarray  # [n] bool
    operations: np.ndarray  # [n, slots] int32, of Operation, in their order; colour jitter comes last
    arguments: np.ndarray  # [n, slots] float64, Pillow's
    operation_bicubic: np.ndarray  # [n, slots] bool: of an affine operation
    erasing: np.ndarray  # [n, 4] int32, of the view; height 0 erases nothing
    noise_key: np.ndarray  # [n, 2] int64, of 32 bits each
    share: np.ndarray  # [n] float64: what a view keeps of itself, in its pixels (mixup) and in its target
    mixing_box: np.ndarray  # [n, 4] int32, of the view; height 0 is mixup, or nothing if share is 1

    def __len__(self) -> int:
        return len(self.view_ids)

    def at(self, index: Any) -> Rows:
        """Return the rows at `index`: a slice, an index [m] or a mask [n]."""
        return Rows(*(getattr(self, field.name)[index] for field in fields(self)))

    def partners(self) -> np.ndarray:
        """Return the row [n] that each is mixed with, positions 2m and 2m + 1; its own if its partner is not here."""
        epoch, position = self.view_ids.T
        order = np.lexsort((position, epoch))
        partners = np.arange(len(self))
        pairs = (epoch[order][1:] == epoch[order][:-1]) & (position[order][1:] == position[order][:-1] ^ 1)
        first, second = order[:-1][pairs], order[1:][pairs]
        partners[first], partners[second] = second, first
        return partners


def draw(drawing: Drawing, seed: int, view_ids: np.ndarray, sizes: np.ndarray) -> Rows:
    """Return the rows of the views `view_ids` [n, 2] (epoch, position) of photos of `sizes` [n, 2] (height, width).

    The distributions are those of timm's transform for the same settings, and of `Mixing`.
    """
    view_ids, sizes = np.asarray(view_ids, np.int64), np.asarray(sizes, np.int64)
    stages = _stages(drawing)
    starts = counter.streams("device view", seed, view_ids)
    slots = stages.policy.slots
    words = counter.words(starts, 0, 9 + 6 * slots)
    policy_words = words[:, 9:].reshape(len(words), slots, 6)
    operations, arguments = stages.policy.draw(policy_words)
    jitters, factors = stages.jitter(words[:, 2:6])
    filters = _bicubic(drawing.interpolation, policy_words[..., 5])
    share, mixing_box = _mixing(drawing, seed, view_ids)
    return Rows(
        view_ids=view_ids,
        crop=_crops(stages, starts, sizes),
        resize_bicubic=_bicubic(drawing.interpolation, words[:, 0]),
        flip=counter.fractions(words[:, 1]) < stages.flip,
        operations=np.concatenate((operations, jitters), 1).astype(np.int32),
        arguments=np.concatenate((arguments, factors), 1),
        operation_bicubic=np.concatenate((filters, np.zeros(jitters.shape, bool)), 1),
        erasing=_erasing(stages, starts, words[:, 6], drawing.image_size),
        noise_key=(words[:, 7:9] >> np.uint64(32)).astype(np.int64),
        share=share,
        mixing_box=mixing_box,
    )


@dataclass(frozen=True, eq=False)
class _Stages:
    """timm's transform of one drawing, as far as a view's parameters depend on it."""

    scale: tuple[float, float]
    ratios: np.ndarray  # quantiles
    ratio: tuple[float, float]
    flip: float
    policy: Policy
    jitters: tuple[tuple[Operation, tuple[float, float]], ...]
    orders: np.ndarray  # [k!, k], of the jitters
    erasing: float
    erased: tuple[float, float]  # share of the view
    aspects: np.ndarray  # quantiles

    def jitter(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return operations and factors [n, k] for words [n, 1 + k]."""
        order = self.orders[counter.below(words[:, 0], len(self.orders))]
        codes = np.array([operation for operation, _ in self.jitters], np.int32)
        low, high = np.array([limits for _, limits in self.jitters]).reshape(-1, 2).T
        factors = on_grid(low + (high - low) * counter.fractions(words[:, 1 : 1 + len(codes)]))
        return codes[order], np.take_along_axis(factors, order, 1)


@lru_cache(maxsize=8)
def _stages(drawing: Drawing) -> _Stages:
    transform: Any = training_transform(
        image_size=drawing.image_size,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation=drawing.interpolation,
        auto_augment=drawing.auto_augment,
        color_jitter=drawing.color_jitter,
        horizontal_flip=drawing.horizontal_flip,
        scale=drawing.scale,
        ratio=drawing.ratio,
        erasing=drawing.erasing,
    )
    by_type = {type(stage): stage for stage in transform.transforms}
    crop, flip = by_type[RandomResizedCropAndInterpolation], by_type.get(RandomHorizontalFlip)
    erasing = by_type.get(RandomErasing)
    chains = [stage for stage in transform.transforms if isinstance(stage, RandAugment | AutoAugment | AugMixAugment)]
    jitters = _jitters(by_type.get(QuickJitter))
    return _Stages(
        scale=tuple(crop.scale),
        ratio=tuple(crop.ratio),
        ratios=counter.log_uniform_quantiles(*crop.ratio),
        flip=flip.p if flip else 0.0,
        policy=read_policy(chains[0] if chains else None, drawing.image_size, drawing.auto_augment),
        jitters=jitters,
        orders=np.array(list(permutations(range(len(jitters)))), np.int64),
        erasing=erasing.probability if erasing else 0.0,
        erased=(erasing.min_area, erasing.max_area) if erasing else (0.0, 0.0),
        aspects=counter.log_uniform_quantiles(*np.exp(erasing.log_aspect_ratio)) if erasing else np.ones(1),
    )


def _jitters(stage: QuickJitter | None) -> tuple[tuple[Operation, tuple[float, float]], ...]:
    if stage is None:
        return ()
    limits = (
        (Operation.BRIGHTNESS, stage.jitter.brightness),
        (Operation.CONTRAST, stage.jitter.contrast),
        (Operation.COLOR, stage.jitter.saturation),
    )
    return tuple((operation, limit) for operation, limit in limits if limit is not None)


def _bicubic(interpolation: str, words: np.ndarray) -> np.ndarray:
    if interpolation == "random":
        return counter.below(words, 2).astype(bool)
    return np.full(words.shape, interpolation == "bicubic")


def _crops(stages: _Stages, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the crop [n, 4] of photos of `sizes`: the first of ten random boxes that fits, or the middle."""
    height, width = sizes.T
    low, high = min(stages.ratio), max(stages.ratio)
    shape = width / height
    middle = np.stack(
        (
            np.where(shape > high, height, np.where(shape < low, np.rint(width / low), height)),
            np.where(shape > high, np.rint(height * high), width),
        ),
        1,
    ).astype(np.int64)
    boxes = np.concatenate(((sizes - middle) // 2, middle), 1)
    _place(boxes, np.arange(len(sizes)), starts, _CROP_WORDS, sizes, sizes, stages.scale, stages.ratios)
    return boxes.astype(np.int32)


def _erasing(stages: _Stages, starts: np.ndarray, words: np.ndarray, image_size: int) -> np.ndarray:
    """Return the box [n, 4] of the view that is erased."""
    sizes = np.full((len(starts), 2), image_size)
    boxes = np.zeros((len(starts), 4), np.int64)
    erased = np.flatnonzero(counter.fractions(words) < stages.erasing)
    _place(boxes, erased, starts, _ERASING_WORDS, sizes, sizes - 1, stages.erased, stages.aspects)
    return boxes.astype(np.int32)


_CROP_WORDS, _ERASING_WORDS = 1 << 20, 1 << 21  # where the words of the tries begin in a view's stream


def _place(
    boxes: np.ndarray,
    rows: np.ndarray,
    starts: np.ndarray,
    first_word: int,
    sizes: np.ndarray,
    limits: np.ndarray,
    shares: tuple[float, float],
    ratios: np.ndarray,
) -> None:
    """Set `boxes` [n, 4] of `rows` to the first of ten random boxes that is within `limits` [n, 2]."""
    for attempt in range(_TRIES):
        words = counter.words(starts[rows], first_word + 4 * attempt, 4)
        area = (shares[0] + (shares[1] - shares[0]) * counter.fractions(words[:, 0])) * sizes[rows].prod(1)
        ratio = ratios[counter.below(words[:, 1], len(ratios))]
        box = np.rint(np.sqrt(np.stack((area / ratio, area * ratio), 1))).astype(np.int64).clip(1)
        fits = (box <= limits[rows]).all(1)
        placed, box = rows[fits], box[fits]
        boxes[placed, :2] = counter.below(words[fits, 2:], sizes[placed] - box + 1)
        boxes[placed, 2:] = box
        rows = rows[~fits]
        if not len(rows):
            return


def _mixing(drawing: Drawing, seed: int, view_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return share [n] and box [n, 4] of each view; both partners of a pair have the same."""
    share, boxes = np.ones(len(view_ids)), np.zeros((len(view_ids), 4), np.int64)
    if not drawing.mixes:
        return share, boxes.astype(np.int32)
    words = counter.words(counter.streams("device mixing", seed, view_ids >> [0, 1]), 0, 5)
    mixed = counter.fractions(words[:, 0]) < drawing.mix_probability
    cut = counter.fractions(words[:, 1]) < (drawing.mix_switch_probability if drawing.mixup > 0 else 1.0)
    cut &= mixed & (drawing.cutmix > 0)
    quantile = counter.below(words[:, 2], counter.QUANTILES)
    if drawing.mixup > 0:
        share = np.where(mixed & ~cut, counter.beta_quantiles(drawing.mixup)[quantile], share)
    if drawing.cutmix > 0:
        size = drawing.image_size
        side = (size * np.sqrt(1 - counter.beta_quantiles(drawing.cutmix)[quantile])).astype(np.int64)
        centre = counter.below(words[:, 3:], size)
        start = (centre - side[:, None] // 2).clip(0)
        end = (centre + side[:, None] // 2).clip(max=size)
        boxes = np.where(cut[:, None], np.concatenate((start, end - start), 1), boxes)
        share = np.where(cut, 1 - boxes[:, 2:].prod(1) / size**2, share)
    return share, boxes.astype(np.int32)
