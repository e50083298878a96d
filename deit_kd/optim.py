"""timm's optimisers and its cosine schedule, as a pure function of the step."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from deit_kd.interfaces import InputError


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    lr_reference_batch: int,
    weight_decay: float,
    layer_decay: float | None = None,
    args: dict[str, Any],
    batch_size: int,
) -> torch.optim.Optimizer:
    """Return a timm optimiser; tokens, position embeddings, biases and norms are not decayed.

    Args:
        model: the timm model; its ``no_weight_decay`` is respected.
        name: timm's, e.g. ``adamw``.
        lr: for a batch of `lr_reference_batch`; scaled linearly with `batch_size` (Goyal et al. 2017).
        lr_reference_batch: images; 0 uses `lr` unchanged.
        weight_decay: of matrices.
        layer_decay: of the learning rate from each layer to the one below (BEiT, arXiv 2106.08254); the heads
            have `lr` itself. None gives all layers the same.
        args: passed to the optimiser (betas, eps, …).
        batch_size: images per optimiser step, over all processes.

    Raises:
        InputError: timm does not know the optimiser or an argument.
    """
    arguments = dict(args)
    if name in ("adam", "adamw", "sgd", "nesterov", "momentum"):
        arguments.setdefault("fused", True)
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=name,
            lr=scaled_lr(lr, lr_reference_batch, batch_size),
            weight_decay=weight_decay,
            layer_decay=layer_decay,
            **arguments,
        )
        if getattr(optimizer, "is_second_order", False):
            raise ValueError("it needs second derivatives, which a training step here does not compute")
        return optimizer
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or ["timm refuses it"])[0]
        raise InputError(
            f"optim.name: {name!r} with {args} cannot be built ({reason}); use adamw, sgd or lamb"
        ) from error


def scaled_lr(lr: float, lr_reference_batch: int, batch_size: int) -> float:
    """Return the learning rate of a batch: linear in its size (Goyal et al. 2017), or `lr` without a reference."""
    return lr * (batch_size / lr_reference_batch) if lr_reference_batch else lr


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    warmup_epochs: int,
    warmup_lr: float,
    min_lr: float,
    epochs: int,
    steps_per_epoch: int,
) -> Scheduler:
    """Return timm's cosine schedule with linear warm-up; ``schedule.step_update(step)`` sets the rate.

    Raises:
        InputError: the warm-up is as long as the run.
    """
    if warmup_epochs >= epochs:
        raise InputError(f"optim.warmup_epochs: {warmup_epochs} is not below train.epochs {epochs}; warm up for less")
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        warmup_epochs=warmup_epochs,
        warmup_lr=warmup_lr,
        min_lr=min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return schedule


class WeightAverage(ModelEmaV3):
    """timm's exponential moving average of a model, without the steps that the optimiser skipped.

    Its warm-up is the plain mean of all steps so far, until there are as many as the decay's `span`; from then on
    `decay` applies. (timm's own warm-up grows so slowly that the decay of a published recipe is never reached.)

    Args:
        model: what is averaged.
        decay: 0 to 1, of the average from one step to the next.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay=decay, use_warmup=True, warmup_gamma=1.0, warmup_power=1.0)

    @property
    def span(self) -> float:
        """How many steps it averages over, which is also the length of its warm-up: ``1 / (1 - decay)``."""
        return 1 / (1 - self.decay)

    @torch.no_grad()
    def follow(self, model: nn.Module, step: int, applied: Tensor) -> None:
        """Move towards `model` after its optimiser step `step` (from 1), on the device.

        Args:
            model: what is averaged.
            step: sets the decay, which is warmed up.
            applied: scalar, whether the step was applied.
        """
        weight = (1 - self.get_decay(step)) * applied.float()
        average, followed = self.module.state_dict().values(), model.state_dict().values()
        pairs = list(zip(average, followed, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in floats], [now for _, now in floats], [weight] * len(floats))
        for mean, now in pairs:
            if not mean.is_floating_point():
                mean.copy_(now)
