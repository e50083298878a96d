"""One network that learns: its optimiser, its schedule and its average, and what one step does to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from deit_kd.distributed import Processes
from deit_kd.optim import WeightAverage, by_dtype


@dataclass
class Learner:
    """A network that learns.

    Args:
        model: the network, without wrappers.
        optimizer: over `model`'s parameters.
        schedule: sets the learning rate from the step.
        ema: average of `model`, or None.
        clip_grad_norm: largest gradient norm, over all parameters; None does not clip.
        connectors: of compared features, trained with the model but not part of it; None if there are none.
        further_terms: kinds of its objective's further terms, in the order of a step's result.
        name: of a peer; empty for the student.
        always_steps: whether to apply gradients that are not finite as well, as other loops do: for comparisons.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    ema: WeightAverage | None
    clip_grad_norm: float | None
    connectors: nn.Module | None = None
    further_terms: tuple[str, ...] = ()
    name: str = ""
    always_steps: bool = False
    _has_stepped: bool = field(default=False, init=False)
    _buffers: _Buffers = field(init=False, repr=False)  # within a step
    _norm: Tensor = field(init=False, repr=False)

    def begin(self, step: int) -> None:
        """Set the learning rate of optimiser step `step` (from 0), and remember the buffers as they are."""
        self.schedule.step_update(step)
        self._buffers = _Buffers(self.model)

    def measure(self, scaler: torch.amp.GradScaler) -> Tensor:
        """Bring the gradients to their real size; return whether all of them are finite, on the device."""
        scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(_gradients(self.model))
        finite = norm.isfinite()
        if self.connectors is not None:
            finite = finite & nn.utils.get_total_norm(_gradients(self.connectors)).isfinite()
        self._norm = norm
        return finite

    def apply(self, applied: Tensor) -> None:
        """Apply the measured gradients if the scalar `applied` is true."""
        if self.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_grad_norm, self._norm)
        if self.always_steps:
            self.optimizer.step()
        elif self._has_stepped and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # What GradScaler passes to torch's fused optimisers: 1 skips the step without waiting for the device.
            self.optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif applied:  # Other optimisers wait for the device; torch's do so at their first step, since leaving it out
            self.optimizer.step()  # would start their momentum from uninitialised memory.
            self._has_stepped = True
        self.optimizer.zero_grad()

    def end(self, step: int, applied: Tensor) -> None:
        """Move the average, or undo what a step that was not applied did to the buffers; keep nothing of the step."""
        self._buffers.put_back_unless(applied)
        del self._buffers, self._norm
        if self.ema is not None:
            self.ema.follow(self.model, step=step + 1, applied=applied)

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all gradients by a scalar."""
        torch._foreach_mul_(_gradients(self.model), factor)
        if self.connectors is not None and (connectors := _gradients(self.connectors)):
            torch._foreach_mul_(connectors, factor)

    def weights(self) -> dict[str, Any]:
        """Return the networks that are scored: ``model`` and, if one is kept, its average ``ema``."""
        prefix = f"{self.name}/" if self.name else ""
        average = {} if self.ema is None else {f"{prefix}ema": self.ema.module}
        return {f"{prefix}model": self.model} | average

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        connectors = {} if self.connectors is None else {"connectors": self.connectors.state_dict()}
        return connectors | {
            "student": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state()` returned."""
        self.model.load_state_dict(state["student"])
        if self.connectors is not None:
            self.connectors.load_state_dict(state["connectors"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._has_stepped = bool(self.optimizer.state)
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    # Fused optimisers walk memory in order: moments need the memory layout of their parameter.
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def align_buffers(self, processes: Processes) -> None:
        """Give every process the main one's BatchNorm statistics, which drift apart under DDP within a step."""
        processes.broadcast(self.model.buffers())
        if self.ema is not None:
            processes.broadcast(self.ema.module.buffers())


class _Buffers:
    """A network's buffers (BatchNorm statistics) as they are now, one tensor for each dtype; nothing if it has none."""

    def __init__(self, model: nn.Module) -> None:
        self._groups = by_dtype(model.buffers())
        self._before = [_flat(group) for group in self._groups]

    @torch.no_grad()
    def put_back_unless(self, applied: Tensor) -> None:
        """Undo what has changed since, unless the scalar `applied` is true; without waiting for the device."""
        for group, before in zip(self._groups, self._before, strict=True):
            chosen = torch.where(applied, _flat(group), before).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(chosen, group, strict=True)])


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
