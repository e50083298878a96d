"""The files beside the weights in a timm or transformers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, with_config
from typing_extensions import NotRequired, TypedDict

from deit_kd.files import read_json
from deit_kd.interfaces import InputError, Statistics
from deit_kd.models.create import Pixels

Numbered = dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], str]  # names by the column of a head
ACTIVATIONS = {"gelu": None, "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"} | {
    name: name for name in ("quick_gelu", "relu", "silu")
}  # transformers' names for timm's activations; None is a ViT's default


class KnownPreprocessing(NamedTuple):
    """What is known about a network's preprocessing; None for what is not known."""

    image_size: int | None = None  # pixels
    mean: Statistics | None = None
    std: Statistics | None = None
    interpolation: str | None = None
    crop_fraction: float | None = None
    crop_mode: str | None = None


@with_config(ConfigDict(extra="allow"))
class PretrainedCfg(TypedDict, total=False):
    """The preprocessing of a model, as in timm's ``pretrained_cfg`` and ``config.json``."""

    input_size: tuple[int, Pixels, Pixels]
    mean: Statistics
    std: Statistics
    interpolation: str
    crop_pct: Annotated[float, Field(gt=0)]
    crop_mode: str
    num_classes: Annotated[int, Field(ge=0)]
    label_names: list[str] | Numbered | None


class LocalDir(PretrainedCfg, total=False):
    """What we read of the ``config.json`` beside weights: timm's, or transformers'."""

    architecture: str
    heads: list[str]  # that answer: cls, and dist if there are two
    bits: Literal[8, 4]  # of the integers that its answers are rounded to
    model_args: dict[str, Any]
    model_type: str | None
    id2label: Numbered
    pretrained_cfg: PretrainedCfg


@with_config(ConfigDict(extra="allow"))
class TransformersConfig(TypedDict):
    """What we read of the ``config.json`` of transformers' DeiT or ViT."""

    patch_size: Pixels
    image_size: Pixels
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    intermediate_size: PositiveInt
    qkv_bias: NotRequired[bool]
    hidden_act: NotRequired[str]
    layer_norm_eps: NotRequired[PositiveFloat]


class Edges(TypedDict, total=False):
    """A size as transformers writes it: one of these keys."""

    shortest_edge: Pixels
    height: Pixels


@with_config(ConfigDict(extra="allow"))
class Preprocessor(TypedDict):
    """What we read of a ``preprocessor_config.json``."""

    image_mean: Statistics
    image_std: Statistics
    do_center_crop: NotRequired[bool]
    resample: NotRequired[int]
    crop_size: NotRequired[Pixels | Edges]
    size: NotRequired[Pixels | Edges]


def named_columns(saved: LocalDir) -> tuple[tuple[str, ...] | None, tuple[tuple[int, ...], ...] | None]:
    """Return the names of a head's columns and, if not every column has one, which of them do."""
    names: list[str] | Numbered | None = saved.get("label_names") or saved.get("pretrained_cfg", {}).get("label_names")
    names = saved.get("id2label") or names
    if not names:
        return None, None
    by_column = {int(column): name for column, name in (names.items() if isinstance(names, dict) else enumerate(names))}
    columns = sorted(by_column)
    if "id2label" in saved and all(by_column[column] == f"LABEL_{column}" for column in columns):
        return None, None  # transformers' default for unnamed classes
    is_whole = columns == list(range(len(columns)))
    return tuple(by_column[column] for column in columns), None if is_whole else tuple((c,) for c in columns)


def read_preprocessor(file: Path, image_size: int) -> KnownPreprocessing:
    if not file.is_file():
        return KnownPreprocessing(image_size)
    seen = read_json(file, Preprocessor)
    size = seen.get("size")
    return KnownPreprocessing(
        image_size=image_size,
        mean=seen["image_mean"],
        std=seen["image_std"],
        interpolation="bilinear" if seen.get("resample") == 2 else "bicubic",  # Pillow's number
        # A ViT's processor does not crop.
        crop_fraction=_edge(file, seen, "crop_size") / _edge(file, seen, "size") if seen.get("do_center_crop") else 1.0,
        crop_mode="squash" if isinstance(size, dict) and "height" in size else "center",
    )


def _edge(file: Path, seen: Preprocessor, key: Literal["crop_size", "size"]) -> int:
    size: int | Edges = seen.get(key, Edges())
    edge = size if isinstance(size, int) else size.get("shortest_edge", size.get("height"))
    if edge is None:
        raise InputError(f"{file}: {key} has neither shortest_edge nor height; save its processor again")
    return edge


def preprocessing_of(cfg: Mapping[str, Any]) -> KnownPreprocessing:
    """Return the preprocessing of a timm ``pretrained_cfg``."""
    size = cfg.get("input_size")
    return KnownPreprocessing(
        image_size=None if size is None else size[-1],
        mean=cfg.get("mean"),
        std=cfg.get("std"),
        interpolation=_not_random(cfg.get("interpolation")),
        crop_fraction=cfg.get("crop_pct"),
        crop_mode=cfg.get("crop_mode"),
    )


def _not_random(interpolation: str | None) -> str | None:
    """Return the interpolation for evaluation, if training chooses it at random."""
    return "bicubic" if interpolation == "random" else interpolation
