"""timm's optimisers and its cosine schedule, as a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterable
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
        weight = 1 - self.get_decay(step)
        averaged, current = _states(self.module), _states(model)
        for means, now in zip(by_dtype(averaged), by_dtype(current), strict=True):
            if not means[0].is_floating_point():
                torch._foreach_copy_(means, now)
            elif weight < 0.5 and all(map(_lie_alike, means, now)):
                _step_towards(now, means, weight, applied)
            else:  # in the first two steps of the warm-up
                torch._foreach_lerp_(means, now, [weight * applied.float()] * len(means))


def by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return `tensors` apart by their dtypes, in order: what one foreach operation takes."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _states(model: nn.Module) -> Iterable[Tensor]:
    return model.state_dict(keep_vars=True).values()  # without keep_vars, each tensor is detached


def _lie_alike(mean: Tensor, now: Tensor) -> bool:
    """Return whether both fill their memory without gaps in the same order, which fused optimisers rely on."""
    fills = mean.is_contiguous() or mean.is_contiguous(memory_format=torch.channels_last)
    return fills and mean.stride() == now.stride()


def _step_towards(now: list[Tensor], means: list[Tensor], weight: float, applied: Tensor) -> None:
    """Do ``means += weight * (now - means)`` in one pass if `applied`, bit for bit as ``lerp_`` does it below 1/2.

    ``torch._foreach_lerp_`` either takes a number, which `applied` is not before the device has computed it, or it
    launches a kernel for each tensor. This is a step of SGD with the gradient ``-now`` and a weight decay of 1:
    torch's fused optimisers read from the device whether to leave out a step.
    """
    torch._fused_sgd_(
        means,
        now,
        [],
        lr=weight,
        weight_decay=1.0,
        maximize=True,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        is_first_step=False,
        found_inf=(~applied).float(),
    )
