"""``deit-kd export``: hand a run's student to another library, read again there before it counts as written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deit_kd.checkpoint import load_checkpoint
from deit_kd.config import Config
from deit_kd.distributed import Processes
from deit_kd.exports import FORMATS, About, CannotHold, export, missing_libraries
from deit_kd.interfaces import InputError, nearest
from deit_kd.jobs.curves import read_records
from deit_kd.jobs.sources import Source, load_student
from deit_kd.models import choose_attention
from deit_kd.run_folder import CONFIG_FILE, read_head_scores
from deit_kd.tracking import say


def export_student(source: Source, config: Config, format_name: str, to: Path | None) -> Path:
    """Write a run's student, or that of one of its checkpoints, in another library's format; return where.

    Args:
        source: of the student.
        config: the run's.
        format_name: one of `FORMATS`.
        to: folder to write, which must not be there yet; None is ``RUN/export/<format>``, of a checkpoint
            ``RUN/export/<format>-<checkpoint>``.

    Raises:
        InputError: the source is no run, the format is unknown, cannot hold this student or needs a library that is
            missing, or the folder is there already.
    """
    if source.run is None:
        raise InputError(f"{source.name}: is no run, nor a checkpoint of one; name the folder of a run")
    if format_name not in FORMATS:
        raise InputError(
            f"--format: {format_name!r} is unknown; use one of {', '.join(FORMATS)}{nearest(format_name, FORMATS)}"
        )
    missing = missing_libraries(format_name)
    if missing:
        raise InputError(f'--format: {format_name} needs {", ".join(missing)}; pip install "deit-kd[{format_name}]"')
    of_checkpoint = "" if source.checkpoint is None else f"-{source.checkpoint.stem}"
    target = to or source.run / "export" / f"{format_name}{of_checkpoint}"
    if target.exists():
        raise InputError(f"--to: {target} is there already; remove it, or name another folder")
    choose_attention("auto", torch.device("cpu"))
    facts, classes = source.facts, source.classes or ()
    student = load_student(source, config, classes, Processes(0, 1, torch.device("cpu")))
    about = About(
        architecture=student.backbone.pretrained_cfg["architecture"],
        model_args=student.model_args,
        classes=classes,
        image_size=config.data.image_size,
        mean=config.data.mean,
        std=config.data.std,
        interpolation="bicubic" if config.data.interpolation == "random" else config.data.interpolation,
        crop_fraction=config.data.crop_fraction,
        fusion=config.evaluate.fusion,
        heads=read_head_scores(source.run) if source.checkpoint is None else _scores_of(source.run, source.checkpoint),
        teacher=facts["teacher"],
        data=f"{config.data.name} (digest of the training split {facts['data']['train']})",
        recipe=(source.run / CONFIG_FILE).read_text(),
        crop_mode=config.data.crop_mode,
    )
    try:
        distance = export(format_name, student.backbone, target, about)
    except CannotHold as error:
        others = "local-dir, onnx or torch-export"
        raise InputError(f"--format: {format_name} cannot hold this student: {error}; use {others}") from error
    say(f"export: {target}   read again by {format_name}, off by {distance:.1e}")
    return target


def _scores_of(run: Path, checkpoint: Path) -> Mapping[str, Any] | None:
    """Return what a checkpoint scored, like ``heads.json``; None where it was written within an epoch.

    Raises:
        InputError: the checkpoint is truncated or altered.
    """
    try:
        step = load_checkpoint(checkpoint)["progress"]["step"]
    except ValueError as error:
        raise InputError(f"{error}; name another checkpoint") from error
    epochs = [record for record in read_records(run) if (record["kind"], record["step"]) == ("epoch", step)]
    if not epochs:
        return None
    weights = "ema" if "ema" in epochs[-1] else "model"
    return {**epochs[-1][weights], "weights": weights, "teacher": epochs[-1]["teacher"]}
