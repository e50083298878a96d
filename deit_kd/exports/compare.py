"""Write a student, read it again with the target library in a clean process, compare, and only then keep it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deit_kd.exports.about import About
from deit_kd.exports.formats import FORMATS
from deit_kd.exports.traced import Answering, Choices, size_step
from deit_kd.interfaces import InputError
from deit_kd.models.tokens import names_of_heads

TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2, "int8": 1e-1}  # of the largest logit, or of 1
PROBE_IMAGES = 3  # not the batch size that any format is written with

_MAIN = """
import sys, torch
from safetensors.torch import load_file, save_file
{reader}
place, *folders = sys.argv[1:]
with torch.inference_mode():
    for number, folder in enumerate(folders):
        outputs = read(folder, load_file(f"{{place}}/{{number}}.images")["images"])
        found = {{str(index): output.float().contiguous().clone() for index, output in enumerate(outputs)}}
        save_file(found, f"{{place}}/{{number}}.found")
"""


def missing_libraries(format_name: str) -> list[str]:
    """Return the libraries of a format that are not installed."""
    return [library for library in FORMATS[format_name].libraries if importlib.util.find_spec(library) is None]


def write(format_name: str, backbone: nn.Module, folder: Path, about: About, choices: Choices | None = None) -> None:
    """Write one student into `folder`, which must not exist yet, with its model card.

    Raises:
        CannotHold: the format cannot represent a part of the student.
    """
    entry = FORMATS[format_name]
    traced = (choices or Choices(),) if entry.is_traced else ()
    entry.write(backbone.eval(), folder, about, *traced)
    (folder / "README.md").write_text(about.card(format_name, entry.how_to_load))


def read_again(
    format_name: str, written: Sequence[tuple[Path, nn.Module, About]], choices: Choices | None = None
) -> list[float]:
    """Read exports again in one clean process; return the deviation of each, see `TOLERANCE`.

    Args:
        format_name: of all of them.
        written: for each, its folder, the student that it was written from, and the facts about it.
        choices: that all of them were traced with; a dynamic size is tested at another size.

    Raises:
        InputError: the target library cannot read one of them.
    """
    script = _MAIN.format(reader=FORMATS[format_name].reader)
    noise = torch.Generator().manual_seed(0)
    choices = choices or Choices()
    probes = []
    for _, backbone, about in written:
        longer = size_step(backbone) if choices.dynamic_size else 0
        size = (about.preprocessing.image_size + longer, about.preprocessing.image_size + 2 * longer)
        probes.append(torch.randn(PROBE_IMAGES, 3, *size, generator=noise))
    with tempfile.TemporaryDirectory() as place:
        for number, images in enumerate(probes):
            save_file({"images": images}, Path(place) / f"{number}.images")
        finished = subprocess.run(
            [sys.executable, "-c", script, place, *(str(folder.absolute()) for folder, _, _ in written)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if finished.returncode:
            last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"--format: {format_name} cannot be read again ({last}); nothing was written")
        found = [load_file(Path(place) / f"{number}.found") for number in range(len(written))]
    return [
        _distance(_expected(backbone, images, about.fusion, choices), outputs, _held(format_name, backbone))
        for (_, backbone, about), images, outputs in zip(written, probes, found, strict=True)
    ]


def _held(format_name: str, backbone: nn.Module) -> int:
    """Return how many of a student's heads a format holds."""
    return sum(head in FORMATS[format_name].heads for head in names_of_heads(backbone))


@torch.no_grad()
def _expected(backbone: nn.Module, images: Tensor, fusion: str, choices: Choices) -> tuple[Tensor, ...]:
    answer: tuple[Tensor, ...] = Answering(backbone, fusion, replace(choices, precision="fp32"))(images)
    return answer


def _distance(expected: Sequence[Tensor], found: dict[str, Tensor], heads: int) -> float:
    """Return the largest difference of any output, in units of the largest logit or of 1; `heads` of them are first."""
    if len(found) < min(heads, len(expected)):
        return float("inf")
    return max(
        float((found[str(number)] - output).abs().max() / output.abs().max().clamp_min(1))
        for number, output in enumerate(expected[: len(found)])
    )


def export(format_name: str, backbone: nn.Module, folder: Path, about: About, choices: Choices | None = None) -> float:
    """Write a student, read it again, compare, and only then create `folder`; return its deviation.

    Raises:
        CannotHold: the format cannot represent a part of the student.
        InputError: the export answers differently when read again, or cannot be read.
    """
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        choices = choices or Choices()
        write(format_name, backbone, aside, about, choices)
        (distance,) = read_again(format_name, [(aside, backbone, about)], choices)
        if not distance <= TOLERANCE[choices.precision]:
            raise InputError(f"--format: {format_name} answers differently when read again (by {distance:.1e})")
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return distance
