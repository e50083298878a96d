"""Builds, from the sections of a config, the parts that several jobs share."""

from __future__ import annotations

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn

from deit_kd import losses
from deit_kd.config import (
    Config,
    Guide,
    SoleTeacher,
    TeacherNetwork,
    TeacherSection,
    TermSection,
    as_schedule,
    keys_of,
)
from deit_kd.distributed import Processes
from deit_kd.engine import AUTOCAST_DTYPES
from deit_kd.interfaces import DENSE, FEATURE_KINDS, MAP_KINDS, InputError
from deit_kd.losses import (
    LEAST_STANDARDISED,
    PEERS,
    DenseTerm,
    FeatureTerm,
    LogitTerm,
    Objective,
    Shapes,
    Term,
    map_links,
    pooled_links,
)
from deit_kd.models.create import chosen_attention
from deit_kd.optim import build_optimizer, scaled_lr
from deit_kd.optim import build_schedule as build_cosine_schedule
from deit_kd.students import Connectors, TimmStudent
from deit_kd.students import build_student as build_timm_student
from deit_kd.teachers import EnsembleTeacher, FrozenTeacher, NetworkTeacher
from deit_kd.teachers import build_teacher as build_frozen_teacher


def check_batch_norms(config: Config, student: TimmStudent, processes: Processes) -> None:
    """Refuse batches of one view for a student that normalises vectors over a batch (the heads of LeViT, RepViT)."""
    views = config.train.batch_size // (processes.count * config.train.accumulation_steps)
    if views < 2 and any(isinstance(module, nn.BatchNorm1d) for module in student.modules()):
        raise InputError(
            f"train.batch_size: {config.train.batch_size} leaves one view for each process and micro-step, over which "
            f"{config.student.name}'s BatchNorm cannot normalise; use at least {2 * config.train.batch_size}"
        )


def build_student_optimizer(config: Config, student: TimmStudent) -> torch.optim.Optimizer:
    """Return the recipe's optimiser of a student."""
    optim = config.optim
    return build_optimizer(
        student.backbone,
        name=optim.name,
        lr=optim.lr,
        lr_reference_batch=optim.lr_reference_batch,
        weight_decay=optim.weight_decay,
        layer_decay=optim.layer_decay,
        args=optim.args,
        batch_size=config.train.batch_size,
    )


def add_connectors(config: Config, optimizer: torch.optim.Optimizer, connectors: Connectors) -> None:
    """Let the recipe's optimiser train `connectors` as well, in a group of their own."""
    optim = config.optim
    lr = scaled_lr(optim.lr, optim.lr_reference_batch, config.train.batch_size)
    optimizer.add_param_group(
        {"params": list(connectors.parameters()), "lr": lr, "initial_lr": lr, "weight_decay": optim.weight_decay}
    )


def build_schedule(config: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """Return the recipe's schedule of the learning rate."""
    return build_cosine_schedule(
        optimizer,
        warmup_epochs=config.optim.warmup_epochs,
        warmup_lr=config.optim.warmup_lr,
        min_lr=config.optim.min_lr,
        epochs=config.train.epochs,
        steps_per_epoch=steps_per_epoch,
    )


def build_objective(config: Config, student: Shapes, teacher: Shapes) -> Objective:
    """Return the recipe's objective.

    Args:
        config: the recipe.
        student: the shapes of the features that it can answer with, by name.
        teacher: the same; both are read only if the recipe compares features.

    Raises:
        InputError: features do not exist, or cannot be compared.
    """
    section = config.distill
    temperature = None if section.temperature is None else as_schedule(section.temperature)
    # A feature term that never counts has no shapes to be built for.
    acting = [term for term in section.terms if term.compares_features or term.kind not in FEATURE_KINDS]
    terms = [_build_term(term, student, teacher) for term in acting]
    if config.learns_from_peers:
        terms.append(LogitTerm(PEERS, as_schedule(section.peer_weight), as_schedule(section.peer_temperature)))
    return Objective(section.kind, as_schedule(section.alpha), temperature, section.scale, terms)


def check_taught(config: Config, classes: int) -> None:
    """Refuse a recipe that teaches nothing in a part of its run; the objective is known only once there is a teacher.

    Raises:
        InputError: see `deit_kd.losses.check_taught`; or it standardises the logits of two `classes`.
    """
    section = config.distill
    acting = {term.kind for term in section.terms if not as_schedule(term.weight).is_always(0)}
    if classes < LEAST_STANDARDISED and "standardised" in {section.kind, *acting}:
        key = "distill.kind" if section.kind == "standardised" else "distill.terms"
        raise InputError(
            f"{key}: standardised logits of {classes} classes are 1 and -1, whatever the logits, so nothing is learned "
            "from them; use soft or hard"
        )
    weights = [as_schedule(term.weight) for term in section.terms]
    weights += [as_schedule(section.peer_weight)] * config.learns_from_peers
    losses.check_taught(section.kind, as_schedule(section.alpha), weights)


def _build_term(section: TermSection, student: Shapes, teacher: Shapes) -> Term:
    weight = as_schedule(section.weight)
    if section.kind == "pooled":
        return FeatureTerm("pooled", weight, pooled_links(student, teacher), loss=section.loss)
    temperature = None if section.temperature is None else as_schedule(section.temperature)
    if section.kind == DENSE:
        return DenseTerm(weight, section.mode, as_schedule(section.mix), temperature)
    if section.kind in MAP_KINDS:
        links = map_links(
            section.kind, student, teacher, blocks=section.blocks, stages=section.stages, grid=section.grid
        )
        return FeatureTerm(section.kind, weight, links, section.normalise, section.grid, temperature=temperature)
    return LogitTerm(section.kind, weight, temperature)


def with_attention(config: Config, choice: str) -> Config:
    """Return the recipe with another attention: ``auto``, ``fused`` or ``plain``."""
    return config.with_keys(train={"attention": choice})


def build_student(
    config: Config,
    classes: tuple[str, ...],
    device: torch.device,
    checkpoint: str | None = None,
    strict: bool = False,
    seed: int | None = None,
) -> TimmStudent:
    """Return the recipe's student, on `device`, with its first weights or, if `strict`, with all of its own.

    `checkpoint` is where these are, unless the recipe's section names them; `seed` draws new ones, None for the
    recipe's.
    """
    section = config.student
    with chosen_attention(config.train.attention, device):
        return build_timm_student(
            name=section.name,
            pretrained=section.pretrained and checkpoint is None,
            checkpoint=checkpoint or section.checkpoint,
            args=section.args,
            drop_path=section.drop_path,
            classes=classes,
            image_size=config.data.image_size,
            distilled=config.has_token,
            or_one_head=bool(config.peers),
            patches=config.distill.dense is not None,
            token=section.token,
            new_heads=section.new_heads,
            freeze=section.freeze,
            channels_last=section.channels_last,
            strict=strict,
            bits=section.bits,
            seed=config.seed if seed is None else seed,
        ).to(device)


def has_random_weights(section: TeacherSection | Guide) -> bool:
    """Return whether any network of a recipe's teacher has random weights."""
    members = section.members if isinstance(section, TeacherSection) else []
    return section.random_weights or any(member.random_weights for member in members)


def teacher_precision(config: Config) -> str:
    """Return the precision of the teacher's weights."""
    return config.train.precision if config.teacher.precision == "auto" else config.teacher.precision


def build_teacher(
    config: Config, classes: tuple[str, ...], processes: Processes, checkpoint: str | None, dense: bool = False
) -> NetworkTeacher:
    """Return the recipe's teacher or teachers.

    Args:
        config: the recipe.
        classes: the dataset's.
        processes: of the job.
        checkpoint: the weights of a single teacher, if it has any.
        dense: whether it must be able to answer at each place.

    Raises:
        InputError: it cannot be built.
    """
    section = config.teacher
    if section.members:
        return EnsembleTeacher(
            [
                _build_network(config, member, classes, processes, member.checkpoint, dense, is_member=True)
                for member in section.members
            ],
            [member.weight for member in section.members],
            section.combine,
            config.seed,
        )
    with keys_of(section.role):
        return _build_network(config, section, classes, processes, checkpoint, dense)


def _build_network(
    config: Config,
    network: TeacherNetwork,
    classes: tuple[str, ...],
    processes: Processes,
    checkpoint: str | None,
    dense: bool,
    is_member: bool = False,
) -> FrozenTeacher:
    section = config.teacher
    with chosen_attention(config.train.attention, processes.device):
        return build_frozen_teacher(
            name=network.name,
            # A fitted teacher starts from timm's weights, and its checkpoint holds the fitted ones.
            pretrained=network.pretrained and not section.fit.epochs,
            checkpoint=checkpoint,
            random_weights=network.random_weights,
            head=not isinstance(network, SoleTeacher) or network.head,
            label_set=network.label_set,
            class_map=network.class_map,
            args=network.args,
            image_size=network.image_size,
            mean=network.mean,
            std=network.std,
            channels_last=section.channels_last is not False,
            fold=section.fold,
            dense=dense,
            compiled=section.compile,
            classes=classes,
            rest=config.data.rest,
            is_member=is_member,
            student=config.data.preprocessing,
            seed=config.seed,
            dtype=AUTOCAST_DTYPES[teacher_precision(config)] or torch.float32,
            device=processes.device,
        )
