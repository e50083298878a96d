"""``deit-kd export``: export a run's student, kept only once the other library has read it again."""

from __future__ import annotations

from pathlib import Path

import torch

from deit_kd.config import Config
from deit_kd.console import say
from deit_kd.distributed import Processes
from deit_kd.evaluation.described import described
from deit_kd.evaluation.sources import Source, load_student
from deit_kd.exports import FORMATS, OPSET, CannotHold, Choices, export, missing_libraries
from deit_kd.interfaces import ANSWERS, InputError, nearest
from deit_kd.models.tokens import names_of_heads
from deit_kd.runs import parts

LARGEST_OPSET = 23


def export_student(source: Source, config: Config, format_name: str, to: Path | None, choices: Choices) -> None:
    """Write a run's student, or that of one of its checkpoints, in another library's format.

    Args:
        source: of the student.
        config: the run's.
        format_name: one of `FORMATS`.
        to: folder to write, which must not exist yet; None is ``RUN/export/<format>``, of a checkpoint
            ``RUN/export/<format>-<checkpoint>``.
        choices: how to trace the student, for ONNX and torch.export.

    Raises:
        InputError: the source is not a run, the format is unknown, cannot hold this student, has no such choice or
            needs a library that is missing, or the folder exists already.
    """
    if source.run is None:
        raise InputError(f"{source.name}: is neither a run nor a checkpoint of one; name the folder of a run")
    if config.student.bits is not None:
        raise InputError(
            f"{source.name}: answers through integers of {config.student.bits} bits, which no format here holds; use "
            f"deit-kd quantize {source.run}"
        )
    if format_name not in FORMATS:
        raise InputError(
            f"--format: {format_name!r} is unknown; use one of {', '.join(FORMATS)}{nearest(format_name, FORMATS)}"
        )
    _check(choices, format_name)
    missing = missing_libraries(format_name)
    if missing:
        raise InputError(f'--format: {format_name} needs {", ".join(missing)}; pip install "deit-kd[{format_name}]"')
    of_checkpoint = "" if source.checkpoint is None else f"-{source.checkpoint.stem}"
    target = to or source.run / "export" / f"{format_name}{of_checkpoint}"
    if target.exists():
        raise InputError(f"--to: {target} already exists; remove it, or name another folder")
    own_attention = parts.with_attention(config, "auto")
    student = load_student(source, own_attention, source.classes or (), Processes(0, 1, torch.device("cpu")))
    about = described(source, config, student)
    try:
        distance = export(format_name, student.backbone, target, about, choices)
    except CannotHold as error:
        others = "local-dir, onnx or torch-export"
        raise InputError(f"--format: {format_name} cannot hold this student: {error}; use {others}") from error
    for head in names_of_heads(student.backbone):
        if head not in FORMATS[format_name].heads:
            say(f"export: {format_name} has no place for the head {head!r}, and leaves it out; onnx keeps it")
    say(f"export: {target}   read again by {format_name}, off by {distance:.1e}")


def _check(choices: Choices, format_name: str) -> None:
    if choices != Choices() and not FORMATS[format_name].is_traced:
        traced = " or ".join(name for name, entry in FORMATS.items() if entry.is_traced)
        raise InputError(f"--format: {format_name} has no choice of outputs, precision or size; use {traced}")
    if choices.opset != OPSET and format_name != "onnx":
        raise InputError(f"--opset: {format_name} has none; use --format onnx")
    if choices.precision == "int8" and format_name != "onnx":
        raise InputError(f"--precision: {format_name} has no int8; use --format onnx, or deit-kd quantize")
    if not OPSET <= choices.opset <= LARGEST_OPSET:
        raise InputError(f"--opset: {choices.opset} is not supported; use {OPSET} to {LARGEST_OPSET}")
    unknown = [name for name in choices.outputs or () if name not in ANSWERS]
    if unknown or len(set(choices.outputs or ())) != len(choices.outputs or ()):
        raise InputError(f"--outputs: {' '.join(choices.outputs or ())}; use each of {', '.join(ANSWERS)} at most once")
