"""A student expressed as timm's plain ViT, distilled or not, which plain timm and transformers can build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from deit_kd.models.last_block import LastBlock
from deit_kd.models.tokens import has_distillation_token, is_grafted

_SIZES = {192: "tiny", 384: "small"}


class CannotHold(Exception):
    """A format cannot hold a student; the message is the reason, ``it has register tokens``."""


@dataclass(frozen=True)
class PlainViT:
    """Tensors under timm's names, and the arguments of ``timm.create_model`` for a model that they fit."""

    architecture: str
    state: dict[str, Tensor]
    arguments: dict[str, Any]
    is_distilled: bool


def as_plain_vit(backbone: nn.Module) -> PlainViT:
    """Express a student as timm's own distilled ViT or, without a distillation token, as its ViT.

    Position embeddings without rows for the tokens (``no_embed_class``) get rows of zeros.

    Raises:
        CannotHold: it has a part that timm's class does not have.
    """
    reason = _reason(backbone)
    if reason is not None:
        raise CannotHold(reason)
    model: Any = backbone
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if is_grafted(model):
        state["cls_token"], state["dist_token"] = state["cls_token"][:, :1], state["cls_token"][:, 1:]
    if model.no_embed_class:
        rows = torch.zeros_like(state["pos_embed"][:, : model.num_prefix_tokens])
        state["pos_embed"] = torch.cat([rows, state["pos_embed"]], dim=1)
    block = model.blocks[0]
    arguments = {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
    }
    if hasattr(block.ls1, "gamma"):
        arguments["init_values"] = 1.0  # creates layer scales; their values are in the state
    if not isinstance(model.norm_pre, nn.Identity):
        arguments["pre_norm"] = True
    is_distilled = has_distillation_token(model)
    # Any timm name would do, since the arguments define everything; this is the closest.
    size = _SIZES.get(model.embed_dim, "base")
    architecture = f"deit_{size}_distilled_patch16_224" if is_distilled else f"vit_{size}_patch16_224"
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    return PlainViT(architecture, state, arguments, is_distilled)


def _reason(model: Any) -> str | None:
    if not isinstance(model, VisionTransformer):
        return f"it is built as {type(model).__name__}, not as a plain ViT"
    if model.cls_token is None:
        return f"its class head pools by {model.global_pool!r}"
    if model.reg_token is not None:
        return "it has register tokens"
    if not isinstance(model, VisionTransformerDistilled) and model.global_pool != "token":
        return f"its class head pools by {model.global_pool!r}"
    if not isinstance(model.fc_norm, nn.Identity):
        return "it has a norm after pooling"
    if type(model.patch_embed) is not PatchEmbed or not isinstance(model.patch_embed.norm, nn.Identity):
        return f"its stem is a {type(model.patch_embed).__name__}, not a plain patch embedding"
    if model.pos_embed is None or not isinstance(model.norm, nn.LayerNorm):
        return "it has no absolute position embedding, or a different final norm"
    return next((reason for block in model.blocks if (reason := _block_reason(block)) is not None), None)


def _block_reason(block: Any) -> str | None:
    plain = type(block) in (Block, LastBlock) and type(block.attn) is Attention and type(block.mlp) is Mlp
    if not plain or type(block.mlp.act) is not nn.GELU:
        return "its blocks are not plain ViT blocks (SwiGLU, parallel, post-norm or another attention)"
    if block.attn.proj.bias is None or block.mlp.fc1.bias is None or block.mlp.fc2.bias is None:
        return "its blocks have projections without a bias"
    extras = (block.attn.q_norm, block.attn.k_norm, block.attn.norm, block.mlp.norm)
    if not all(isinstance(extra, nn.Identity) for extra in extras):
        return "its blocks have further norms"
    return None
