"""``deit-kd export``: hand a run's student to another library, read again there before it counts as written."""

from __future__ import annotations

from pathlib import Path

import torch

from deit_kd.config import Config
from deit_kd.distributed import Processes
from deit_kd.exports import FORMATS, About, CannotHold, export, missing_libraries
from deit_kd.interfaces import InputError, nearest
from deit_kd.jobs.sources import load_student, open_source
from deit_kd.models import STUDENT_FOLDER, choose_attention, saved_config
from deit_kd.tracking import CONFIG_FILE, read_head_scores, say


def export_run(folder: Path, config: Config, format_name: str, to: Path | None) -> Path:
    """Write the student of a finished run in another library's format; return where.

    Args:
        folder: of the run.
        config: the run's.
        format_name: one of `FORMATS`.
        to: folder to write, which must not be there yet; None is ``folder/export/<format>``.

    Raises:
        InputError: the run is not finished, the format is unknown, cannot hold this student or needs a library
            that is missing, or the folder is there already.
    """
    if format_name not in FORMATS:
        raise InputError(
            f"--format: {format_name!r} is unknown; use one of {', '.join(FORMATS)}{nearest(format_name, FORMATS)}"
        )
    missing = missing_libraries(format_name)
    if missing:
        raise InputError(f'--format: {format_name} needs {", ".join(missing)}; pip install "deit-kd[{format_name}]"')
    target = to or folder / "export" / format_name
    if target.exists():
        raise InputError(f"--to: {target} is there already; remove it, or name another folder")
    choose_attention("auto", torch.device("cpu"))
    source = open_source(str(folder))
    facts, classes = source.facts, source.classes or ()
    student = load_student(source, config, classes, Processes(0, 1, torch.device("cpu")))
    saved = saved_config(folder / STUDENT_FOLDER)
    about = About(
        architecture=saved["architecture"],
        model_args=saved.get("model_args", {}),
        classes=classes,
        image_size=config.data.image_size,
        mean=config.data.mean,
        std=config.data.std,
        interpolation="bicubic" if config.data.interpolation == "random" else config.data.interpolation,
        crop_fraction=config.data.crop_fraction,
        fusion=config.evaluate.fusion,
        heads=read_head_scores(folder),
        teacher=facts["teacher"],
        data=f"{config.data.name} (digest of the training split {facts['data']['train']})",
        recipe=(folder / CONFIG_FILE).read_text(),
        crop_mode=config.data.crop_mode,
    )
    try:
        distance = export(format_name, student.backbone, target, about)
    except CannotHold as error:
        others = "local-dir, onnx or torch-export"
        raise InputError(f"--format: {format_name} cannot hold this student: {error}; use {others}") from error
    say(f"export: {target}   read again by {format_name}, off by {distance:.1e}")
    return target
