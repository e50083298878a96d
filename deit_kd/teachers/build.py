"""From a recipe to a teacher whose weights are really loaded and whose classes are the dataset's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deit_kd.interfaces import InputError
from deit_kd.models import create_model, label_names, load_into, load_weights
from deit_kd.randomness import seed_initialisation
from deit_kd.teachers.frozen import FrozenTeacher, Statistics


def build_teacher(
    *,
    name: str | None,
    pretrained: bool,
    checkpoint: str | None,
    random_weights: bool,
    args: dict[str, Any],
    image_size: int | None,
    mean: Statistics | None,
    std: Statistics | None,
    channels_last: bool,
    compiled: bool,
    classes: tuple[str, ...],
    student_image_size: int,
    student_mean: Statistics,
    student_std: Statistics,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> FrozenTeacher:
    """Build the frozen teacher.

    Args:
        name: a timm name.
        pretrained: use timm's own weights, head included.
        checkpoint: use these weights: a run, a local-dir, ``.safetensors`` or ``.pth``. They are taken to be
            trained with the student's normalisation unless `mean` and `std` say otherwise.
        random_weights: use none; for benchmarks and tests.
        args: handed to ``timm.create_model``.
        image_size: pixels that the teacher sees; None is the student's.
        mean: the teacher's normalisation; None is its pretrained config's, or the student's for a checkpoint.
        std: the same.
        channels_last: memory format.
        compiled: whether to compile it.
        classes: the dataset's class names, in label order.
        student_image_size: pixels of the batch.
        student_mean: normalisation of the batch.
        student_std: the same.
        seed: of random weights.
        dtype: of the weights.
        device: where it runs.

    Raises:
        InputError: the weights' source is not named exactly once, they do not fit, or their classes are not
            the dataset's.
    """
    if name is None:
        raise InputError("teacher.name: is not set; name a timm model such as resnet18, or set distill.kind none")
    sources = [
        source
        for source, given in (
            ("teacher.pretrained", pretrained),
            ("teacher.checkpoint", checkpoint is not None),
            ("teacher.random_weights", random_weights),
        )
        if given
    ]
    if len(sources) != 1:
        given = " and ".join(sources) if sources else "nothing"
        raise InputError(
            f"teacher.name: {name!r} has {given} to take its weights from; set one of teacher.pretrained, "
            "teacher.checkpoint and teacher.fit.epochs"
        )
    seed_initialisation("teacher", seed)
    arguments = dict(args) if pretrained else {"num_classes": len(classes), **args}
    network = create_model(
        "teacher.name", name, pretrained=pretrained, image_size=image_size or student_image_size, **arguments
    )
    if checkpoint is not None:
        state = load_weights("teacher.checkpoint", checkpoint)
        _check_class_names(label_names(checkpoint), classes, checkpoint)
        load_into("teacher.checkpoint", network, state, checkpoint)
    _check_class_count(network, classes, name)
    pretrained_cfg: Any = network.pretrained_cfg if pretrained else {}
    return FrozenTeacher(
        network,
        student_mean=student_mean,
        student_std=student_std,
        mean=mean or tuple(pretrained_cfg.get("mean", student_mean)),
        std=std or tuple(pretrained_cfg.get("std", student_std)),
        image_size=image_size,
        dtype=dtype,
        channels_last=channels_last,
        compiled=compiled,
    ).to(device)


def _check_class_count(network: nn.Module, classes: tuple[str, ...], name: str) -> None:
    if network.num_classes != len(classes):
        raise InputError(
            f"teacher.name: {name!r} answers in {network.num_classes} classes, the dataset has {len(classes)}; its "
            "head would teach the wrong ones. Name a checkpoint for these classes, or tune it with teacher.fit.epochs"
        )


def _check_class_names(theirs: tuple[str, ...] | None, classes: tuple[str, ...], checkpoint: str) -> None:
    if theirs is None or theirs == classes:
        return
    for position in range(max(len(theirs), len(classes))):
        other = theirs[position] if position < len(theirs) else "nothing"
        own = classes[position] if position < len(classes) else "nothing"
        if other != own:
            raise InputError(
                f"teacher.checkpoint: {checkpoint} has {len(theirs)} classes and the dataset {len(classes)}; class "
                f"{position} is {other!r} there and {own!r} here. Use a teacher of these classes, in this order"
            )
