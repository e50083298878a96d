"""``deit-kd eval --probe true``: how good a student's features are without its heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deit_kd.config import Config
from deit_kd.data import Photos, with_classes
from deit_kd.distributed import Processes, together
from deit_kd.engine import autocast
from deit_kd.evaluation.examine import Examination
from deit_kd.features import POOLED
from deit_kd.interfaces import Batch, InputError
from deit_kd.metrics.linear import judge_features
from deit_kd.runs import parts
from deit_kd.runs.photos import build_evaluation_loader, build_splits, with_labels
from deit_kd.runs.vectors import Vectors, collect_vectors
from deit_kd.students import TimmStudent


def probe(examination: Examination) -> dict[str, Any] | None:
    """Score the pooled features of a student, and of one with random weights, from the training photos to the split.

    Returns:
        In the main process, JSON: the number of training ``images``, and the results of `judge_features` for
        ``student`` and ``random``; None in the others.

    Raises:
        InputError: the split holds training photos; see also `collect_vectors`.
    """
    config, processes = with_labels(examination.config), examination.processes
    train = together(processes, lambda: _same_classes(build_splits(config).train, examination.photos))
    shared = _files(train) & _files(examination.photos)
    if examination.split == "train" or shared:
        raise InputError(
            f"--probe: true, but {examination.split!r} holds {len(shared) or len(train)} of the training photos, which "
            "the probe learns from; score another split"
        )
    students = {"student": examination.student, "random": _random_student(config, train, processes)}
    found: dict[str, Any] = {}
    for name, student in students.items():
        known, asked = (_vectors_of(student, examination, photos) for photos in (train, examination.photos))
        found["images"] = len(known.labels)
        if processes.is_main:
            pairs = known.features, known.labels, asked.features, asked.labels
            found[name] = judge_features(*pairs, seed=config.seed)
    return found if processes.is_main else None


def _same_classes(train: Photos, photos: Photos) -> Photos:
    """Return the training photos of the classes of `photos`."""
    if train.classes == photos.classes:
        return train
    taken = with_classes(train, photos.classes)
    if taken.classes != photos.classes:
        raise InputError("--probe: true, but the classes of the training photos have another order; name other photos")
    return taken


def _files(photos: Photos) -> set[str]:
    return set() if photos.root is None else {f"{photos.root.resolve()}/{name}" for name in photos.names}


def _random_student(config: Config, photos: Photos, processes: Processes) -> TimmStudent:
    random = config.with_keys(student={"pretrained": False, "checkpoint": None})
    return parts.build_student(random, photos.classes, processes.device).eval()


def _vectors_of(student: TimmStudent, examination: Examination, photos: Photos) -> Vectors:
    config, processes = examination.config, examination.processes

    def ask(batch: Batch) -> Tensor:
        with autocast(batch.images.device, config.train.precision):
            features = student(batch.images, (POOLED,)).features
        assert features is not None
        return features[POOLED]

    batches = build_evaluation_loader(config, photos, processes, skip=True)
    return collect_vectors(examination.source.name, ask, batches, processes)
