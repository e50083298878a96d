"""Whether two networks that hold the same tensors compute the same with them: heads, activations, epsilons, strides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from deit_kd.interfaces import InputError
from deit_kd.models.create import create_model
from deit_kd.models.names import is_kin
from deit_kd.origins import Origin

# An epsilon is added to a variance of about 1: smaller values have no visible effect.
LARGEST_HARMLESS_EPSILON = 1e-5
REGULARISERS = ("Identity", "Drop")  # prefixes of modules that pass their input through in eval mode
# Attributes to which weights are adapted (image size, patch size, class count or token), or that change nothing.
FITTED = re.compile(
    r"(?<!kernel_)size|num_patches|prefix_tokens|num_classes|features|resolution|shape|seq_len|patch_embed\.proj\..*"
    r"|training|drop|prob|fused|inplace|checkpoint|distilled|flatten|strict|dynamic"
)


def refuse_other_twin(
    key: str, model: nn.Module, origin: Origin, architecture: str, args: Mapping[str, Any], image_size: int
) -> None:
    """Refuse weights of a network that has the same tensors but answers differently.

    Args:
        key: the recipe's key, which errors begin with.
        model: the network that takes the weights.
        origin: of the weights; if their network is not known, nothing can be refused.
        architecture: timm's name of `model`.
        args: of `model`.
        image_size: pixels of its input.

    Raises:
        InputError: the networks differ, with the first differences.
    """
    if origin.architecture is None:
        return
    is_known = is_kin(origin.architecture, architecture) and dict(origin.model_args) == dict(args)
    if is_known and origin.layer_norm_eps is None:
        return
    theirs = traits(_blank(key, origin.architecture, image_size, origin.model_args))
    if origin.layer_norm_eps is not None:
        theirs = {name: origin.layer_norm_eps if name.endswith(".eps") else value for name, value in theirs.items()}
    ours = traits(model)
    found = [
        f"{name} is {theirs[name]!r} there and {ours[name]!r} here"
        for name in ours.keys() & theirs.keys()
        if not _alike(name, ours[name], theirs[name])
    ]
    if found:
        shown = "; ".join(sorted(found)[:3])
        raise InputError(
            f"{key}: {origin.name} fits the model but would answer differently ({len(found)} differences: {shown}); "
            "give the model the args that it was trained with"
        )


def traits(model: nn.Module) -> dict[str, Any]:
    """Return what a network computes besides its tensors: the types of its modules and their plain attributes."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if not path or kind.startswith(REGULARISERS):
            continue
        if not any(True for _ in module.parameters()):
            found[path] = kind
        for name, value in vars(module).items():
            is_fitted = FITTED.search(name) or FITTED.fullmatch(f"{path}.{name}")
            if not name.startswith("_") and not is_fitted and _is_plain(value):
                found[f"{path}.{name}"] = value
    return found


def set_layer_norm_eps(model: nn.Module, eps: float) -> None:
    """Set the epsilon of a model's LayerNorms."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def _blank(key: str, architecture: str, image_size: int, model_args: Mapping[str, Any]) -> nn.Module:
    """Build a network whose tensors have no values."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            return create_model(key, architecture, image_size=image_size, **model_args)
        except InputError:  # its patches do not divide the size that the weights are adapted to
            return create_model(key, architecture, **model_args)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def _alike(name: str, here: Any, there: Any) -> bool:
    if name.endswith(".eps"):
        return here == there or max(here, there) <= LARGEST_HARMLESS_EPSILON
    return bool(here == there)
