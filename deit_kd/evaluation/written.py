"""The files of an evaluation: ``heads.json`` and ``predictions.parquet``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
from torch import Tensor

from deit_kd.evaluation.diagnose import (
    remove_diagnosis,
)
from deit_kd.evaluation.examine import (
    Examination,
)
from deit_kd.files import new_folder, write_atomically, write_json
from deit_kd.metrics import every_head
from deit_kd.run_folder import HEADS_FILE

PREDICTIONS_FILE = "predictions.parquet"


def write_evaluation(folder: Path, examination: Examination, heads: dict[str, Any]) -> None:
    """Write ``heads.json`` and ``predictions.parquet``; the diagnosis of an earlier evaluation is removed.

    The table has a row for each readable image: ``path``, ``label``, by head ``<head>_top5`` (classes, best first)
    and ``<head>_top5_probability``, and ``teacher_top1``; with a file of right answers also ``right`` (classes).
    """
    with new_folder(folder):
        write_json(folder / HEADS_FILE, heads)
    answers, photos = examination.answers, examination.photos
    classes = photos.classes

    def names(labels: Tensor) -> Any:
        return arrow.array([classes[label] for label in labels.tolist()])

    columns: dict[str, Any] = {
        "path": arrow.array([photos.names[index] for index in answers.indices.tolist()]),
        "label": names(answers.labels),
    }
    if examination.right is not None:
        columns["right"] = arrow.array([[classes[label] for label in row.nonzero()[:, 0]] for row in examination.right])
    for head, log_probabilities in every_head(answers.output, examination.config.evaluate.fusion).items():
        best = log_probabilities.sort(descending=True, stable=True)  # the first of equal ones, as in argmax
        labels, values = best.indices[:, :5].tolist(), best.values[:, :5].exp().tolist()
        columns[f"{head}_top5"] = arrow.array([[classes[label] for label in row] for row in labels])
        columns[f"{head}_top5_probability"] = arrow.array(values, arrow.list_(arrow.float32()))
    if answers.teacher_predictions is not None:
        columns["teacher_top1"] = names(answers.teacher_predictions)
    content = arrow.BufferOutputStream()
    parquet.write_table(arrow.table(columns), content)
    write_atomically(folder / PREDICTIONS_FILE, content.getvalue().to_pybytes())
    remove_diagnosis(folder)  # only once everything else is written: a full disk must not cost anything
