"""Builds a student with its initial weights from a recipe's name."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from deit_kd.interfaces import InputError
from deit_kd.models.create import check_answer, check_arguments, create_model, size_argument
from deit_kd.models.integers import round_linears
from deit_kd.models.last_block import replace_last_block
from deit_kd.models.names import check_known, distilled_twin, plain_twin
from deit_kd.models.tokens import answer_with_patches
from deit_kd.models.weights import Account, fit_weights
from deit_kd.origins import Origin, open_origin, open_published
from deit_kd.randomness import seed_initialisation
from deit_kd.students.heads import TimmStudent
from deit_kd.students.paths import found_paths
from deit_kd.twins import refuse_other_twin, set_layer_norm_eps

_PATCH_EMBEDDING = ("patch_embed.",)
_HEADS = ("head.", "head_dist.", "fc_norm.", "fc_norm_dist.")
_TOKENS = ("cls_token", "dist_token", "reg_token")


def build_student(
    *,
    name: str | None,
    pretrained: bool,
    checkpoint: str | None,
    args: dict[str, Any],
    drop_path: float,
    classes: tuple[str, ...],
    image_size: int,
    distilled: bool,
    or_one_head: bool = False,
    patches: bool = False,
    token: str = "cls",
    new_heads: bool = False,
    freeze: str = "none",
    channels_last: bool | None = None,
    strict: bool = False,
    bits: int | None = None,
    seed: int,
) -> TimmStudent:
    """Build a student with seeded initial weights.

    Args:
        name: a timm name; with `distilled` one that has a distillation token or a second head, its plain twin, or a
            plain ViT that a token is grafted onto; without it any model; a name with a distillation token then builds
            its plain twin (no token, no second head), and two heads without a token are averaged.
        pretrained: start from timm's weights.
        checkpoint: start from these weights instead, see `open_origin`.
        args: passed to ``timm.create_model`` (patch_size, embed_dim, depth, …).
        drop_path: rate of stochastic depth.
        classes: the dataset's class names, in label order.
        image_size: pixels.
        distilled: whether the student learns from a teacher through a head of its own.
        or_one_head: with `distilled`, build a network that cannot have two heads as it is.
        patches: whether it also answers with ``patch``, see `answer_with_patches`.
        token: what a new token starts from, ``cls`` or ``scratch``; see `fit_weights`.
        new_heads: initialise new heads even if the weights' own have the same number of classes.
        freeze: ``none``, ``patch_embed``, ``backbone`` (tokens and heads learn) or ``all_but_heads``.
        channels_last: memory format, see `TimmStudent`.
        strict: the weights must be exactly this student's, every tensor of them.
        bits: of the integers that its linear layers will become, see `round_linears`; None for floating point.
        seed: of the run.

    Raises:
        InputError: the model is unknown, has no second head and cannot get one, or cannot take the size,
            the arguments or the weights, or does not answer images with logits [B, C].
    """
    if name is None:
        raise InputError("student.name: is not set; name a timm model such as deit_tiny_distilled_patch16_224")
    check_known("student.name", name)
    check_arguments("student.args", args)
    if pretrained and checkpoint is not None:
        raise InputError(f"student.checkpoint: {checkpoint} and student.pretrained exclude each other; unset one")
    architecture = distilled_twin(name) if distilled else plain_twin(name)
    key = "student.pretrained" if checkpoint is None else "student.checkpoint"
    origin = open_origin(key, checkpoint) if checkpoint is not None else None
    if pretrained:
        origin = open_published(key, name)
    seed_initialisation("student", seed)
    backbone = create_model(
        "student.name",
        architecture,
        image_size=image_size,
        distilled=distilled,
        or_one_head=or_one_head,
        num_classes=len(classes),
        **args,
        **({"drop_path_rate": drop_path} if drop_path else {}),
    )
    replace_last_block(backbone)
    if patches:
        answer_with_patches("student.name", backbone)
    account = None
    if origin is not None:
        other_classes = origin.classes is not None and (origin.classes != classes or origin.columns is not None)
        account = _fit(key, backbone, origin, architecture, args, image_size, strict, new_heads or other_classes, token)
    student = TimmStudent(
        backbone,
        model_args={**size_argument(architecture, image_size), **args},
        account=account,
        channels_last=channels_last,
    )
    _freeze(student.backbone, freeze)
    if bits is not None:
        round_linears("student.bits", name, student.backbone, image_size, bits)
    student.eval()
    with found_paths(backbone) as found:
        check_answer("student", name, lambda images: [*student(images).logits.values()], image_size, len(classes))
        student.drop_paths = found()
    return student.train()


def _fit(
    key: str,
    backbone: nn.Module,
    origin: Origin,
    architecture: str,
    args: dict[str, Any],
    image_size: int,
    strict: bool,
    new_heads: bool,
    token: str,
) -> Account:
    account = fit_weights(
        key,
        backbone,
        origin.state,
        source=origin.name,
        new_heads=new_heads,
        token=token,
        strict=strict,
        own_model=_named(origin),
    )
    if origin.layer_norm_eps is not None and strict:
        set_layer_norm_eps(backbone, origin.layer_norm_eps)
    refuse_other_twin(key, backbone, origin, architecture, args, image_size)
    return account


def _named(origin: Origin) -> str | None:
    """Return the options that name the network of the weights, as far as they are known."""
    if origin.architecture is None:
        return None
    args = {name: value for name, value in origin.model_args.items() if name != "img_size"}
    return f"--student.name {origin.architecture}" + (f" --student.args '{json.dumps(args)}'" if args else "")


def _freeze(backbone: nn.Module, what: str) -> None:
    if what == "none":
        return
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules()):
        raise InputError(
            "student.freeze: a frozen BatchNorm would still update its statistics; freeze a ViT or nothing"
        )
    for name, parameter in backbone.named_parameters():
        learns = {
            "patch_embed": not name.startswith(_PATCH_EMBEDDING),
            "backbone": name.startswith(_HEADS + _TOKENS),
            "all_but_heads": name.startswith(_HEADS),
        }[what]
        parameter.requires_grad_(learns)
    if all(parameter.requires_grad for parameter in backbone.parameters()):
        raise InputError(f"student.freeze: {type(backbone).__name__} has no {what} to freeze; set it to none")
