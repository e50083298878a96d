"""The step and the loop; parts are passed in, and no config is read here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deit_kd.distributed import Processes
from deit_kd.interfaces import Batch, Student, StudentOutput, Teacher
from deit_kd.learner import Learner
from deit_kd.losses import CheckedTerms, Objective, Terms
from deit_kd.randomness import seed_step

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the autocast context of a precision: ``bf16``, ``fp16`` or ``off``."""
    dtype = AUTOCAST_DTYPES[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def casts_kept(device: torch.device, micro_steps: int) -> AbstractContextManager[Any]:
    """Let every autocast within cast a weight only once: PyTorch forgets the casts when the outermost one ends.

    With one micro-step each weight is cast once anyway, and its cast is freed before all gradients are there.
    """
    return nullcontext() if micro_steps == 1 else torch.autocast(device.type, enabled=False)


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
        self.judge = torch.compile(objective.checked) if compiled else objective.checked

    def __call__(self, batch: Batch, place: float = 0.0) -> Terms:
        """Return the mean loss and terms of `batch`; call ``.loss.backward()`` on the result.

        `place` is the share of the run that is done, for weights that have a schedule.
        """
        return self.checked(batch, place).terms

    def checked(self, batch: Batch, place: float = 0.0) -> CheckedTerms:
        """Return the mean loss and terms of `batch`, and what in it was not finite."""
        return self.everyone(batch, place)[0]

    def everyone(
        self, batch: Batch, place: float = 0.0, seed: Callable[[int], None] = lambda peer: None
    ) -> tuple[CheckedTerms, ...]:
        """Return what `checked` does, for each network that learns: the student, then its peers if it has any.

        `seed` is called with the number of each peer, from 1, before its forward pass.
        """
        # The teacher first: what it needs for its answer is freed before the student keeps anything for its backward
        # pass, and what it reads from a disk is on its way to the device early.
        teacher_output = self.teacher(batch) if self.teacher is not None else None
        return (self.judge(self.answer(batch), teacher_output, batch.targets, place),)

    def answer(self, batch: Batch) -> StudentOutput:
        """Return the student's answer to `batch`."""
        is_alone = len(batch.images) == 1 and bool(batch.missing)
        norms = _norms_kept(self.student) if is_alone else nullcontext()
        with autocast(batch.images.device, self.precision), norms:
            return ask(self.student, batch.images)

    @property
    def members(self) -> Sequence[Distiller]:
        """Itself, and then the distillers of the student's peers if it has any."""
        return (self,)


@contextmanager
def _norms_kept(student: Any) -> Iterator[None]:
    """Let each BatchNorm normalise by its running statistics meanwhile: one view that is left has no spread."""
    parts = student.modules() if isinstance(student, nn.Module) else ()
    norms = [part for part in parts if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def ask(student: Student, images: Tensor) -> StudentOutput:
    """Return a student's answer to a batch that may be empty."""
    if len(images):
        return _ask(student, images)
    # Attention on CUDA rejects an empty batch, and DDP waits for a forward pass in every process.
    output = _ask(student, images.new_zeros(2, *images.shape[1:]))
    return output.mapped(lambda logits: logits[:0])._replace(
        features=None if output.features is None else {name: feature[:0] for name, feature in output.features.items()},
        dense_logits=None if output.dense_logits is None else output.dense_logits[:0],
    )


def _ask(student: Student, images: Tensor) -> StudentOutput:
    # Drawn here, since what DDP wraps may be compiled; a compiled network still has its attributes.
    network: Any = student.module if isinstance(student, DistributedDataParallel) else student
    draw = getattr(network, "draw_paths", None)
    paths = None if draw is None else draw(len(images))
    answer: Callable[..., StudentOutput] = student
    return answer(images) if paths is None else answer(images, paths=paths)


class StepResult(NamedTuple):
    """The result of one optimiser step of this process, still on its device, without a synchronisation."""

    # In fp32: `STEP_TERMS`, then each further term and its cosine; then, of each peer, its loss, its terms before
    # weighing, and each further term and its cosine.
    terms: Tensor
    is_finite: Tensor  # [views], of each view's losses, in the order of the micro-batches


# The loss and its terms before weighing, whether the step was left out (0 or 1), and how many answers of the teacher
# were not finite.
STEP_TERMS = ("loss", "classification", "distillation", "left_out", "teacher_not_finite")


def result_columns(further_terms: Sequence[Sequence[str]]) -> int:
    """Return how many numbers the terms of a step's result are, from each learner's further terms."""
    return len(STEP_TERMS) - 3 + sum(3 + 2 * len(kinds) for kinds in further_terms)


@dataclass
class Trainer:
    """Everything that one optimiser step needs and changes.

    A step whose gradient is not finite is left out: weights, moments, average and buffers stay as they were. That
    is read from the norm of the reduced gradient, so all processes agree without communication, and it is applied on
    the device. Under fp16 the scaler then lowers its scale.

    The student's peers step with it: if one gradient is not finite, the step is left out for all. Each is clipped by
    itself.

    Args:
        distiller: gives the losses.
        learners: the student and then its peers, in the order of the distiller's.
        scaler: of fp16; disabled otherwise.
        processes: of the run.
        accumulation_steps: micro-batches per step.
        seed: of the run.
        skip: whether batches may lack views; the mean is then over the views that all processes have.
        total_steps: of the run; the share of them that is done sets the weights of the terms.
    """

    distiller: Distiller
    learners: tuple[Learner, ...]
    scaler: torch.amp.GradScaler
    processes: Processes
    accumulation_steps: int
    seed: int
    skip: bool = False
    total_steps: int = 1

    @property
    def student(self) -> Learner:
        """The first of those that learn."""
        return self.learners[0]

    def step(self, batches: Iterator[Batch], step: int) -> StepResult:
        """Do optimiser step `step` (from 0)."""
        for learner in self.learners:
            learner.begin(step)
        with casts_kept(self.processes.device, self.accumulation_steps):
            terms, is_finite, views, places = self._accumulate(batches, step)
        if self.skip:
            factor = self._make_up(views, places)
            terms[:3].mul_(factor)
            terms[len(STEP_TERMS) :].mul_(factor)
        applied = self._apply()
        for learner in self.learners:
            learner.end(step, applied)
        terms[3] = ~applied
        return StepResult(terms, is_finite)

    def _accumulate(self, batches: Iterator[Batch], step: int) -> tuple[Tensor, Tensor, int, int]:
        """Go forward and backward with each micro-batch.

        Return the terms, which views' losses are finite, and how many views there are in how many places.
        """
        columns = result_columns([learner.further_terms for learner in self.learners])
        terms = torch.zeros(columns, device=self.processes.device)
        is_finite = []
        views = places = 0
        for micro_step in range(self.accumulation_steps):
            batch = next(batches).to(self.processes.device)
            seed = partial(seed_step, self.seed, step, micro_step, self.processes.rank)
            seed()
            with self._sync_only_at(micro_step == self.accumulation_steps - 1):
                everyone = self.distiller.everyone(batch, step / self.total_steps, seed)
                # The mean over the views that exist becomes their share of the mean over all places.
                divisor = self.accumulation_steps * batch.places / max(1, len(batch.labels))
                for checked in everyone:  # their graphs are apart: each is freed before the next
                    self.scaler.scale(checked.terms.loss / divisor).backward()
            means = self._means(everyone) / divisor
            terms[:3].add_(means[:3])
            terms[len(STEP_TERMS) :].add_(means[3:])
            terms[4].add_(everyone[0].teacher_not_finite)
            all_finite = reduce(torch.logical_and, [checked.is_finite for checked in everyone])
            is_finite.append(batch.at_places(all_finite, True))
            views, places = views + len(batch.labels), places + batch.places
        return terms, torch.cat(is_finite), views, places

    def _means(self, everyone: Sequence[CheckedTerms]) -> Tensor:
        """Return each learner's loss and terms, then each further term and its cosine; 0 for a term that has ended."""
        nothing = torch.zeros_like(everyone[0].terms.loss)
        means: list[Tensor] = []
        for learner, (terms, _, _) in zip(self.learners, everyone, strict=True):
            means += terms[:3]
            for kind in learner.further_terms:
                means += [terms.others.get(kind, nothing), terms.cosines.get(kind, nothing)]
        return torch.stack(means).detach()

    def _apply(self) -> Tensor:
        """Apply the gradients unless they are not finite; return whether they were applied, on the device."""
        applied = reduce(torch.logical_and, [learner.measure(self.scaler) for learner in self.learners])
        for learner in self.learners:
            learner.apply(applied)
        self.scaler.update()
        return applied

    def _make_up(self, views: int, places: int) -> Tensor:
        """Turn gradients of a mean over all places into those over the existing views; return the factor."""
        if self.processes.count == 1 and views == places:
            return torch.ones((), device=self.processes.device)
        # Counts of all processes stay on the device, so nothing waits for them.
        known = self.processes.sum(torch.full((1,), float(views), device=self.processes.device))[0]
        factor = places * self.processes.count / known.clamp_min(1)
        for learner in self.learners:
            learner.scale_gradients(factor)
        return factor

    def _sync_only_at(self, last: bool) -> AbstractContextManager[Any]:
        without = ExitStack()
        for member in self.distiller.members:
            if isinstance(member.student, DistributedDataParallel) and not last:
                without.enter_context(member.student.no_sync())
        return without

    def weights(self) -> dict[str, Any]:
        """Return the networks that are scored: ``model`` and, if one is kept, its average ``ema``.

        A peer's are called by its name, such as ``resnet18/model``.
        """
        return {name: network for learner in self.learners for name, network in learner.weights().items()}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; it does not include the teacher."""
        student, *peers = self.learners
        state = student.state() | {"scaler": self.scaler.state_dict()}
        return state | ({"peers": [peer.state() for peer in peers]} if peers else {})

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state()` returned."""
        for learner, own in zip(self.learners, [state, *state.get("peers", [])], strict=True):
            learner.load_state(own)
        self.scaler.load_state_dict(state["scaler"])

    def align_buffers(self) -> None:
        """Give every process the main one's BatchNorm statistics, which drift apart under DDP within a step."""
        for learner in self.learners:
            learner.align_buffers(self.processes)


def train(
    trainer: Trainer,
    batches: Iterable[Batch],
    *,
    first_step: int,
    total_steps: int,
    after_step: Callable[[int, StepResult], None],
) -> None:
    """Train from `first_step` to the end; `after_step(steps_done, result)` is called after every step."""
    for learner in trainer.learners:
        learner.model.train()
    stream = iter(batches)
    for step in range(first_step, total_steps):
        after_step(step + 1, trainer.step(stream, step))
