"""From a name in a recipe to a student with its first weights."""

from __future__ import annotations

from typing import Any

import timm

from deit_kd.interfaces import InputError, nearest
from deit_kd.models import check_known, create_model, load_into, load_weights, size_argument
from deit_kd.randomness import seed_initialisation
from deit_kd.students.heads import TimmStudent


def build_student(
    *,
    name: str | None,
    pretrained: bool,
    checkpoint: str | None,
    args: dict[str, Any],
    drop_path: float,
    classes: int,
    image_size: int,
    distilled: bool,
    seed: int,
) -> TimmStudent:
    """Build a student with seeded initial weights.

    Args:
        name: a timm name; with `distilled` one that has a distillation token, without it any model, of which
            a ``*_distilled_*`` name builds its plain twin (no token, no second head).
        pretrained: start from timm's weights; timm gives them new heads for another class count.
        checkpoint: start from these weights instead: a run, a local-dir, ``.safetensors`` or ``.pth``.
        args: handed to ``timm.create_model`` (patch_size, embed_dim, depth, …).
        drop_path: rate of stochastic depth.
        classes: C.
        image_size: pixels.
        distilled: whether the student learns from a teacher through its token.
        seed: of the run.

    Raises:
        InputError: the model is unknown, has no distillation token, or cannot take the size or arguments.
    """
    if name is None:
        raise InputError("student.name: is not set; name a timm model such as deit_tiny_distilled_patch16_224")
    check_known("student.name", name)
    if pretrained and checkpoint is not None:
        raise InputError(f"student.checkpoint: {checkpoint} and student.pretrained exclude each other; unset one")
    architecture = name if distilled else name.replace("_distilled", "")
    arguments = dict(args)
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    seed_initialisation("student", seed)
    backbone = create_model(
        "student.name",
        architecture,
        pretrained=pretrained,
        image_size=image_size,
        num_classes=classes,
        **arguments,
    )
    student = TimmStudent(backbone, model_args={**size_argument(architecture, image_size), **args})
    if distilled and not student.has_distillation_token:
        tokened = timm.list_models("*_distilled_*")
        raise InputError(
            f"student.name: {name!r} has no distillation token; use a *_distilled_* model"
            f"{nearest(architecture, tokened)} or set distill.kind none"
        )
    if checkpoint is not None:
        load_into("student.checkpoint", student.backbone, load_weights("student.checkpoint", checkpoint), checkpoint)
    return student
