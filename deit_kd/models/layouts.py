"""Names of a ViT's tensors in timm and in transformers' published DeiT and ViT checkpoints."""

from __future__ import annotations

import re

import torch
from torch import Tensor

_TOP = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_HEADS = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
_QKV = ("query", "key", "value")


def is_transformers(state: dict[str, Tensor]) -> bool:
    """Return whether `state` has transformers' names of a DeiT or ViT."""
    return any(re.match(r"(deit|vit)\.embeddings\.", name) for name in state)


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return timm's tensors of a ViT, distilled or not, under the names that are published on the hub.

    The pieces of a fused ``qkv`` become query, key and value.
    """
    family, heads = ("deit", _HEADS) if "dist_token" in state else ("vit", {"head": "classifier"})
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+?)\.(weight|bias)", name)
        if block is None:
            renamed[_renamed(name, {k: f"{family}.{v}" for k, v in _TOP.items()} | heads)] = tensor
            continue
        number, part, kind = block.groups()
        prefix = f"{family}.encoder.layer.{number}"
        if part == "attn.qkv":
            for piece, third in zip(_QKV, tensor.chunk(3), strict=True):
                renamed[f"{prefix}.attention.attention.{piece}.{kind}"] = third.contiguous()
        else:
            renamed[f"{prefix}.{_BLOCK[part]}.{kind}"] = tensor
    return renamed


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a transformers checkpoint under timm's names; names without a counterpart stay."""
    top = {theirs: ours for ours, theirs in _TOP.items()}
    heads = {theirs: ours for ours, theirs in _HEADS.items()} | {"classifier": "head"}
    parts = {theirs: ours for ours, theirs in _BLOCK.items()}
    renamed: dict[str, Tensor] = {}
    pieces: dict[tuple[str, str], dict[str, Tensor]] = {}
    for full_name, tensor in state.items():
        name = re.sub(r"^(deit|vit)\.", "", full_name)
        block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
        if block is None:
            renamed[_renamed(name, top | heads)] = tensor
            continue
        number, part, kind = block.groups()
        piece = part.removeprefix("attention.attention.")
        if piece in _QKV:
            pieces.setdefault((number, kind), {})[piece] = tensor
        else:
            renamed[f"blocks.{number}.{parts.get(part, part)}.{kind}"] = tensor
    for (number, kind), three in pieces.items():
        renamed[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat([three[piece] for piece in _QKV])
    return renamed


def _renamed(name: str, table: dict[str, str]) -> str:
    stem, dot, kind = name.rpartition(".")
    if name in table:
        return table[name]
    return f"{table[stem]}{dot}{kind}" if stem in table else name
