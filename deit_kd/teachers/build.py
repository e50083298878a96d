"""Builds a recipe's teacher: its weights are really loaded, and its columns are the dataset's classes."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from deit_kd.interfaces import InputError, Preprocessing, Statistics
from deit_kd.models.create import check_answer, check_arguments, create_model, leave_out_head
from deit_kd.models.names import check_known, is_kin, plain_twin
from deit_kd.models.tokens import answer_with_patches, answers_apart
from deit_kd.models.weights import fit_weights
from deit_kd.origins import Origin, open_origin, open_published
from deit_kd.randomness import seed_initialisation
from deit_kd.teachers.class_map import build_class_map, label_set_names
from deit_kd.teachers.dense import dense_grid
from deit_kd.teachers.fold import fold_batch_norms
from deit_kd.teachers.frozen import FrozenTeacher, FusedHeads
from deit_kd.teachers.specialists import Specialty, specialty_of
from deit_kd.twins import refuse_other_twin, set_layer_norm_eps

SOURCES = "teacher.pretrained, teacher.checkpoint and teacher.fit.epochs"


def build_teacher(
    *,
    name: str | None,
    pretrained: bool,
    checkpoint: str | None,
    random_weights: bool,
    head: bool = True,
    label_set: str | None = None,
    class_map: str | None = None,
    args: dict[str, Any],
    image_size: int | None,
    mean: Statistics | None,
    std: Statistics | None,
    channels_last: bool,
    fold: bool = False,
    dense: bool = False,
    compiled: bool,
    classes: tuple[str, ...],
    student: Preprocessing,
    rest: str | None = None,
    is_member: bool = False,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> FrozenTeacher:
    """Build the frozen teacher; its head is never new, except with `random_weights`.

    Without a `head` it answers with features only: the weights' own head, if any, is checked with all the rest and then
    removed (timm's ``reset_classifier(0)``), and neither class names nor a class map are needed.

    Its size and normalisation are the recipe's, else its origin's, else the student's.

    Args:
        name: a timm name; None takes the checkpoint's.
        pretrained: use timm's own weights, head included.
        checkpoint: use these weights, see `open_origin`. A distilled student teaches through its fused heads.
        random_weights: use none; for benchmarks and tests.
        head: whether it answers with logits.
        label_set: the classes of columns without names, see `build_class_map`.
        class_map: a CSV or JSON file of the dataset's classes and the teacher's columns.
        args: passed to ``timm.create_model``.
        image_size: pixels that the teacher sees.
        mean: the teacher's normalisation.
        std: the same.
        channels_last: memory format.
        fold: whether to fold its batch norms, see `fold_batch_norms`.
        dense: whether it must be able to answer at each place, see `dense_grid`.
        compiled: whether to compile it.
        classes: the dataset's class names, in label order.
        student: the preprocessing of the batch's images.
        rest: the one of `classes` that stands for all others, if there is one.
        is_member: whether it is one of several teachers, and may then be a specialist, see `Panel`.
        seed: of random weights.
        dtype: of the weights.
        device: where it runs.

    Raises:
        InputError: not exactly one source of weights is given, they do not fit, their head is missing, or a class of
            the dataset has no column.
    """
    check_arguments("teacher.args", args)
    if head and pretrained and name is not None:
        _check_tag_has_head(name)
    origin = _origin(name, pretrained, checkpoint, random_weights)
    notes: list[str] = []
    described = None if origin.is_published else origin.architecture
    if described is not None and name is not None and not is_kin(name, described):
        notes.append(f"teacher.name: {name} is ignored, since {_what_is(origin)}")
        name, args = None, {}
    architecture = _architecture(name, origin)
    size = image_size or origin.preprocessing.image_size or student.image_size
    arguments = {**origin.arguments_of(architecture), **args}
    label_names = None if origin.is_published else origin.classes
    if random_weights and label_set is not None:
        label_names = label_set_names(label_set)
    elif random_weights and class_map is None:
        label_names = classes
    columns = len(label_names or classes) * head if random_weights else _columns(architecture, origin, head)
    seed_initialisation("teacher", seed)
    network = _network(architecture, arguments, size, columns, None if random_weights else origin)
    mapping, specialty, own = None, None, classes
    if origin.rest is not None and rest is None and head:
        specialty = specialty_of(origin.name, label_names, origin.rest, classes)
    if specialty is not None and origin.rest is not None:
        _check_specialist(origin.name, specialty, is_member, class_map)
        own = (*(classes[label] for label in specialty.labels), origin.rest.name)
        notes.append(
            f"teacher: {origin.name} is a specialist of {', '.join(own[:-1])}; its {origin.rest.name!r} stands for the "
            f"{len(classes) - len(specialty.labels)} others"
        )
    if head:
        check_answer("teacher", architecture, lambda images: [network(images)], size, columns)
        mapping = build_class_map(
            classes=own,
            rest=rest,
            columns=columns,
            label_names=label_names,
            label_columns=origin.columns,
            column_labels=origin.labels,
            timm_tag=pretrained,
            label_set=label_set,
            file=class_map,
        )
    else:
        leave_out_head("teacher", architecture, network, size)
    if head and mapping is None and label_names is None and not random_weights:
        notes.append(f"warning: the columns of {origin.name} have no names and are taken in the order of the classes")
    if fold:
        notes.append(f"teacher: {fold_batch_norms(architecture, network, size)} batch norms are folded")
    grid = dense_grid(architecture, network, size) if dense else None
    known = origin.preprocessing
    own_mean: Statistics = mean or known.mean or student.mean
    own_std: Statistics = std or known.std or student.std
    interpolation = "bilinear" if known.interpolation == "bilinear" else "bicubic"
    return FrozenTeacher(
        FusedHeads(network) if head and answers_apart(network) else network,
        student_mean=student.mean,
        student_std=student.std,
        mean=own_mean,
        std=own_std,
        image_size=size,
        interpolation=interpolation,
        grid=grid,
        dtype=dtype,
        channels_last=channels_last,
        compiled=compiled,
        class_map=mapping,
        specialty=specialty,
        notes=notes,
        facts={
            "name": architecture,
            "origin": origin.name,
            "licence": origin.licence,
            "args": arguments,
            "digest": None if random_weights else origin.digest,
            "image_size": size,
            "mean": list(own_mean),
            "std": list(own_std),
            "interpolation": interpolation,
            "class_map": None if mapping is None else mapping.record(own),
            **({} if specialty is None else {"specialist_of": list(own[:-1])}),
            **({} if head else {"head_left_out": columns}),
        },
    ).to(device)


def _origin(name: str | None, pretrained: bool, checkpoint: str | None, random_weights: bool) -> Origin:
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
        origin = open_origin("teacher.checkpoint", checkpoint)
        if origin.bits is not None:
            raise InputError(
                f"teacher.checkpoint: {checkpoint} answers through integers of {origin.bits} bits, and a teacher here "
                "does not; name the run that it began with"
            )
        return origin
    assert name is not None
    return open_published("teacher.pretrained", name) if pretrained else Origin("random weights", dict)


def _network(architecture: str, arguments: dict[str, Any], size: int, columns: int, origin: Origin | None) -> nn.Module:
    """Return the network in eval mode, with all weights of `origin`; without one, with random weights."""
    network = create_model(
        "teacher.name",
        architecture,
        image_size=size,
        distilled=origin is not None and origin.is_distilled,
        num_classes=columns,
        **arguments,
    )
    if origin is not None:
        fit_weights("teacher", network, origin.state, source=origin.name, strict=True)
        if origin.layer_norm_eps is not None:
            set_layer_norm_eps(network, origin.layer_norm_eps)
        refuse_other_twin("teacher.args", network, origin, architecture, arguments, size)
        if origin.answers_with_patches:
            answer_with_patches("teacher.checkpoint", network)
    return network.eval()


def _what_is(origin: Origin) -> str:
    if origin.record is not None:
        return f"{origin.name} is a {origin.architecture}"
    return f"the config.json of {origin.name} describes its network"


def _check_specialist(name: str, specialty: Specialty, is_member: bool, class_map: str | None) -> None:
    if not is_member:
        raise InputError(
            f"teacher.checkpoint: {name} is a specialist, which knows {len(specialty.labels)} of the "
            f"{specialty.classes} classes; name it in teacher.members, beside a teacher that knows them all"
        )
    if class_map is not None:
        raise InputError(
            f"teacher.class_map: {class_map}, but {name} is a specialist, whose classes are found by name; unset it"
        )


def _architecture(name: str | None, origin: Origin) -> str:
    """Return timm's name of the network, without a token that the weights do not have."""
    architecture = name or origin.architecture
    if architecture is None:
        raise InputError(f"teacher.name: is not set, and {origin.name} does not record it; name a timm model")
    return architecture if origin.is_distilled or not origin.state else plain_twin(architecture)


def _check_tag_has_head(name: str) -> None:
    """Refuse a pretrained tag that was published without a head, before it is downloaded."""
    check_known("teacher.name", name)
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.has_weights and not cfg.num_classes:
        raise InputError(
            f"teacher.pretrained: {name} was published without a head, so it has features to teach with but no logits; "
            "set teacher.head to false, and compare features (a guide or pooled term)"
        )


def _columns(architecture: str, origin: Origin, needs_head: bool) -> int:
    """Return how many outputs the head of the weights has; 0 if there is none and none is needed."""
    check_known("teacher.name", architecture)
    classifier = getattr(timm.get_pretrained_cfg(architecture), "classifier", None)
    heads = [f"{name}.weight" for name in ((classifier,) if isinstance(classifier, str) else classifier or ())]
    found = [origin.state[head].shape[0] for head in heads if head in origin.state and origin.state[head].ndim]
    if not found and not needs_head:
        return 0
    if not found:
        raise InputError(
            f"teacher: {origin.name} has no head ({', '.join(heads) or 'timm names none'}), and a teacher's head is "
            "never initialised at random; use weights that were trained to classify, or set its head to false and "
            "compare features"
        )
    return int(found[0])
