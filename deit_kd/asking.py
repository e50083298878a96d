"""Runs students and teachers on a split: a row for each image and head, or all logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deit_kd.distributed import Processes
from deit_kd.engine import ask, autocast
from deit_kd.interfaces import (
    HEADS,
    Batch,
    InputError,
    StudentOutput,
    Teacher,
    head_log_probabilities,
    pair_log_probabilities,
    reported,
)
from deit_kd.interrupts import raise_pending
from deit_kd.metrics import Answered, agreement, answered, joined, score


class _Asked(NamedTuple):
    """One batch of a split, on its device, and what each student answers."""

    batch: Batch
    places: Tensor  # [b], of its readable images in this process's share
    outputs: dict[str, StudentOutput]  # by student


def _asked(
    students: Mapping[str, nn.Module], batches: Iterable[Batch], processes: Processes, precision: str
) -> Iterator[_Asked]:
    """Yield every batch of this process's share with the answers of `students`, which are in eval mode meanwhile."""
    was_training = {name: student.training for name, student in students.items()}
    for student in students.values():
        student.eval()
    seen = 0
    for batch in batches:
        raise_pending()
        batch = batch.to(processes.device)
        with autocast(processes.device, precision):
            outputs = {name: ask(student, batch.images) for name, student in students.items()}
        yield _Asked(batch, seen + batch.rows(), outputs)
        seen += batch.places
    for name, student in students.items():
        student.train(was_training[name])


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
        total: images of the whole split; those missing in `batches` do not count.
        processes: of the run.
        precision: of autocast.
        fusion: ``softmax`` or ``logits``, see `head_log_probabilities`.
        teacher_predictions: [share], the teacher's classes in the order of `batches`; -1 for a missing answer.

    Returns:
        By model: ``{"n": …, "heads": {"cls": {"top1", "top5", "nll"}, "dist": …, "fused": …}, "agreement": …}``, with
        None for heads that do not exist; n is the number of images seen. With three heads there are also ``patch`` and
        `PAIRS`.

    Raises:
        InputError: no image can be read.
    """
    tables: dict[str, list[dict[str, Answered]]] = {name: [] for name in models}
    taught: list[Tensor] = []
    lacking = 0
    for asked in _asked(models, batches, processes, precision):
        lacking += len(asked.batch.missing)
        for name, output in asked.outputs.items():
            heads = head_log_probabilities(output, fusion) | pair_log_probabilities(output, fusion)
            tables[name].append({head: answered(values, asked.batch.labels) for head, values in heads.items()})
        if teacher_predictions is not None:
            taught.append(teacher_predictions[asked.places])
    total = _readable(total, lacking, processes)
    teacher = {"teacher": torch.cat(taught)} if taught else {}
    return {name: _scored(table, teacher, classes, total, processes) for name, table in tables.items()}


def _scored(
    batches: list[dict[str, Answered]], teacher: dict[str, Tensor], classes: int, total: int, processes: Processes
) -> dict[str, Any]:
    """Return the result of `evaluate` for one model, from its rows by batch and head."""
    rows = {head: joined(batch[head] for batch in batches) for head in batches[0]}
    return {
        "n": total,
        "heads": {
            head: score(rows[head], classes, total, processes) if head in rows else None for head in reported(rows)
        },
        "agreement": agreement({head: of_head.predicted for head, of_head in rows.items()} | teacher, total, processes),
    }


def _readable(total: int, lacking: int, processes: Processes) -> int:
    """Wait for slower processes; return how many of `total` images can be read, less what each process lacks."""
    processes.wait()
    total -= int(processes.sum(torch.tensor(lacking, device=processes.device)))
    if not total:
        raise InputError("data.root: no image can be read; run deit-kd data check")
    return total


class Answers(NamedTuple):
    """The answers of a student and perhaps a teacher to images, on the CPU in fp32."""

    indices: Tensor  # [n], of the images in their split
    labels: Tensor  # [n]
    output: StudentOutput  # logits [n, C]
    teacher_predictions: Tensor | None  # [n]
    teacher_logits: Tensor | None  # [n, C]; also None if only the teacher's classes are known


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
    """Run a student in eval mode, and perhaps a teacher, on every image; return the answers of all processes.

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
    rows: list[tuple[Tensor, ...]] = []
    for asked in _asked({"student": student}, batches, processes, precision):
        if not len(asked.places):
            continue
        output = asked.outputs["student"]
        logits = [*map(output.logits.get, HEADS), None if teacher is None else teacher(asked.batch).logits]
        none = torch.empty(len(asked.places), 0)
        indices = processes.rank + processes.count * asked.places
        rows.append((indices, asked.batch.labels.cpu(), *(none if x is None else x.float().cpu() for x in logits)))
    rows = [row for share in processes.gather(rows) for row in share]
    if not rows:
        empty = torch.empty(0, dtype=torch.long)
        return Answers(empty, empty, StudentOutput(torch.empty(0, classes)), None, None)
    indices, labels, *heads, taught = (torch.cat(column) for column in zip(*rows, strict=True))
    order = indices.argsort()
    teacher_logits = taught[order] if taught.shape[1] else None
    return Answers(
        indices[order],
        labels[order],
        StudentOutput.of({name: head[order] for name, head in zip(HEADS, heads, strict=True) if head.shape[1]}),
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
    nothing = torch.empty(0, classes, device=processes.device)
    rows = [answered(nothing, nothing.argmax(-1))]  # a process may have no image at all
    predictions = [rows[0].predicted]
    lacking = 0
    for batch in batches:
        batch = batch.to(processes.device)
        rows.append(answered(teacher(batch).needed_logits().float().log_softmax(-1), batch.labels))
        predictions.append(batch.at_places(rows[-1].predicted, -1))
        lacking += len(batch.missing)
    total = _readable(total, lacking, processes)
    return score(joined(rows), classes, total, processes), torch.cat(predictions)
