"""What a run learns from: what provides the logits, what provides the features, and how long each is needed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from deit_kd.engine import Distiller
from deit_kd.features import POOLED, layer_names, shapes
from deit_kd.interfaces import MAP_KINDS, Batch, InputError, StudentOutput, Teacher, TeacherOutput
from deit_kd.losses import Needs, Objective
from deit_kd.models.tokens import drops_patches
from deit_kd.mutual import MutualDistiller
from deit_kd.runs import parts
from deit_kd.runs.average import AverageTeacher
from deit_kd.runs.prepared import Run
from deit_kd.store import RecordingTeacher, StoredTeacher
from deit_kd.students import ConnectedStudent, Connectors, TimmStudent
from deit_kd.teachers import FrozenTeacher, GuidedTeacher, NetworkTeacher

Answers = NetworkTeacher | StoredTeacher | RecordingTeacher


@dataclass
class Lesson:
    """What a run learns from.

    Args:
        answers: provides the logits, and the features unless there is a guide; None for a run without a teacher, and
            for one whose own average teaches until its trainer is built.
        source: where its weights or its answers come from; None is timm or random weights.
        guide: provides the features instead.
        guide_source: where the guide's weights come from.
    """

    answers: Answers | AverageTeacher | None = None
    source: str | None = None
    guide: FrozenTeacher | None = None
    guide_source: str | None = None

    @property
    def feature_giver(self) -> FrozenTeacher:
        """The network that provides the features, also the one inside a recorder.

        Raises:
            InputError: there is none.
        """
        if self._network is None:
            raise InputError("distill.terms: features are compared, but nothing provides them; add an online guide")
        return self._network

    def _gives_features(self) -> FrozenTeacher | StoredTeacher | RecordingTeacher:
        """Return what is asked for features from now on: a network, alone or inside a recorder, or a store."""
        if self.guide is None and isinstance(self.answers, StoredTeacher | RecordingTeacher):
            return self.answers
        return self.feature_giver

    @property
    def dense_grid(self) -> tuple[int, int]:
        """The grid of the dense logits, h x w.

        Raises:
            InputError: nothing provides them.
        """
        if not isinstance(self.answers, Answers) or self.answers.grid is None:
            raise InputError("distill.terms: dense needs a teacher with logits at every place; name a CNN")
        return self.answers.grid

    @property
    def _network(self) -> FrozenTeacher | None:
        giver: Any = self.guide or self.answers
        if isinstance(giver, RecordingTeacher):
            giver = giver.teacher
        return giver if isinstance(giver, FrozenTeacher) else None

    def teacher_for(self, needs: Needs) -> Teacher | None:
        """Return the teacher from now on, which computes no more than `needs`; release networks no longer needed."""
        if isinstance(self.answers, Answers):
            self.answers.ask_for_dense(needs.dense)
        if needs.links:
            self._gives_features().ask_for(needs.teacher_features)
        else:
            if self._network is not None or isinstance(self.answers, StoredTeacher):
                self._gives_features().ask_for(())
            self.guide = None
        # A recorder continues to fill its store.
        gives_nothing = not needs.logits and (self.guide is not None or not needs.links)
        if gives_nothing and not isinstance(self.answers, RecordingTeacher):
            self.answers = None
        return self.answers if self.guide is None else GuidedTeacher(self.answers, self.guide)

    def reading_ahead(self, run: Run, step: int) -> AbstractContextManager[None]:
        """Within the context, read a label store ahead of the optimiser steps from `step` on."""
        if not isinstance(self.answers, StoredTeacher):
            return nullcontext()
        loader, pinned = run.loader, run.processes.device.type == "cuda"
        return self.answers.reading_ahead(loader.view_ids(step), loader.view_epochs(step), pinned)


def build_distiller(run: Run, lesson: Lesson, step: int) -> Distiller:
    """Return what computes the loss from the epoch of `step` on: the student and its teacher, wrapped for this run.

    Terms that have ended by the start of that epoch are left out, so they cost nothing; DDP and `torch.compile` see
    only the rest.
    """
    epoch_start = step // run.loader.steps_per_epoch * run.loader.steps_per_epoch
    place = epoch_start / run.loader.total_steps
    objective = run.objective.remaining(place)
    needs = objective.needs
    grid = lesson.dense_grid if needs.dense else None
    connectors = run.connectors or Connectors(())
    connectors.freeze_all_but(needs.links)
    learner: nn.Module = run.student
    if needs.links or needs.dense:
        learner = ConnectedStudent(run.student, connectors, needs.links, grid)
    precision, compiled = run.config.train.precision, bool(run.config.train.compile)
    own = Distiller(_wrapped(run, learner), lesson.teacher_for(needs), objective, precision, compiled)
    if not run.peers:
        return own
    peers = [
        Distiller(_wrapped(run, peer.student), None, peer.objective.remaining(place), precision, compiled)
        for peer in run.peers
    ]
    return MutualDistiller(own, peers, run.config.evaluate.fusion)


def _wrapped(run: Run, network: nn.Module) -> Any:
    mode = run.config.train.compile
    if mode:
        network = torch.compile(network, mode=None if mode is True else mode)  # type: ignore[assignment]
    if run.processes.count > 1:
        # Its default copies every gradient into a bucket and back. `static_graph` would gain nothing: without
        # find_unused_parameters buckets follow the order of the first backward pass anyway.
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    return network


def connect(run: Run, lesson: Lesson) -> Run:
    """Return `run` with its objective and, if features are compared, the connectors that it needs.

    Raises:
        InputError: see `match_features`.
    """
    objective = match_features(run, lesson)
    if not objective.needs.links:
        return replace(run, objective=objective)
    connectors = Connectors(objective.needs.links, run.config.seed).to(run.processes.device)
    if not list(connectors.parameters()):  # relations alone compare features as they are
        return replace(run, objective=objective, connectors=connectors)
    parts.add_connectors(run.config, run.optimizer, connectors)
    schedule = parts.build_schedule(run.config, run.optimizer, run.loader.steps_per_epoch)
    return replace(run, objective=objective, connectors=connectors, schedule=schedule)


def match_features(run: Run, lesson: Lesson) -> Objective:
    """Ask student and teacher for the features to compare, and return the run's objective.

    Raises:
        InputError: the student or the teacher does not provide a feature, or the features cannot be compared.
    """
    if not run.config.distill.needs_features:
        return parts.build_objective(run.config, {}, {})
    size = run.config.data.image_size
    blank = torch.zeros(1, 3, size, size, device=run.processes.device)
    with_maps = any(term.kind in MAP_KINDS and term.compares_features for term in run.config.distill.terms)
    own = _student_shapes(run.student, blank, with_maps)
    if lesson.guide is None and isinstance(lesson.answers, StoredTeacher):
        theirs = lesson.answers.shapes
    else:
        theirs = _teacher_shapes(lesson.feature_giver, blank, with_maps)
    return parts.build_objective(run.config, own, theirs)


@torch.no_grad()
def _student_shapes(student: TimmStudent, image: torch.Tensor, with_maps: bool) -> dict[str, torch.Size]:
    names = [*(layer_names(student.backbone) if with_maps else ()), POOLED]
    if drops_patches(student.backbone):
        raise InputError("distill.terms: a student that drops patches has no maps to compare; unset patch_drop_rate")
    was_training = student.training
    student.eval()
    plain, output = student(image), student(image, names)
    student.train(was_training)
    _check_same("the student", plain, output)
    return shapes(output.features or {})


def _teacher_shapes(giver: FrozenTeacher, image: torch.Tensor, with_maps: bool) -> dict[str, torch.Size]:
    batch = Batch(image, image.new_zeros(1, 1), torch.zeros(1, dtype=torch.long, device=image.device))
    giver.ask_for((POOLED,))
    plain = giver(batch)
    giver.ask_for([*(giver.layer_names() if with_maps else ()), POOLED])
    output = giver(batch)
    _check_same("the teacher", plain, output)
    giver.ask_for(())
    return shapes(output.features or {})


def _check_same(whose: str, plain: StudentOutput | TeacherOutput, asked: StudentOutput | TeacherOutput) -> None:
    """Refuse a network whose answers change when it is asked for features; timm does not guarantee that they do not."""
    before: dict[str, Any]
    after: dict[str, Any]
    before, after = ({**output._asdict(), **(output.features or {})} for output in (plain, asked))
    for name, value in before.items():
        if not isinstance(value, torch.Tensor):
            continue
        rounding = 0.03 * float(value.abs().max())  # of bf16, in two graphs of torch.compile
        if not torch.allclose(value, after[name], rtol=0, atol=rounding):
            raise InputError(
                f"distill.terms: {whose} answers differently when it is asked for features (timm's "
                "forward_intermediates skips a layer); name another network"
            )
