"""The distillation token (DeiT, arXiv 2012.12877): graft it onto timm's plain ViTs, and read two heads separately."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import RelPosBias
from timm.models.convit import ConVit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torch.nn import functional as F

from deit_kd.interfaces import HEADS, InputError, StudentOutput
from deit_kd.models.last_block import heads_alone

Host = VisionTransformer | Eva | ConVit | VisionTransformerRelPos  # which take any number of prefix tokens


def has_second_head(backbone: nn.Module) -> bool:
    """Return whether the model has a ``head_dist``, at the top or within its head."""
    # iFormer keeps it inside its head; in its plain models an identity takes its place.
    return any(
        name.rpartition(".")[2] == "head_dist" and not isinstance(module, nn.Identity)
        for name, module in backbone.named_modules()
    )


def has_distillation_token(backbone: nn.Module) -> bool:
    """Return whether the model has a token for its second head to read; LeViT's heads read the same vector."""
    has_token = isinstance(getattr(backbone, "dist_token", None), nn.Parameter) or both_in_class_token(backbone)
    return has_token and isinstance(getattr(backbone, "head_dist", None), nn.Module)


def answers_apart(backbone: nn.Module) -> bool:
    """Return whether `read_heads` gives the logits of two heads.

    A model with a distillation token always answers with both. One whose heads read the same vector (LeViT, RepViT)
    does so after timm's ``set_distilled_training()``; otherwise it averages them, as timm does.
    """
    return has_distillation_token(backbone) or getattr(_holder_of_heads(backbone), "distilled_training", False)


def answer_with_patches(key: str, backbone: nn.Module) -> None:
    """Let `heads_of` also answer with ``patch`` from now on: the distillation head on the mean of the patch tokens.

    Args:
        key: the recipe's key, which errors begin with.
        backbone: a model with a distillation token.

    Raises:
        InputError: its distillation head cannot read its patch tokens.
    """
    model: Any = backbone
    kind = type(backbone).__name__
    reason = None
    if not has_distillation_token(backbone):
        reason = f"is a {kind}, which has no distillation token"
    elif not hasattr(backbone, "num_prefix_tokens") or not hasattr(backbone.patch_embed, "grid_size"):
        reason = f"is a {kind}, whose last features are its tokens without its patches"
    elif drops_patches(backbone):
        reason = "drops patches (patch_drop_rate), and each place needs one"
    if reason is not None:
        raise InputError(
            f"{key}: the model {reason}, so its distillation head cannot read every patch token; use a vit_*, deit_*, "
            "deit3_* or eva model without patch_drop_rate, or leave out the dense term"
        )
    model.answers_with_patches = True


def drops_patches(backbone: nn.Module) -> bool:
    """Return whether the model leaves out some of its patches in training; timm's Eva has None where it does not."""
    return not isinstance(getattr(backbone, "patch_drop", None), nn.Identity | None)


def names_of_heads(backbone: nn.Module) -> tuple[str, ...]:
    """Return which of `HEADS` the model answers with, see `heads_of`."""
    if not answers_apart(backbone):
        return HEADS[:1]
    return HEADS if getattr(backbone, "answers_with_patches", False) else HEADS[:2]


def _holder_of_heads(backbone: nn.Module) -> Any:
    """Return the module with ``head`` and ``head_dist``: the model itself or, in RepViT and iFormer, its classifier."""
    return backbone if hasattr(backbone, "head_dist") else getattr(backbone, "head", None)


def both_in_class_token(backbone: nn.Module) -> bool:
    """Return whether one parameter ``cls_token`` [1, 2, D] holds both tokens, as in pit and in grafted models."""
    cls_token = getattr(backbone, "cls_token", None)
    return isinstance(cls_token, nn.Parameter) and cls_token.shape[1] == 2


def is_grafted(backbone: nn.Module) -> bool:
    """Return whether `graft` made the model's distillation token."""
    return isinstance(backbone, Host) and both_in_class_token(backbone)


def graft(key: str, backbone: nn.Module) -> None:
    """Put a distillation token at index 1 of a plain timm ViT, and a second head that reads it; both new.

    The model stays timm's own: its parameter ``cls_token`` grows to hold both tokens [1, 2, D], as pit's does,
    ``pos_embed`` grows by the token's row where it has rows for prefix tokens, and their number grows by one wherever
    it is stored, so that rotary and relative positions, patch dropout, pooling and resizing still distinguish prefix
    tokens from patches. The class head keeps its pooling; if a norm follows the pooling, ``head_dist`` reads its token
    through a copy of it.

    Args:
        key: the recipe's key, which errors begin with.
        backbone: one of `Host` with a class token.

    Raises:
        InputError: the model has no class token, or builds its sequence in another way.
    """
    obstacle = _obstacle(backbone)
    if obstacle is not None:
        raise InputError(f"{key}: the model {obstacle}")
    model: Any = backbone
    with torch.no_grad():
        token = nn.init.trunc_normal_(torch.empty_like(model.cls_token), std=0.02)
        model.cls_token = nn.Parameter(torch.cat([model.cls_token, token], dim=1))
        positions = getattr(model, "pos_embed", None)
        if positions is not None and positions.shape[1] > model.patch_embed.num_patches:
            row = nn.init.trunc_normal_(torch.empty_like(model.pos_embed[:, :1]), std=0.02)
            model.pos_embed = nn.Parameter(torch.cat([model.pos_embed[:, :1], row, model.pos_embed[:, 1:]], dim=1))
    for module in model.modules():
        for count in ("num_prefix_tokens", "prefix_tokens"):
            if hasattr(module, count):
                setattr(module, count, getattr(module, count) + 1)
    model.fc_norm_dist = copy.deepcopy(getattr(model, "fc_norm", nn.Identity()))
    model.head_dist = nn.Linear(model.head.in_features, model.head.out_features)
    nn.init.trunc_normal_(model.head_dist.weight, std=0.02)
    nn.init.zeros_(model.head_dist.bias)


def complete_distilled_vit(key: str, model: Any, args: Mapping[str, Any]) -> None:
    """Tell the parts of timm's distilled ViT about its second token, which is added after they are built.

    Args:
        key: the recipe's key, which errors begin with.
        model: a `VisionTransformerDistilled`, as timm creates it.
        args: what it was created with.

    Raises:
        InputError: it was given an argument that its class accepts but ignores, or that breaks it.
    """
    unused = {
        "reg_tokens": model.reg_token is not None,
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "no_embed_class": model.no_embed_class,
        "pos_embed": args.get("pos_embed", "learn") != "learn",
        "pool_include_prefix": model.pool_include_prefix,
    }
    for argument, is_given in unused.items():
        if is_given:
            raise InputError(
                f"{key}: timm's {type(model).__name__} does not use {argument}; leave it out, or name a vit_* model, "
                "which a distillation token is grafted onto"
            )
    for module in model.modules():
        if hasattr(module, "num_prefix_tokens"):  # patch dropout, which would drop and move the second token
            module.num_prefix_tokens = model.num_prefix_tokens


def can_graft(backbone: nn.Module) -> bool:
    """Return whether `graft` can put a distillation token onto the model."""
    return _obstacle(backbone) is None


def _obstacle(backbone: Any) -> str | None:
    """Return why no token can be grafted onto a model, and what to do; None if one can be."""
    kind, cure = type(backbone).__name__, "use a vit_*, deit_*, deit3_* or eva model with a class token"
    has_class_token = getattr(backbone, "cls_token", None) is not None
    reason = None
    if not isinstance(backbone, Host):
        has_one = any("cls_token" in name for name, _ in backbone.named_parameters())  # each branch of CrossViT has one
        around = "is built around one class token" if has_one else "has no class token to stand beside"
        reason = f"is a {kind}, which a distillation token cannot be grafted onto: it {around}"
    elif not has_class_token:
        pools = backbone.global_pool
        reason = f"has no class token for a distillation token to stand beside (it pools by {pools!r})"
        both = "class_token: true" if pools == "avg" else "class_token: true, global_pool: token"
        cure = f"set student.args to {{{both}}}, or {cure}"
    elif getattr(backbone, "pool_include_prefix", False):
        reason = "pools over its prefix tokens, so that a new one would change its class head"
    elif getattr(backbone, "attn_pool", None) is not None:
        reason = "pools all its tokens by attention, so that a new one would change its class head"
        cure = f"set student.args to {{global_pool: token}}, or {cure}"
    elif not isinstance(backbone.head, nn.Linear):
        reason = "has no linear head to copy"
    elif any(isinstance(module, RelPosBias) for module in backbone.modules()):
        reason = "has a table of relative positions with rows for one class token"
    return None if reason is None else f"{reason}; {cure}"


def read_heads(backbone: nn.Module, images: Tensor) -> StudentOutput:
    """Answer `images` [B, 3, H, W] with logits [B, C] of each of its heads, see `answers_apart`."""
    model: Any = backbone
    with heads_alone(backbone):
        last = model.forward_features(images)
    return heads_of(backbone, last)


def heads_of(backbone: nn.Module, last: Tensor) -> StudentOutput:
    """Return the logits [B, C] of each of its heads, from the model's last features; see `answer_with_patches`."""
    output = _two_heads_of(backbone, last)
    if "patch" not in names_of_heads(backbone):
        return output
    model: Any = backbone
    return output._replace(patch_logits=model.head_dist(model.head_drop(_patches(model, last).mean(1))))


def dense_logits_of(backbone: nn.Module, last: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the logits [B, h, w, C] of the distillation head at every place of a `grid` of h x w.

    A place is the mean of the patch tokens under it, as ``adaptive_avg_pool2d`` divides them; the head is linear, so
    this is the mean of their logits.

    Args:
        backbone: a model for which `answer_with_patches` was called.
        last: its last features [B, N, D].
        grid: any; that of a teacher.
    """
    model: Any = backbone
    tokens = _patches(model, last)
    height, width = model.patch_embed.grid_size
    with torch.no_grad():
        single = torch.eye(height * width, device=tokens.device).view(-1, 1, height, width)
        shares = F.adaptive_avg_pool2d(single, grid).flatten(1).mT.to(tokens.dtype)  # [h w, N]
    # Not adaptive_avg_pool2d of the tokens: on CUDA its gradient is not deterministic.
    logits: Tensor = model.head_dist(model.head_drop(shares @ tokens))
    return logits.unflatten(1, grid)


def _patches(model: Any, last: Tensor) -> Tensor:
    """Return the patch tokens [B, N, D] as the distillation head reads its own token."""
    patches = last[:, model.num_prefix_tokens :]
    normed: Tensor = model.fc_norm_dist(patches) if is_grafted(model) else patches
    return normed


def _two_heads_of(backbone: nn.Module, last: Tensor) -> StudentOutput:
    model: Any = backbone
    if not answers_apart(backbone):
        return StudentOutput(model.forward_head(last))
    if not has_distillation_token(backbone):
        vector, holder = model.forward_head(last, pre_logits=True), _holder_of_heads(backbone)
        return StudentOutput(holder.head(vector), holder.head_dist(vector))
    drop = model.head_drop
    if is_grafted(backbone):
        return StudentOutput(model.forward_head(last), model.head_dist(drop(model.fc_norm_dist(last[:, 1]))))
    return StudentOutput(model.head(drop(last[:, 0])), model.head_dist(drop(last[:, 1])))
