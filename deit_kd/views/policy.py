"""What can happen to a view, read off the transform that makes Pillow's views, so that timm alone defines it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment

from deit_kd.interfaces import InputError
from deit_kd.views.counter import below, fractions, normal_quantiles

MAGNITUDES = 1 << 9  # a magnitude with a spread is drawn as one of this many equally likely values
FACTOR_BITS = 14  # the factor of a blend is a multiple of 2**-14, so that a blend is exact in integers and in fp32


class Operation(IntEnum):
    """What one slot of a row does; the argument is Pillow's."""

    NOTHING = 0
    SHEAR_X = 1  # factor
    SHEAR_Y = 2
    TRANSLATE_X = 3  # pixels
    TRANSLATE_Y = 4
    ROTATE = 5  # degrees
    AUTO_CONTRAST = 6
    EQUALIZE = 7
    INVERT = 8
    POSTERIZE = 9  # bits that are kept
    SOLARIZE = 10  # threshold
    SOLARIZE_ADD = 11  # what is added below 128
    BRIGHTNESS = 12  # factor, as in the next three
    CONTRAST = 13
    COLOR = 14
    SHARPNESS = 15
    BLUR = 16  # radius


BLENDS = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR, Operation.SHARPNESS)
_OPERATIONS = {
    "AutoContrast": Operation.AUTO_CONTRAST,
    "Equalize": Operation.EQUALIZE,
    "Invert": Operation.INVERT,
    "Rotate": Operation.ROTATE,
    "Posterize": Operation.POSTERIZE,
    "PosterizeIncreasing": Operation.POSTERIZE,
    "PosterizeOriginal": Operation.POSTERIZE,
    "Solarize": Operation.SOLARIZE,
    "SolarizeIncreasing": Operation.SOLARIZE,
    "SolarizeAdd": Operation.SOLARIZE_ADD,
    "Color": Operation.COLOR,
    "ColorIncreasing": Operation.COLOR,
    "Contrast": Operation.CONTRAST,
    "ContrastIncreasing": Operation.CONTRAST,
    "Brightness": Operation.BRIGHTNESS,
    "BrightnessIncreasing": Operation.BRIGHTNESS,
    "Sharpness": Operation.SHARPNESS,
    "SharpnessIncreasing": Operation.SHARPNESS,
    "ShearX": Operation.SHEAR_X,
    "ShearY": Operation.SHEAR_Y,
    "TranslateX": Operation.TRANSLATE_X,
    "TranslateY": Operation.TRANSLATE_Y,
    "TranslateXRel": Operation.TRANSLATE_X,
    "TranslateYRel": Operation.TRANSLATE_Y,
    "Desaturate": Operation.COLOR,
    "GaussianBlur": Operation.BLUR,
    "GaussianBlurRand": Operation.BLUR,
}


@dataclass(frozen=True, eq=False)
class Policy:
    """A timm policy of S slots over M operations as tables; Q is the number of quantiles of a magnitude."""

    codes: np.ndarray  # [M], of Operation; the last is NOTHING, which only sequences hold
    probabilities: np.ndarray  # [M], that a chosen operation is applied
    arguments: np.ndarray  # [M, Q, 2], by magnitude and sign
    random_radius: np.ndarray  # [M], whether the radius is drawn up to the argument
    sequences: np.ndarray | None  # [P, S], the operations of each sub-policy of an AutoAugment
    weights: np.ndarray | None  # [M - 1], of a choice without replacement
    slots: int

    def draw(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return operations and arguments [n, S] for words [n, S, 5]."""
        chosen = self._choose(words[..., 0])
        applied = fractions(words[..., 1]) < self.probabilities[chosen]
        quantile = below(words[..., 2], MAGNITUDES)
        arguments = self.arguments[chosen, quantile, below(words[..., 3], 2)]
        radius = 0.1 + (2 * arguments - 0.1) * fractions(words[..., 4])
        arguments = np.where(self.random_radius[chosen], radius, arguments)
        return np.where(applied, self.codes[chosen], Operation.NOTHING), np.where(applied, arguments, 0.0)

    def _choose(self, words: np.ndarray) -> np.ndarray:
        if self.sequences is not None:
            return self.sequences[below(words[:, 0], len(self.sequences))]
        if self.weights is None:
            return below(words, len(self.codes) - 1)
        left = np.tile(self.weights, (len(words), 1))  # [n, M - 1]
        chosen = np.zeros(words.shape, np.int64)
        for slot in range(self.slots):
            rising = left.cumsum(1)
            passed = rising <= (fractions(words[:, slot]) * rising[:, -1])[:, None]
            chosen[:, slot] = passed.sum(1)
            np.put_along_axis(left, chosen[:, slot, None], 0.0, 1)
        return chosen


def read_policy(stage: object, image_size: int, name: str | None) -> Policy:
    """Return the policy of one stage of timm's transform, or one without slots for None.

    Raises:
        InputError: it mixes several chains (AugMix).
    """
    if isinstance(stage, RandAugment):
        weights = stage.choice_weights
        operations, sequences, slots = list(stage.ops), None, stage.num_layers
        if weights is not None and slots > len(operations):
            raise InputError(f"augment.auto_augment: {name!r} chooses {slots} of {len(operations)} operations; lower n")
    elif isinstance(stage, AutoAugment):
        weights = None
        operations = [operation for sequence in stage.policy for operation in sequence]
        slots = max(map(len, stage.policy))
        sequences = _places(stage.policy, slots, nothing=len(operations))
    elif isinstance(stage, AugMixAugment):
        raise InputError(
            f"augment.auto_augment: {name!r} mixes several chains, which the device executor does not; "
            "use data.executor: pillow, or a RandAugment policy"
        )
    else:
        operations, sequences, weights, slots = [], None, None, 0
    return Policy(
        codes=np.array([_OPERATIONS[operation.name] for operation in operations] + [Operation.NOTHING]),
        probabilities=np.array([operation.prob for operation in operations] + [0.0]),
        arguments=np.stack(
            [_arguments(operation, image_size) for operation in operations] + [np.zeros((MAGNITUDES, 2))]
        ),
        random_radius=np.array([operation.name == "GaussianBlurRand" for operation in operations] + [False]),
        sequences=sequences,
        weights=None if weights is None else np.asarray(weights, np.float64),
        slots=slots,
    )


def on_grid(factors: np.ndarray) -> np.ndarray:
    """Return `factors` of blends rounded to multiples of 2**-FACTOR_BITS."""
    return np.rint(np.ldexp(factors, FACTOR_BITS)) * 2.0**-FACTOR_BITS


def _places(sequences: list[list[AugmentOp]], slots: int, nothing: int) -> np.ndarray:
    places = np.full((len(sequences), slots), nothing)
    first = 0
    for row, sequence in enumerate(sequences):
        places[row, : len(sequence)] = np.arange(first, first + len(sequence))
        first += len(sequence)
    return places


def _arguments(operation: AugmentOp, image_size: int) -> np.ndarray:
    """Return the argument [Q, 2] of each magnitude that timm may draw, without and with its negative sign."""
    highest = operation.magnitude_max or 10.0
    if operation.magnitude_std == float("inf"):
        magnitudes = operation.magnitude * (np.arange(MAGNITUDES) + 0.5) / MAGNITUDES
    elif operation.magnitude_std > 0:
        magnitudes = operation.magnitude + operation.magnitude_std * normal_quantiles(MAGNITUDES)
    else:
        magnitudes = np.full(1, float(operation.magnitude))
    arguments = np.array([_argument(operation, value) for value in magnitudes.clip(0, highest).tolist()])
    if operation.name in ("TranslateXRel", "TranslateYRel"):
        arguments = arguments * image_size
    elif operation.name == "Desaturate":
        arguments = (1 - arguments).clip(0, 1)
    if _OPERATIONS[operation.name] in BLENDS:
        arguments = on_grid(arguments)
    return np.broadcast_to(arguments, (MAGNITUDES, 2))


def _argument(operation: AugmentOp, magnitude: float) -> tuple[float, float]:
    if operation.level_fn is None:
        return 0.0, 0.0
    state = random.getstate()
    try:
        arguments = []
        for seed in _SIGN_SEEDS:
            random.seed(seed)
            arguments.append(float(operation.level_fn(magnitude, operation.hparams)[0]))
    finally:
        random.setstate(state)
    return arguments[0], arguments[1]


# timm draws a sign by ``random.random() > 0.5`` within its level functions: 0.13 for the first of these, then 0.84.
_SIGN_SEEDS = (1, 0)
