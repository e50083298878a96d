"""From a recipe to a teacher whose weights are really loaded and whose columns are the dataset's classes."""

from __future__ import annotations

from typing import Any

import timm
import torch

from deit_kd.interfaces import InputError
from deit_kd.models import (
    Weights,
    check_answer,
    check_arguments,
    check_known,
    create_model,
    load_weights,
    plain_twin,
    pretrained_weights,
)
from deit_kd.randomness import seed_initialisation
from deit_kd.teachers.class_map import build_class_map, label_set_names
from deit_kd.teachers.frozen import FrozenTeacher, FusedHeads, Statistics
from deit_kd.tokens import has_distillation_token
from deit_kd.weights import fit_weights

SOURCES = "teacher.pretrained, teacher.checkpoint and teacher.fit.epochs"


def build_teacher(
    *,
    name: str | None,
    pretrained: bool,
    checkpoint: str | None,
    random_weights: bool,
    label_set: str | None = None,
    class_map: str | None = None,
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
    """Build the frozen teacher; nothing of its head is ever new, but with `random_weights`.

    Its size and normalisation are the recipe's, else those that its pretrained config or the ``config.json``
    beside its checkpoint tells, else the student's.

    Args:
        name: a timm name; None is what the checkpoint's ``config.json`` names.
        pretrained: use timm's own weights, head included.
        checkpoint: use these weights: a run, a local-dir, ``.safetensors`` or ``.pth``. A distilled student
            teaches through its fused heads.
        random_weights: use none; for benchmarks and tests.
        label_set: what the columns of weights without names are, see `build_class_map`.
        class_map: a CSV or JSON file of the dataset's classes and the teacher's columns.
        args: handed to ``timm.create_model``.
        image_size: pixels that the teacher sees.
        mean: the teacher's normalisation.
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
        InputError: the weights' source is not named exactly once, they do not fit, their head is missing, or a
            class of the dataset has no column.
    """
    check_arguments("teacher.args", args)
    weights = _weights(name, pretrained, checkpoint, random_weights, label_set)
    architecture = name or weights.architecture
    if architecture is None:
        raise InputError(f"teacher.name: is not set, and {weights.source} does not say; name a timm model")
    if weights.state and not weights.has_distillation_token:
        architecture = plain_twin(architecture)  # what a plain run of that name has trained
    known = weights.pretrained_cfg
    size = image_size or int((known.get("input_size") or (3, student_image_size))[-1])
    arguments = {**_saved_arguments(architecture, weights), **args}
    seed_initialisation("teacher", seed)
    columns = _columns(architecture, weights, len(classes))
    network = create_model(
        "teacher.name",
        architecture,
        image_size=size,
        distillation_token=weights.has_distillation_token,
        num_classes=columns,
        **arguments,
    )
    if not random_weights:
        fit_weights("teacher", network, weights.state, source=weights.source, whole=True)
    network.eval()
    check_answer("teacher", architecture, lambda images: [network(images)], size, columns)
    mapping = build_class_map(
        classes=classes,
        columns=columns,
        label_names=weights.label_names,
        timm_tag=pretrained,
        label_set=label_set,
        file=class_map,
    )
    own_mean: Statistics = mean or tuple(known.get("mean", student_mean))
    own_std: Statistics = std or tuple(known.get("std", student_std))
    interpolation = "bilinear" if known.get("interpolation") == "bilinear" else "bicubic"
    return FrozenTeacher(
        FusedHeads(network) if has_distillation_token(network) else network,
        student_mean=student_mean,
        student_std=student_std,
        mean=own_mean,
        std=own_std,
        image_size=size,
        interpolation=interpolation,
        dtype=dtype,
        channels_last=channels_last,
        compiled=compiled,
        class_map=mapping,
        facts={
            "name": architecture,
            "origin": weights.source,
            "licence": known.get("license") if pretrained else None,
            "image_size": size,
            "mean": list(own_mean),
            "std": list(own_std),
            "interpolation": interpolation,
            "class_map": None if mapping is None else mapping.record(classes),
        },
    ).to(device)


def _weights(
    name: str | None,
    pretrained: bool,
    checkpoint: str | None,
    random_weights: bool,
    label_set: str | None,
) -> Weights:
    sources = [
        source
        for source, given in (
            ("teacher.pretrained", pretrained),
            ("teacher.checkpoint", checkpoint is not None),
            ("teacher.random_weights", random_weights),
        )
        if given
    ]
    if name is None and checkpoint is None:
        raise InputError("teacher.name: is not set; name a timm model such as resnet18, or set distill.kind none")
    if len(sources) != 1:
        given = " and ".join(sources) if sources else "nothing"
        raise InputError(f"teacher.name: {name!r} has {given} to take its weights from; set one of {SOURCES}")
    if checkpoint is not None:
        return load_weights("teacher.checkpoint", checkpoint)
    assert name is not None
    if pretrained:
        return pretrained_weights("teacher.pretrained", name)
    return Weights({}, "random weights", label_names=None if label_set is None else label_set_names(label_set))


def _saved_arguments(architecture: str, weights: Weights) -> dict[str, Any]:
    """Return how the weights' own model was built, where they are of this architecture."""
    if weights.architecture is None or weights.architecture.split(".")[0] != architecture.split(".")[0]:
        return {}
    return weights.build_arguments


def _columns(architecture: str, weights: Weights, classes: int) -> int:
    """Return how many outputs the head of the weights has."""
    if not weights.state:
        return len(weights.label_names or ()) or classes
    check_known("teacher.name", architecture)
    classifier = getattr(timm.get_pretrained_cfg(architecture), "classifier", None)
    heads = [f"{name}.weight" for name in ((classifier,) if isinstance(classifier, str) else classifier or ())]
    found = [weights.state[head].shape[0] for head in heads if head in weights.state and weights.state[head].ndim]
    if not found:
        raise InputError(
            f"teacher: {weights.source} has no head ({', '.join(heads) or 'timm names none'}), and a teacher's head is "
            "never made up; use weights that were trained to classify"
        )
    return int(found[0])
