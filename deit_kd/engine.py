"""The step and the loop; parts are passed in, and no config is read here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deit_kd.distributed import Processes
from deit_kd.interfaces import Batch, Student, StudentOutput, Teacher
from deit_kd.losses import CheckedTerms, Objective, Terms
from deit_kd.optim import WeightAverage, by_dtype
from deit_kd.randomness import seed_step

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the autocast context of a precision: ``bf16``, ``fp16`` or ``off``."""
    dtype = AUTOCAST_DTYPES[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class Distiller:
    """Student, teacher and objective in one call: a batch in, the loss and its terms out.

    The student runs under autocast, the teacher without gradient, the losses in fp32. This class keeps the teacher out
    of optimisers, DDP wrappers and state dicts.

    Args:
        student: answers ``[B, 3, H, W]`` with a `StudentOutput`; may be wrapped in DDP or compiled.
        teacher: answers a `Batch` with a `TeacherOutput`; None only for an objective of kind ``none``.
        objective: weighs the terms.
        precision: ``bf16``, ``fp16`` or ``off``.
        compiled: whether to run the objective through ``torch.compile``; what it gets and returns stays the same.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        objective: Objective,
        precision: str = "off",
        compiled: bool = False,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.objective = objective
        self.precision = precision
        self.compiled = compiled
        self._judge = torch.compile(objective.checked) if compiled else objective.checked

    def __call__(self, batch: Batch, place: float = 0.0) -> Terms:
        """Return the mean loss and terms of `batch`; call ``.loss.backward()`` on the result.

        `place` is the share of the run that is done, for weights that have a schedule.
        """
        return self.checked(batch, place).terms

    def checked(self, batch: Batch, place: float = 0.0) -> CheckedTerms:
        """Return the mean loss and terms of `batch`, and what in it was not finite."""
        # The teacher first: what it needs for its answer is freed before the student keeps anything for its backward
        # pass, and what it reads from a disk is on its way to the device early.
        teacher_output = self.teacher(batch) if self.teacher is not None else None
        with autocast(batch.images.device, self.precision):
            student_output = ask(self.student, batch.images)
        return self._judge(student_output, teacher_output, batch.targets, place)


def ask(student: Student, images: Tensor) -> StudentOutput:
    """Return a student's answer to a batch that may be empty."""
    if len(images):
        return student(images)
    # Attention on CUDA rejects an empty batch, and DDP waits for a forward pass in every process.
    output = student(images.new_zeros(2, *images.shape[1:]))
    return output.mapped(lambda logits: logits[:0])._replace(
        features=None if output.features is None else {name: feature[:0] for name, feature in output.features.items()},
        dense_logits=None if output.dense_logits is None else output.dense_logits[:0],
    )


class StepResult(NamedTuple):
    """The result of one optimiser step of this process, still on its device, without a synchronisation."""

    terms: Tensor  # [5 + 2 * further terms], in fp32: `STEP_TERMS`, then each further term and its cosine
    is_finite: Tensor  # [views], of each view's loss, in the order of the micro-batches


# The loss and its terms before weighing, whether the step was left out (0 or 1), and how many answers of the teacher
# were not finite.
STEP_TERMS = ("loss", "classification", "distillation", "left_out", "teacher_not_finite")


@dataclass
class Trainer:
    """Everything that one optimiser step needs and changes.

    A step whose gradient is not finite is left out: weights, moments, average and buffers stay as they were. That
    is read from the norm of the reduced gradient, so all processes agree without communication, and it is applied on
    the device. Under fp16 the scaler then lowers its scale.

    Args:
        distiller: gives the loss.
        model: the network that learns, without wrappers.
        optimizer: over `model`'s parameters.
        schedule: sets the learning rate from the step.
        ema: average of `model`, or None.
        scaler: of fp16; disabled otherwise.
        processes: of the run.
        accumulation_steps: micro-batches per step.
        clip_grad_norm: largest gradient norm, over all parameters; None does not clip.
        seed: of the run.
        skip: whether batches may lack views; the mean is then over the views that all processes have.
        connectors: of compared features, trained with the model but not part of it; None if there are none.
        total_steps: of the run; the share of them that is done sets the weights of the terms.
        further_terms: kinds of the objective's further terms, in the order of a step's result.
    """

    distiller: Distiller
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    ema: WeightAverage | None
    scaler: torch.amp.GradScaler
    processes: Processes
    accumulation_steps: int
    clip_grad_norm: float | None
    seed: int
    skip: bool = False
    connectors: nn.Module | None = None
    total_steps: int = 1
    further_terms: tuple[str, ...] = ()
    _has_stepped: bool = field(default=False, init=False)

    def step(self, batches: Iterator[Batch], step: int) -> StepResult:
        """Do optimiser step `step` (from 0)."""
        self.schedule.step_update(step)
        buffers = _Buffers(self.model)
        terms = torch.zeros(len(STEP_TERMS) + 2 * len(self.further_terms), device=self.processes.device)
        is_finite = []
        views = places = 0
        for micro_step in range(self.accumulation_steps):
            batch = next(batches).to(self.processes.device)
            seed_step(self.seed, step, micro_step, self.processes.rank)
            with self._sync_only_at(micro_step == self.accumulation_steps - 1):
                checked = self.distiller.checked(batch, step / self.total_steps)
                # The mean over the views that exist becomes their share of the mean over all places.
                divisor = self.accumulation_steps * batch.places / max(1, len(batch.labels))
                self.scaler.scale(checked.terms.loss / divisor).backward()
            means = self._means(checked.terms) / divisor
            terms[:3] += means[:3]
            terms[len(STEP_TERMS) :] += means[3:]
            terms[4] += checked.teacher_not_finite
            is_finite.append(batch.at_places(checked.is_finite, True))
            views, places = views + len(batch.labels), places + batch.places
        if self.skip:
            factor = self._make_up(views, places)
            terms[:3] *= factor
            terms[len(STEP_TERMS) :] *= factor
        applied = self._apply()
        buffers.put_back_unless(applied)
        if self.ema is not None:
            self.ema.follow(self.model, step=step + 1, applied=applied)
        terms[3] = ~applied
        return StepResult(terms, torch.cat(is_finite))

    def _means(self, terms: Terms) -> Tensor:
        """Return the loss and its terms, then each further term and its cosine; 0 for a term that has ended."""
        nothing = torch.zeros_like(terms.loss)
        further = [values.get(kind, nothing) for kind in self.further_terms for values in (terms.others, terms.cosines)]
        return torch.stack([*terms[:3], *further]).detach()

    def _apply(self) -> Tensor:
        """Apply the gradients unless they are not finite; return whether they were applied, on the device."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(_gradients(self.model))
        applied = norm.isfinite()
        if self.connectors is not None:
            applied = applied & nn.utils.get_total_norm(_gradients(self.connectors)).isfinite()
        if self.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_grad_norm, norm)
        if self._has_stepped and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # What GradScaler passes to torch's fused optimisers: 1 skips the step without waiting for the device.
            self.optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif applied:  # Other optimisers wait for the device; torch's do so at their first step, since leaving it out
            self.optimizer.step()  # would start their momentum from uninitialised memory.
            self._has_stepped = True
        self.scaler.update()
        self.optimizer.zero_grad()
        return applied

    def _make_up(self, views: int, places: int) -> Tensor:
        """Turn gradients of a mean over all places into those over the existing views; return the factor."""
        if self.processes.count == 1 and views == places:
            return torch.ones((), device=self.processes.device)
        # Counts of all processes stay on the device, so nothing waits for them.
        known = self.processes.sum(torch.tensor([views], device=self.processes.device, dtype=torch.float32))[0]
        factor = places * self.processes.count / known.clamp_min(1)
        torch._foreach_mul_(_gradients(self.model), factor)
        if self.connectors is not None and (connectors := _gradients(self.connectors)):
            torch._foreach_mul_(connectors, factor)
        return factor

    def _sync_only_at(self, last: bool) -> AbstractContextManager[Any]:
        student = self.distiller.student
        return student.no_sync() if isinstance(student, DistributedDataParallel) and not last else nullcontext()

    def weights(self) -> dict[str, Any]:
        """Return the networks that are scored: ``model`` and, if one is kept, its average ``ema``."""
        return {"model": self.model} | ({} if self.ema is None else {"ema": self.ema.module})

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; it does not include the teacher."""
        connectors = {} if self.connectors is None else {"connectors": self.connectors.state_dict()}
        return connectors | {
            "student": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
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
        self.scaler.load_state_dict(state["scaler"])

    def align_buffers(self) -> None:
        """Give every process the main one's BatchNorm statistics, which drift apart under DDP within a step."""
        self.processes.broadcast(self.model.buffers())
        if self.ema is not None:
            self.processes.broadcast(self.ema.module.buffers())


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


def train(
    trainer: Trainer,
    batches: Iterable[Batch],
    *,
    first_step: int,
    total_steps: int,
    after_step: Callable[[int, StepResult], None],
) -> None:
    """Train from `first_step` to the end; `after_step(steps_done, result)` is called after every step."""
    trainer.model.train()
    stream = iter(batches)
    for step in range(first_step, total_steps):
        after_step(step + 1, trainer.step(stream, step))
