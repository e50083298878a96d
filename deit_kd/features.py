"""Named features of a timm model, from the same forward pass as its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deit_kd.interfaces import POOLED, InputError, nearest

Features = dict[str, Tensor]


def layer_names(model: nn.Module) -> list[str]:
    """Return the layers whose maps a timm model can return, in order: ``blocks.0``, ``layer1``, ``stages.2``, …"""
    if not hasattr(model, "forward_intermediates"):
        return []
    info: Any = getattr(model, "feature_info", None) or []
    names = [stage["module"] for stage in getattr(info, "info", info)]
    return names if len(set(names)) == len(names) else []  # coat uses one name for three of its layers


def check_layers(key: str, model: nn.Module, names: Sequence[str]) -> None:
    """Raise an InputError unless `model` has all the layers of `names`; every model has ``pooled``."""
    known = layer_names(model)
    for name in names:
        if name != POOLED and name not in known:
            kind, cure = type(model).__name__, f"choose from {', '.join(known)}" if known else "use a pooled term"
            raise InputError(f"{key}: {kind} has no layer {name!r}{nearest(name, known)}; {cure}")


def answer_with_features(
    model: nn.Module,
    images: Tensor,
    names: Sequence[str],
    *,
    head: Callable[[Tensor], Any],
    pool: Callable[[Tensor], Tensor],
) -> tuple[Any, Features]:
    """Return the output of `head` for a model's last features, and the features called `names`.

    Args:
        model: of timm.
        images: [B, 3, H, W].
        names: of layers, and ``pooled``.
        head: from the model's last features to its answer.
        pool: from the model's last features to one vector per image.

    Returns:
        The answer, and by name each layer's map [B, D, h, w], prefix tokens dropped, and ``pooled`` [B, D].
    """
    layers = [name for name in names if name != POOLED]
    features: Features = {}
    network: Any = model
    if layers:
        known = layer_names(model)
        places = sorted(known.index(name) for name in layers)
        last, maps = network.forward_intermediates(images, indices=places, output_fmt="NCHW")
        if len(maps) != len(places):  # crossvit has two branches
            raise InputError(
                f"distill.terms: {type(model).__name__} does not return its layers one by one; name another model"
            )
        features = {known[place]: found for place, found in zip(places, maps, strict=True)}
    else:
        last = network.forward_features(images)
    if POOLED in names:
        features[POOLED] = pool(last)
    return head(last), features


def mean_patch(last: Tensor, prefix_tokens: int) -> Tensor:
    """Return the mean [B, D] of a model's last features over patches or places.

    Args:
        last: tokens [B, N, D], or a map [B, D, h, w].
        prefix_tokens: that stand before the patches.
    """
    return last[:, prefix_tokens:].mean(1) if last.ndim == 3 else last.flatten(2).mean(-1)


def shapes(features: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of each feature of one image: [D, h, w] of a map, [D] of a vector."""
    return {name: feature.shape[1:] for name, feature in features.items()}
