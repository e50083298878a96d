"""One vector per image, gathered over a split, and the score of a teacher without a head by these vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deit_kd.data import Photos, share_of
from deit_kd.distributed import Processes, from_main
from deit_kd.features import POOLED
from deit_kd.interfaces import Batch, InputError
from deit_kd.metrics import score_neighbours
from deit_kd.runs.photos import agreed_splits, build_evaluation_loader, with_labels
from deit_kd.runs.prepared import Run
from deit_kd.teachers import FrozenTeacher

MOST_KNOWN = 5000  # training photos that a teacher's features are compared with: enough for a gate, and soon answered


class Vectors(NamedTuple):
    """The pooled features of the images that can be read, in the order of their split, on the CPU in fp32."""

    labels: Tensor  # [n]
    features: Tensor  # [n, D]


@torch.inference_mode()
def collect_vectors(
    whose: str, ask: Callable[[Batch], Tensor], batches: Iterable[Batch], processes: Processes
) -> Vectors:
    """Return the vectors of all processes, the same for any number of them.

    Args:
        whose: the name to use in an error.
        ask: returns the vectors [B, D] of a batch.
        batches: this process's share of the split: of P processes, r has the images r, r + P, r + 2P, …
        processes: of the job.

    Raises:
        InputError: a vector is not finite, or no image can be read.
    """
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    seen = 0
    for batch in batches:
        indices = processes.rank + processes.count * (seen + batch.rows())
        seen += batch.places
        if len(indices):
            rows.append((indices, batch.labels, ask(batch.to(processes.device)).float().cpu()))
    rows = [row for share in processes.gather(rows) for row in share]
    if not rows:
        raise InputError("data.root: no image can be read; run deit-kd data check")
    indices, labels, features = (torch.cat(column) for column in zip(*rows, strict=True))
    if not features.isfinite().all():
        raise InputError(f"{whose}: its pooled features are not finite; check its weights, or set precision off")
    order = indices.argsort()
    return Vectors(labels[order], features[order])


def score_headless(run: Run, teacher: FrozenTeacher) -> tuple[dict[str, Any], np.ndarray]:
    """Return the k-NN score of a teacher without a head, from training photos to those of validation.

    With it come the labels of the validation photos that could be read.

    Raises:
        InputError: see `collect_vectors`.
    """

    def ask(batch: Batch) -> Tensor:
        features = teacher(batch).features
        assert features is not None
        return features[POOLED]

    processes = run.processes
    few = build_evaluation_loader(run.config, _few_labelled(run), processes, skip=True)
    watched = run.errors.watch("validation", run.validation)
    teacher.ask_for((POOLED,))
    known, asked = (
        collect_vectors("teacher", ask, processes.busy_over("runs the teacher", batches), processes)
        for batches in (few, watched)
    )
    teacher.ask_for(())
    run.errors.tell()
    pairs = known.features, known.labels, asked.features, asked.labels
    score = from_main(processes, lambda: score_neighbours(*pairs), "compares the teacher's features")
    return score, asked.labels.numpy()


def _few_labelled(run: Run) -> Photos:
    """Return labelled training photos, as many of each class, read as those of validation are.

    They are the recipe's own or, if these have no labels, those beside its validation photos.
    """
    labelled = run.splits.train
    if run.config.data.unlabelled is not None:
        own = with_labels(run.config).with_keys(data={"fraction": None})
        labelled = agreed_splits(own, run.processes).train
    plain = replace(labelled, decoded=None, short_side=None, decoder=run.splits.validation.decoder)
    return share_of(plain, None, max(1, MOST_KNOWN // len(run.classes)))
