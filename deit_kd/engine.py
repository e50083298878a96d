"""The step, the loop and the evaluation; parts are handed in, and no config is ever read here."""

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
from deit_kd.interfaces import Batch, InputError, Student, StudentOutput, Teacher, head_log_probabilities
from deit_kd.losses import CheckedTerms, Objective, Terms
from deit_kd.metrics import Answered, agreement, answered, joined, score
from deit_kd.optim import WeightAverage
from deit_kd.randomness import seed_step

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the autocast context of a precision: ``bf16``, ``fp16`` or ``off``."""
    dtype = AUTOCAST_DTYPES[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class Distiller:
    """Student, teacher and objective in one call: a batch in, the loss and its terms out.

    The student runs under autocast, the teacher without gradient, the losses in fp32. Nothing of the teacher
    reaches an optimiser, a DDP wrapper or a state dict through this class.

    Args:
        student: answers ``[B, 3, H, W]`` with a `StudentOutput`; may be wrapped in DDP or compiled.
        teacher: answers a `Batch` with a `TeacherOutput`; None only for an objective of kind ``none``.
        objective: weighs the terms.
        precision: ``bf16``, ``fp16`` or ``off``.
    """

    def __init__(self, student: Student, teacher: Teacher | None, objective: Objective, precision: str = "off") -> None:
        self.student = student
        self.teacher = teacher
        self.objective = objective
        self.precision = precision

    def __call__(self, batch: Batch, place: float = 0.0) -> Terms:
        """Return the mean loss and terms of `batch`; call ``.loss.backward()`` on the result.

        `place` is the share of the run that is done, for weights that have a schedule.
        """
        return self.checked(batch, place).terms

    def checked(self, batch: Batch, place: float = 0.0) -> CheckedTerms:
        """Return the mean loss and terms of `batch`, and what in it was not finite."""
        with autocast(batch.images.device, self.precision):
            student_output = _ask(self.student, batch.images)
        teacher_output = self.teacher(batch) if self.teacher is not None else None
        return self.objective.checked(student_output, teacher_output, batch.targets, place)


def _ask(student: Student, images: Tensor) -> StudentOutput:
    """Return what a student answers, of a batch that may be empty."""
    if len(images):
        return student(images)
    # Attention on CUDA refuses an empty batch, and DDP waits for an answer of every process.
    cls_logits, dist_logits, features = student(images.new_zeros(2, *images.shape[1:]))
    return StudentOutput(
        cls_logits[:0],
        None if dist_logits is None else dist_logits[:0],
        None if features is None else {name: feature[:0] for name, feature in features.items()},
    )


class StepResult(NamedTuple):
    """What one optimiser step of this process gave, on its device; nobody has waited for it yet."""

    terms: Tensor  # [5 + 2 * further terms], in fp32: `STEP_TERMS`, then each further term and its cosine
    is_finite: Tensor  # [views], of each view's loss, in the order of the micro-batches


# The loss and its terms before weighing, whether the step was left out (0 or 1), and how many answers of the teacher
# were not finite.
STEP_TERMS = ("loss", "classification", "distillation", "left_out", "teacher_not_finite")


@dataclass
class Trainer:
    """All that one optimiser step needs and changes.

    A step whose gradient is not finite is left out: weights, moments, average and buffers stay as they were. That
    is read from the norm of the reduced gradient, so all processes agree without talking, and it is applied on the
    device. Under fp16 the scaler then lowers its scale.

    Args:
        distiller: gives the loss.
        model: the network that learns, without any wrapper.
        optimizer: over `model`'s parameters.
        schedule: sets the learning rate from the step.
        ema: average of `model`, or None.
        scaler: of fp16; disabled otherwise.
        processes: of the run.
        accumulation_steps: micro-batches a step.
        clip_grad_norm: largest gradient norm, over all parameters; None does not clip.
        seed: of the run.
        skip: whether batches may lack views; the mean is then over the views that all processes have.
        connectors: of compared features, which learn with the model and are no part of it; None where there are none.
        total_steps: of the run, whose share that is done sets the weights of the terms.
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
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        terms = torch.zeros(len(STEP_TERMS) + 2 * len(self.further_terms), device=self.processes.device)
        is_finite = []
        views = places = 0
        for micro_step in range(self.accumulation_steps):
            batch = next(batches).to(self.processes.device)
            seed_step(self.seed, step, micro_step, self.processes.rank)
            with self._sync_only_at(micro_step == self.accumulation_steps - 1):
                checked = self.distiller.checked(batch, step / self.total_steps)
                # The mean over the views there are becomes their share of the mean over all places.
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
        for buffer, before in buffers:
            buffer.copy_(torch.where(applied, buffer, before))
        if self.ema is not None:
            self.ema.follow(self.model, step=step + 1, applied=applied)
        terms[3] = ~applied
        return StepResult(terms, torch.cat(is_finite))

    def _means(self, terms: Terms) -> Tensor:
        """Return the loss and its terms, then each further term and its cosine; 0 where a term is over."""
        nothing = torch.zeros_like(terms.loss)
        further = [values.get(kind, nothing) for kind in self.further_terms for values in (terms.others, terms.cosines)]
        return torch.stack([*terms[:3], *further]).detach()

    def _apply(self) -> Tensor:
        """Let the optimiser use the gradients, unless they are not finite; return whether it did, on the device."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(_gradients(self.model))
        applied = norm.isfinite()
        if self.connectors is not None:
            applied = applied & nn.utils.get_total_norm(_gradients(self.connectors)).isfinite()
        if self.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_grad_norm, norm)
        if self._has_stepped and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # What GradScaler hands to torch's fused optimisers: 1 leaves the step out without waiting for the device.
            self.optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif applied:  # The other optimisers wait for the device, and torch's at their first step, whose momentum they
            self.optimizer.step()  # would begin in memory that a step left out does not fill.
            self._has_stepped = True
        self.scaler.update()
        self.optimizer.zero_grad()
        return applied

    def _make_up(self, views: int, places: int) -> Tensor:
        """Turn gradients of a mean over all places into those over the views there are; return the factor."""
        if self.processes.count == 1 and views == places:
            return torch.ones((), device=self.processes.device)
        # Counts of all processes stay on the device: nobody waits to read them.
        known = self.processes.sum(torch.tensor([views], device=self.processes.device, dtype=torch.float32))[0]
        factor = places * self.processes.count / known.clamp_min(1)
        torch._foreach_mul_(_gradients(self.model), factor)
        if self.connectors is not None and (connectors := _gradients(self.connectors)):
            torch._foreach_mul_(connectors, factor)
        return factor

    def _sync_only_at(self, last: bool) -> AbstractContextManager[Any]:
        student = self.distiller.student
        return student.no_sync() if isinstance(student, DistributedDataParallel) and not last else nullcontext()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; the teacher is not among it."""
        connectors = {} if self.connectors is None else {"connectors": self.connectors.state_dict()}
        return connectors | {
            "student": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that `state()` gave."""
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
                    # Fused optimisers walk memory in order: moments must lie as their parameter does.
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self.scaler.load_state_dict(state["scaler"])

    def align_buffers(self) -> None:
        """Give every process the main one's BatchNorm statistics, which DDP lets drift within a step."""
        self.processes.broadcast(self.model.buffers())
        if self.ema is not None:
            self.processes.broadcast(self.ema.module.buffers())


def _gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


@torch.inference_mode()
def evaluate(
    models: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    classes: int,
    total: int,
    processes: Processes,
    precision: str,
    fusion: str,
    teacher_predictions: Tensor | None = None,
) -> dict[str, dict[str, Any]]:
    """Score each model's heads over this process's share of a split, and sum over processes.

    Args:
        models: students by name, e.g. the model and its average; every one sees each batch once.
        batches: this process's share.
        classes: C.
        total: images of the whole split, of which those that are missing in `batches` do not count.
        processes: of the run.
        precision: of autocast.
        fusion: ``softmax`` or ``logits``, see `head_log_probabilities`.
        teacher_predictions: [share], the teacher's classes in the order of `batches`; -1 where it has none.

    Returns:
        By model: ``{"n": …, "heads": {"cls": {"top1", "top5", "nll"}, "dist": …, "fused": …}, "agreement": …}``, with
        None for heads that are not there; n images were seen.

    Raises:
        InputError: no image can be read.
    """
    tables: dict[str, list[dict[str, Answered]]] = {name: [] for name in models}
    taught: list[Tensor] = []
    was_training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    seen = lacking = 0
    for batch in batches:
        batch = batch.to(processes.device)
        places = slice(seen, seen + batch.places)
        seen, lacking = seen + batch.places, lacking + len(batch.missing)
        for name, model in models.items():
            with autocast(processes.device, precision):
                output = _ask(model, batch.images)
            heads = head_log_probabilities(output, fusion)
            tables[name].append({head: answered(values, batch.labels) for head, values in heads.items()})
        if teacher_predictions is not None:
            of_batch = teacher_predictions[places]
            taught.append(of_batch[batch.rows()] if batch.missing else of_batch)
    for name, model in models.items():
        model.train(was_training[name])
    total = _readable(total, lacking, processes)
    teacher = {"teacher": torch.cat(taught)} if taught else {}
    return {name: _scored(table, teacher, classes, total, processes) for name, table in tables.items()}


def _scored(
    batches: list[dict[str, Answered]], teacher: dict[str, Tensor], classes: int, total: int, processes: Processes
) -> dict[str, Any]:
    """Return what `evaluate` returns of one model, from its rows by batch and head."""
    rows = {head: joined(batch[head] for batch in batches) for head in batches[0]}
    return {
        "n": total,
        "heads": {
            head: score(rows[head], classes, total, processes) if head in rows else None
            for head in ("cls", "dist", "fused")
        },
        "agreement": agreement({head: of_head.predicted for head, of_head in rows.items()} | teacher, total, processes),
    }


def _readable(total: int, lacking: int, processes: Processes) -> int:
    """Return how many of `total` images are there, of which this process lacks some; wait for slower ones first."""
    processes.wait()
    total -= int(processes.sum(torch.tensor(lacking, device=processes.device)))
    if not total:
        raise InputError("data.root: not one image can be read; see deit-kd data check")
    return total


class Answers(NamedTuple):
    """What a student and perhaps a teacher said about images, on the CPU in fp32."""

    indices: Tensor  # [n], of the images in their split
    labels: Tensor  # [n]
    output: StudentOutput  # logits [n, C]
    teacher_predictions: Tensor | None  # [n]
    teacher_logits: Tensor | None  # [n, C]; None also where only the teacher's classes are known


@torch.inference_mode()
def collect(
    student: nn.Module,
    teacher: Teacher | None,
    batches: Iterable[Batch],
    *,
    classes: int,
    processes: Processes,
    precision: str,
) -> Answers:
    """Ask a student in eval, and perhaps a teacher, about every image; return the answers of all processes.

    Args:
        student: answers images with a `StudentOutput`.
        teacher: answers a `Batch`, or None.
        batches: this process's share of the split: of P processes, r has the images r, r + P, r + 2P, …
        classes: C.
        processes: of the run.
        precision: of autocast.

    Returns:
        The answers in the order of the split, the same for any number of processes.
    """
    student.eval()
    rows: list[tuple[Tensor, ...]] = []
    seen = 0
    for batch in batches:
        indices = processes.rank + processes.count * (seen + batch.rows())
        seen += batch.places
        if not len(indices):
            continue
        batch = batch.to(processes.device)
        with autocast(processes.device, precision):
            output = student(batch.images)
        logits = [output.cls_logits, output.dist_logits, None if teacher is None else teacher(batch).logits]
        none = torch.empty(len(indices), 0)
        rows.append((indices, batch.labels.cpu(), *(none if x is None else x.float().cpu() for x in logits)))
    rows = [row for share in processes.gather(rows) for row in share]
    if not rows:
        empty = torch.empty(0, dtype=torch.long)
        return Answers(empty, empty, StudentOutput(torch.empty(0, classes)), None, None)
    indices, labels, cls, dist, taught = (torch.cat(column) for column in zip(*rows, strict=True))
    order = indices.argsort()
    teacher_logits = taught[order] if taught.shape[1] else None
    return Answers(
        indices[order],
        labels[order],
        StudentOutput(cls[order], dist[order] if dist.shape[1] else None),
        None if teacher_logits is None else teacher_logits.argmax(-1),
        teacher_logits,
    )


@torch.inference_mode()
def score_teacher(
    teacher: Teacher, batches: Iterable[Batch], *, classes: int, total: int, processes: Processes
) -> tuple[dict[str, float | None], Tensor]:
    """Score a teacher over a split, as `evaluate` does.

    Returns:
        ``{"top1", "top5", "nll"}`` over all processes, and the predictions [share] of this process; -1 for images
        that are missing.
    """
    rows: list[Answered] = []
    predictions = []
    lacking = 0
    for batch in batches:
        batch = batch.to(processes.device)
        rows.append(answered(teacher(batch).needed_logits().float().log_softmax(-1), batch.labels))
        predictions.append(batch.at_places(rows[-1].predicted, -1))
        lacking += len(batch.missing)
    total = _readable(total, lacking, processes)
    return score(joined(rows), classes, total, processes), torch.cat(predictions)


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
