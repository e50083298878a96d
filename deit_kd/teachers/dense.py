"""Dense logits: a CNN's head at every place of its last map (CSKD, Zhao et al., ICCV 2023, 2307.08500)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from deit_kd.interfaces import InputError
from deit_kd.models.tokens import answers_apart

NORMS = (nn.LayerNorm, nn.GroupNorm)  # timm's own of these are subclasses
PASSING = (nn.Identity, nn.Flatten, nn.Dropout)
BIG = 10.0  # features so large that no activation is nearly linear


def dense_logits(network: nn.Module, last: Tensor) -> Tensor:
    """Return the logits [B, h, w, M] of a network's head at each place of its last features [B, D, h, w].

    Each place is pooled alone, so a norm between pool and classifier acts on it as on a whole image. Without one, the
    mean over places is the network's answer.
    """
    model: Any = network
    batch, width, *grid = last.shape
    places = last.permute(0, 2, 3, 1).reshape(-1, width, 1, 1)
    logits: Tensor = model.forward_head(places)
    return logits.view(batch, *grid, -1)


@torch.no_grad()
def dense_grid(name: str, network: nn.Module, image_size: int) -> tuple[int, int]:
    """Return the grid h x w of a network's dense logits.

    Args:
        name: of the network, for errors.
        network: of timm, in eval mode and fp32.
        image_size: pixels.

    Raises:
        InputError: it is no CNN whose head is mean pooling, perhaps a norm, and one linear layer.
    """
    model: Any = network
    reason = None
    last = model.forward_features(torch.zeros(2, 3, image_size, image_size))
    if answers_apart(network):
        reason = "answers with two heads"
    elif last.ndim != 4:
        reason = f"is a {type(network).__name__}, whose last features are tokens and no map"
    elif last.shape[2:].numel() < 2:
        reason = f"has a last map of one place at {image_size} px; a larger teacher.image_size gives more"
    else:
        reason = _reason(model, BIG * torch.randn(last.shape, generator=torch.Generator().manual_seed(0)))
    if reason is not None:
        raise InputError(
            f"distill.terms: dense logits need a CNN whose head is mean pooling and one linear layer, and {name} "
            f"{reason}; name another teacher, or leave out the dense term"
        )
    return last.shape[2], last.shape[3]


def _reason(model: Any, last: Tensor) -> str | None:
    """Return why a head does not answer place by place, for random features; None if it does."""
    other = "has another head: its answer is not that to the mean of its places"
    try:
        whole, pooled, dense = (
            model.forward_head(last),
            model.forward_head(last.mean((2, 3), True)),
            dense_logits(model, last),
        )
    except RuntimeError:  # a last map in another layout (swin), or a head that needs the whole map
        return other
    if not _are_same(whole, pooled):
        return other
    if _are_same(whole, dense.mean((1, 2))) or _is_norm_and_linear(getattr(model, "head", None)):
        return None
    return "has more than a norm and a linear layer after the pooling"


def _are_same(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max()))


def _is_norm_and_linear(head: nn.Module | None) -> bool:
    parts = [] if head is None else list(_parts(head))
    others = [part for part in parts if not isinstance(part, (*NORMS, *PASSING, SelectAdaptivePool2d))]
    return len(others) == 1 and isinstance(others[0], nn.Linear)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a head; a pooling is one."""
    children = [] if isinstance(module, SelectAdaptivePool2d) else list(module.children())
    if not children:
        yield module
    for child in children:
        yield from _parts(child)
