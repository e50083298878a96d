"""What a run ends with: the scores of its heads and the student that it saves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from deit_kd.console import console
from deit_kd.interfaces import counted
from deit_kd.models.state import save_local_dir
from deit_kd.run_folder import STUDENT_FOLDER, FeatureRecord, HeadScores, ScoreRecord
from deit_kd.runs.prepared import Run
from deit_kd.students import TimmStudent


def print_heads(result: Mapping[str, Any], whose: str | None = None) -> None:
    """Print the table of a ``heads.json``; `whose` is the network's name, where there are several."""
    unreadable = f" ({len(result['unreadable'])} more cannot be read)" if result["unreadable"] else ""
    named = "" if whose is None else f"{whose}: "
    table = Table(title=f"{named}{counted(result['n'], 'image')}{unreadable}, weights: {result['weights']}")
    agreement = result["agreement"]
    is_taught = any(agreement.get(f"{head}_teacher") is not None for head in result["heads"])
    for column in ("head", "top-1 %", "top-5 %", "NLL", *(("agrees with teacher",) if is_taught else ())):
        table.add_column(column, justify="left" if column == "head" else "right")
    rows = {**result["heads"], "teacher": result["teacher"]}
    for name, score in rows.items():
        if score is not None:
            agrees = agreement.get(f"{name}_teacher")
            table.add_row(
                name,
                f"{score['top1']:.2f}",
                "-" if score["top5"] is None else f"{score['top5']:.2f}",
                f"{score['nll']:.4f}",
                *(("-" if agrees is None else f"{agrees:.3f}",) if is_taught else ()),
            )
    console.print(table)


def head_scores(
    weights: str, result: dict[str, Any], teacher_score: ScoreRecord | FeatureRecord | None, unreadable: dict[str, str]
) -> HeadScores:
    """Return what ``heads.json`` holds, from one result of `evaluate`; the `unreadable` images are not among the n."""
    return {
        "n": result["n"],
        "unreadable": unreadable,
        "weights": weights,
        "heads": result["heads"],
        "teacher": None if teacher_score is None or "knn" in teacher_score else teacher_score,
        "agreement": result["agreement"],
    }


def save_student(run: Run, student: TimmStudent, folder: Path) -> None:
    """Save a student of the run below `folder`, in timm's local-dir layout."""
    save_local_dir(
        student.backbone,
        folder / STUDENT_FOLDER,
        model_args=student.model_args,
        classes=run.classes,
        preprocessing=run.config.data.preprocessing,
    )
