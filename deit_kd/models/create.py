"""timm models by name: built and checked, with their token and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import timm
import torch
from pydantic import Field
from timm.layers import set_fused_attn, use_fused_attn
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from deit_kd.interfaces import InputError
from deit_kd.models.names import check_known
from deit_kd.models.tokens import can_graft, complete_distilled_vit, graft, has_distillation_token, has_second_head

Pixels = Annotated[int, Field(gt=0, le=2**14)]


@contextmanager
def chosen_attention(choice: str, device: torch.device) -> Iterator[None]:
    """Choose the attention of every model that is created meanwhile: ``auto``, ``fused`` or ``plain``.

    ``auto`` is PyTorch's fused attention on CUDA and timm's plain one on the CPU, where the backward pass of the fused
    one takes half of a DeiT-Ti step (docs/evidence/performance.md).
    """
    before = use_fused_attn()
    set_fused_attn(choice == "fused" or (choice == "auto" and device.type == "cuda"))
    try:
        yield
    finally:
        set_fused_attn(before)


def size_argument(name: str, image_size: int) -> dict[str, int]:
    """Return the image size argument of ``timm.create_model``; empty if the model takes any size."""
    pretrained_cfg = timm.get_pretrained_cfg(name)
    fixed = pretrained_cfg is not None and pretrained_cfg.fixed_input_size
    return {"img_size": image_size} if fixed else {}


# Arguments that would bypass the checks of weights and classes.
RESERVED_ARGUMENTS = {
    "cache_dir": "set HF_HOME",
    "checkpoint_path": "name the file as the section's checkpoint",
    "distillation_token": "set distill.kind",
    "drop_path_rate": "set the section's drop_path",
    "features_only": "a student and a teacher need their heads",
    "image_size": "set the section's image_size",
    "img_size": "set the section's image_size",
    "in_chans": "images have three channels",
    "num_classes": "it follows from the data or the weights",
    "pretrained": "set it in the section itself",
    "pretrained_cfg": "name a pretrained tag, or a checkpoint",
    "pretrained_cfg_overlay": "name a pretrained tag, or a checkpoint",
}


# The fields of a pretrained_cfg that describe a network, whatever its weights are.
OF_THE_ARCHITECTURE = {
    "architecture",
    "classifier",
    "first_conv",
    "fixed_input_size",
    "input_size",
    "min_input_size",
    "num_classes",
    "pool_size",
}


def check_arguments(key: str, args: Mapping[str, Any]) -> None:
    """Raise an InputError if `args` of ``timm.create_model`` would choose weights or classes."""
    for name, cure in RESERVED_ARGUMENTS.items():
        if name in args:
            raise InputError(f"{key}: {name} cannot be given here; {cure}")


def create_model(
    key: str,
    name: str,
    /,
    *,
    image_size: int | None = None,
    distilled: bool = False,
    or_one_head: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Create a timm model with new weights; `image_size` reaches only models that are built for one size.

    Args:
        key: the recipe's key, which errors begin with.
        name: a timm name, with or without a pretrained tag.
        image_size: pixels.
        distilled: answer with two heads: the model's own (see `answers_apart`), or a token and its head grafted on.
        or_one_head: with `distilled`, leave a model that cannot have two heads as it is.
        kwargs: passed to ``timm.create_model``.

    Raises:
        InputError: timm does not know the model or an argument, or would ignore one, the patch size does not divide the
            image size, or a distillation token cannot be grafted.
    """
    check_known(key, name)
    if image_size is not None:
        kwargs = {**size_argument(name, image_size), **kwargs}
    model = created_by_timm(key, name, "see the arguments of timm's model", **kwargs)
    _check_patches(key, model, image_size)
    if isinstance(model, VisionTransformerDistilled):
        complete_distilled_vit(key, model, kwargs)
    if distilled and not has_second_head(model):
        if can_graft(model) or not or_one_head:
            graft(key, model)
    elif distilled and not has_distillation_token(model):
        model.set_distilled_training(True)  # type: ignore[operator]  # in eval, timm's own forward still averages
    return model


@torch.no_grad()
def check_answer(
    section: str, name: str, network: Callable[[Tensor], Sequence[Tensor | None]], image_size: int, columns: int
) -> None:
    """Refuse a network in eval mode whose heads do not return two rows of finite logits for two images.

    Args:
        section: of the recipe, ``student`` or ``teacher``.
        name: a timm name.
        network: answers images [B, 3, H, W] with logits [B, C] of each head; None for a head that it lacks.
        image_size: pixels.
        columns: C.

    Raises:
        InputError: it does not accept such images, or answers with something else.
    """
    size_key = "data.image_size" if section == "student" else f"{section}.image_size"
    try:
        heads = network(torch.zeros(2, 3, image_size, image_size))
    except NotImplementedError as error:
        raise InputError(f"{section}.name: {name!r} does not classify ({error}); name another model") from error
    except Exception as error:  # the effect of a recipe's arguments and size shows only in the forward pass
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{size_key}: {name!r} does not accept images of {image_size} pixels ({reason}); set another size, other "
            f"{section}.args or {section}.channels_last"
        ) from error
    for logits in heads:
        if logits is not None and (logits.shape != (2, columns) or not logits.isfinite().all()):
            raise InputError(
                f"{section}.name: {name!r} returns {list(logits.shape)} for two images, not [2, {columns}] finite "
                f"logits; see {section}.args"
            )


def leave_out_head(section: str, name: str, network: nn.Module, image_size: int) -> None:
    """Remove the head of a network in eval mode, so that it answers with its pooled features [B, D].

    Raises:
        InputError: timm cannot do that to this network, or it then does not return finite vectors for two images.
    """
    model: Any = network
    try:
        model.reset_classifier(0)
    except Exception as error:  # every timm model implements this itself
        raise InputError(
            f"{section}.head: {name!r} does not work without its head ({' '.join(str(error).split())[:160]}); name "
            "another"
        ) from error
    width = getattr(model, "head_hidden_size", model.num_features)
    check_answer(section, name, lambda images: [model.forward_head(model.forward_features(images))], image_size, width)


def created_by_timm(key: str, name: str, cure: str, **kwargs: Any) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except Exception as error:  # timm does not check a recipe's arguments, and may raise anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{key}: {name!r} cannot be created with {kwargs} ({reason}); {cure}") from error
    return model


def _check_patches(key: str, model: nn.Module, image_size: int | None) -> None:
    """Refuse a size whose last pixels no patch would cover; overlapping and padded patches cover all of them."""
    embedding = getattr(model, "patch_embed", None)
    patches = getattr(embedding, "proj", None)
    if image_size is None or not isinstance(patches, nn.Conv2d) or patches.kernel_size != patches.stride:
        return
    if getattr(embedding, "dynamic_img_pad", False):
        return
    size_key = "teacher.image_size" if key.startswith("teacher.") else "data.image_size"
    for patch in patches.stride:
        if image_size % patch:
            below, above = image_size // patch * patch, (image_size // patch + 1) * patch
            choices = " or ".join(str(size) for size in (below, above) if size)
            raise InputError(f"{size_key}: {image_size} is not a multiple of {key}'s patch size {patch}; use {choices}")
