"""Weights and activations as integers: what quantised layers compute, and layers that train for it (LSQ's setting)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from deit_kd.interfaces import InputError
from deit_kd.models.tokens import read_heads
from deit_kd.models.weights import classifier_names

BITS = (8, 4)  # of weights; activations always have 8
BITS_OF_HEADS = 8  # as is usual for last layers (LSQ, arXiv 1902.08153)
_TINY = torch.finfo(torch.float32).eps  # the least scale, as in torchao


def to_integers(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return `weight` [out, in] as int8 [out, in] and the scale [out, 1] of each row, whose product it is, rounded.

    Rows are symmetric: with 4 bits from -7 to 7, with 8 from -127 to 127.
    """
    scale = _scale_of(weight, bits)
    return (weight.float() * (1 / scale)).round().to(torch.int8), scale


def _scale_of(weight: Tensor, bits: int) -> Tensor:
    most = 2 ** (bits - 1) - 1
    return weight.detach().float().abs().amax(-1, keepdim=True).clamp_min(_TINY) / most


class _Rounded(torch.autograd.Function):
    """Multiples of a scale, whose gradient passes straight through (Bengio et al., arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor) -> Tensor:
        return (values * (1 / scale)).round().clamp(-128, 127) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class RoundedLinear(nn.Linear):
    """A linear layer that answers as its integers will, in floating point; its parameters are those of `linear`.

    Activations are rounded to 8 bits by their largest magnitude at each place, as torchao does it.

    Args:
        linear: the layer that it replaces.
        bits: of its weights.
    """

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.bits = bits
        self.train(linear.training)

    def forward(self, values: Tensor) -> Tensor:
        """Return [..., out] for `values` [..., in]."""
        values, weight = values.float(), self.weight.float()
        scale = (values.detach().abs().amax(-1, keepdim=True) / 127.5).clamp_min(_TINY)
        rounded = _Rounded.apply(weight, _scale_of(weight, self.bits))
        return nn.functional.linear(_Rounded.apply(values, scale), rounded, self.bias)

    def extra_repr(self) -> str:
        """Name the bits beside the sizes."""
        return f"{super().extra_repr()}, bits={self.bits}"


@torch.no_grad()
def round_linears(key: str, name: str, backbone: nn.Module, image_size: int, bits: int) -> None:
    """Let the linear layers of a timm model answer as integers of `bits` will; its heads have 8.

    Only layers that the model calls are replaced: one whose weight it multiplies by itself would still be exact.

    Args:
        key: the recipe's key, which errors begin with.
        name: timm's name of the model.
        backbone: changed in place; the names and tensors of its state dict stay.
        image_size: pixels.
        bits: one of `BITS`.

    Raises:
        InputError: the model has no linear layers but its heads.
    """
    heads = classifier_names(backbone)
    called = _called(backbone, image_size)
    within = {path: BITS_OF_HEADS if path.startswith(heads) else bits for path in called}
    if all(path.startswith(heads) for path in called):
        raise InputError(
            f"{key}: {name!r} has no linear layers but its heads, and convolutions stay in floating point; use a ViT"
        )
    for path, own in within.items():
        parent, _, last = path.rpartition(".")
        setattr(backbone.get_submodule(parent), last, RoundedLinear(called[path], own))


def _called(backbone: nn.Module, image_size: int) -> dict[str, nn.Linear]:
    linears = {path: module for path, module in backbone.named_modules() if type(module) is nn.Linear}
    seen: set[str] = set()
    hooks = [module.register_forward_hook(lambda *_, path=path: seen.add(path)) for path, module in linears.items()]
    was_training = backbone.training
    backbone.eval()
    try:
        read_heads(backbone, torch.zeros(1, 3, image_size, image_size))
    finally:
        backbone.train(was_training)
        for hook in hooks:
            hook.remove()
    return {path: module for path, module in linears.items() if path in seen}


def rounded_linears(backbone: nn.Module) -> dict[str, RoundedLinear]:
    """Return the layers by name that `round_linears` has replaced."""
    return {path: module for path, module in backbone.named_modules() if isinstance(module, RoundedLinear)}


def bits_of(backbone: nn.Module) -> int | None:
    """Return the `bits` that `round_linears` was called with; None if it was not."""
    return min((module.bits for module in rounded_linears(backbone).values()), default=None)


def kept_in_float(backbone: nn.Module) -> dict[str, int]:
    """Return what stays in floating point, how many numbers by name: one name for all biases, ``*`` for all blocks.

    A batch norm's running mean and variance count with it.
    """
    integers = {f"{path}.weight" for path in rounded_linears(backbone)}
    found: dict[str, int] = {}
    for name, tensor in backbone.state_dict().items():
        if name in integers or not tensor.is_floating_point():
            continue
        module = re.sub(r"\.(weight|running_mean|running_var)$", "", name)
        group = "biases" if name.endswith(".bias") else re.sub(r"\.\d+(?=\.)", ".*", module)
        found[group] = found.get(group, 0) + tensor.numel()
    return found
