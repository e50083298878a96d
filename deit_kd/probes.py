"""Looks into a network during its forward pass: the outputs of its layers, and where its tokens attend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isqrt
from typing import Any, NamedTuple

import torch
from einops import rearrange
from timm.models.vision_transformer import Block
from timm.utils import AttentionExtract
from torch import Tensor, nn

from deit_kd.interfaces import InputError


class TokenAttention(NamedTuple):
    """Where the leading tokens (class, then distillation) attend to among the patches of a square image."""

    last_block: Tensor  # [B, heads, tokens, h, w]
    rollout: Tensor | None  # [B, tokens, h, w]; None if the blocks do not share their patches (pit)


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the last output of each module that returns one tensor, in fp32 on the CPU, within the context."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            if isinstance(output, Tensor):  # several branches (hrnet, tnt) are not one layer
                outputs[name] = output.detach().float().cpu()

        return modules[name].register_forward_hook(hook)

    handles = [keep(name) for name in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]


def blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Return the transformer blocks of a timm model (vit, deit, pit), in order; empty for a CNN."""
    found = [module for module in network.modules() if isinstance(module, Block)]
    return {f"block {number}": block for number, block in enumerate(found, start=1)}


def stages(network: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a teacher to compare: its blocks, or a CNN's stages as named by timm."""
    named = dict(network.named_modules())
    names = [stage["module"] for stage in getattr(network, "feature_info", None) or []]
    return blocks(network) or {name: named[name] for name in names if name in named}


def leading_tokens(network: nn.Module, otherwise: int) -> int:
    """Return how many tokens stand before the patches; `otherwise` if the network does not say (pit, a CNN)."""
    said = (module.num_prefix_tokens for module in network.modules() if hasattr(module, "num_prefix_tokens"))
    return int(next(said, otherwise))  # type: ignore[arg-type]


def channels_of_stages(network: nn.Module) -> dict[str, int]:
    """Return the number of channels of each stage of a network, according to timm."""
    return {stage["module"]: stage["num_chs"] for stage in getattr(network, "feature_info", None) or []}


def pooled(output: Tensor, leading_tokens: int, channels: int | None = None) -> Tensor:
    """Return one vector per image [B, D]: the mean of the patches of [B, N, D], or of the places of a map.

    Args:
        output: of a block [B, N, D] or a stage [B, D, h, w]; [B, h, w, D] (swin) if D is `channels`.
        leading_tokens: that stand before the patches.
        channels: D, if it is known.
    """
    if output.ndim == 3:
        return output[:, leading_tokens:].mean(1)
    is_channels_last = output.shape[1] != channels == output.shape[-1]
    return output.flatten(1, 2).mean(1) if is_channels_last else output.flatten(2).mean(-1)


def input_token_cosine(backbone: nn.Module) -> float:
    """Return the cosine of the learned class and distillation tokens, before any position is added."""
    own: Tensor = backbone.cls_token  # type: ignore[assignment]
    second = getattr(backbone, "dist_token", None)
    tokens = own if second is None else torch.cat([own, second], dim=1)  # [1, 2, D]; pit keeps both in one
    return float(torch.cosine_similarity(tokens[0, 0].detach().float(), tokens[0, 1].detach().float(), dim=0))


def block_attention(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the attention weights of every block, [B, heads, N, N] each; the rows sum to 1.

    Args:
        backbone: a timm ViT with timm's plain attention: it must have been created after
            ``chosen_attention("plain", …)``, since fused attention does not keep its weights.
        images: [B, 3, H, W].

    Raises:
        InputError: the model has no attention, or fused attention.
    """
    extract = AttentionExtract(backbone, names=["*.attn.attn_drop"], method="hook")
    with torch.no_grad():
        found = [weights.float().cpu() for weights in extract(images).values()]
    if not found:
        raise InputError("train.attention: fused attention does not keep its weights; use plain")
    return found


def rollout(attention: list[Tensor], leading_tokens: int) -> Tensor:
    """Return the attention of the leading tokens to the patches, followed through all blocks: [B, tokens, patches].

    Half of each block's output is its input (the residual path); heads have equal weight.

    Args:
        attention: of every block, [B, heads, N, N].
        leading_tokens: tokens that stand before the patches.

    Source: Abnar & Zuidema 2020, arXiv 2005.00928, section 3.
    """
    followed = torch.eye(attention[0].shape[-1])
    for weights in attention:
        followed = (weights.mean(1) + torch.eye(weights.shape[-1])) / 2 @ followed
    return followed[:, :leading_tokens, leading_tokens:]


def token_attention(backbone: nn.Module, images: Tensor, leading_tokens: int) -> TokenAttention:
    """Return where the leading tokens attend to, see `block_attention`."""
    attention = block_attention(backbone, images)
    last = attention[-1][:, :, :leading_tokens, leading_tokens:]
    height = isqrt(last.shape[-1])
    shares_patches = len({weights.shape[-1] for weights in attention}) == 1
    followed = rollout(attention, leading_tokens) if shares_patches else None
    return TokenAttention(
        rearrange(last, "b heads tokens (h w) -> b heads tokens h w", h=height),
        None if followed is None else rearrange(followed, "b tokens (h w) -> b tokens h w", h=height),
    )
