"""``deit-kd predict``: the class that each head of a run's or an exported student gives to images."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from rich.progress import track
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from deit_kd.config import Config
from deit_kd.console import console, say
from deit_kd.data import UnreadableImage, load_image
from deit_kd.data.listing import list_images
from deit_kd.distributed import Processes, process_group
from deit_kd.engine import autocast
from deit_kd.evaluation.sources import data_options, load_student, open_source
from deit_kd.exports.opened import SUFFIX, open_exported
from deit_kd.files import check_file_to_be, write_atomically
from deit_kd.interfaces import InputError, Preprocessing, counted, head_probabilities, printable
from deit_kd.interrupts import raise_pending
from deit_kd.run_folder import is_model
from deit_kd.runs.photos import build_evaluation_transform
from deit_kd.students import open_quantized
from deit_kd.views import Transform

Answer = Callable[[Tensor], dict[str, Tensor]]  # images [B, 3, H, W] to probabilities [B, C] by head
Row = tuple[str, str, str, str]  # path, head, class, probability


def predict(place: Path, config: Config, images: list[Path], head: str, csv_file: Path | None) -> int:
    """Write ``path,head,class,probability`` for each image, to `csv_file` or to standard output.

    A file that cannot be read has no rows, and a line on standard error says why.

    Args:
        place: folder of a finished run, or an ONNX model exported from one.
        config: the run's, or what the model records of it.
        images: files, and folders whose images are all meant, in the order of their names.
        head: one of `ANSWERS`, or ``all``; a student of one head has ``cls`` alone,
            which is then also the fused one.
        csv_file: where to write; None is standard output.

    Returns:
        How many of the files cannot be read.

    Raises:
        InputError: a file is missing, a folder has no images, none can be read, `csv_file` has no folder, or the
            student has no such head. Nothing is written then.
    """
    files = [file for named in images for file in _files_of(named)]
    if csv_file is not None:
        check_file_to_be("--csv", csv_file)
    with process_group(config.train.device) as processes:
        classes, answer = _from_model(place) if is_model(str(place)) else _from_run(place, config, processes)
        transform = build_evaluation_transform(config)
        rows: list[Row] = []
        unreadable: list[str] = []
        starts = range(0, len(files), config.evaluate.batch_size)
        for start_at in track(starts, "predicting", console=console, transient=True, disable=not console.is_terminal):
            views = _read(files[start_at : start_at + config.evaluate.batch_size], transform, unreadable)
            if not views:
                continue
            heads = answer(torch.stack([view for _, view in views]).to(processes.device))
            if head == "fused" and heads.keys() == {"cls"}:
                head = "cls"
            if head != "all" and head not in heads:
                raise InputError(f"--head: {head!r}, but {place} has no such head; use {' or '.join(heads)}")
            best = {name: heads[name].max(-1) for name in heads if head in (name, "all")}
            rows += [
                (str(file), name, classes[int(labels[row])], f"{float(values[row]):.4f}")
                for row, (file, _) in enumerate(views)
                for name, (values, labels) in best.items()
            ]
    if not rows:
        raise InputError(unreadable[0] if len(files) == 1 else f"none of {len(files)} files: {unreadable[0]}")
    for reason in unreadable:
        print(f"left out: {printable(reason)}", file=sys.stderr)
    if csv_file is None:
        _write(sys.stdout, [(printable(path), name, printable(label), share) for path, name, label, share in rows])
        return len(unreadable)
    content = io.StringIO()
    _write(content, rows)
    write_atomically(csv_file, content.getvalue().encode())
    say(f"{counted(len(files) - len(unreadable), 'image')}: {csv_file}")
    return len(unreadable)


def _files_of(place: Path) -> list[Path]:
    if place.is_dir():
        found = [place / name for name in sorted(list_images(place, "", str(place)).names)]
        if not found:
            raise InputError(f"{place}: has no images ({', '.join(IMG_EXTENSIONS)}); name a folder with some")
        return found
    if not place.is_file():
        raise InputError(f"{place}: is not there; name image files or folders of some")
    return [place]


def _read(files: list[Path], transform: Transform, unreadable: list[str]) -> list[tuple[Path, Tensor]]:
    """Return each file with its view [3, H, W]; those that cannot be read are left out, and `unreadable` gets why."""
    views = []
    for file in files:
        raise_pending()
        try:
            views.append((file, transform(load_image(file))))
        except UnreadableImage as error:
            unreadable.append(str(error))
    return views


def _from_run(folder: Path, config: Config, processes: Processes) -> tuple[tuple[str, ...], Answer]:
    source = open_source(str(folder))
    classes = source.classes or ()
    student = load_student(source, config, classes, processes)

    def answer(images: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode(), autocast(processes.device, config.train.precision):
            output = student(images)
        return head_probabilities(output, config.evaluate.fusion)

    return classes, answer


def _from_model(file: Path) -> tuple[tuple[str, ...], Answer]:
    if file.suffix == SUFFIX:
        model = open_exported(file)
        return tuple(model.facts["classes"]), model.probabilities
    student, facts = open_quantized(file)

    def answer(images: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode():
            return head_probabilities(student(images.cpu()), facts["fusion"])

    return tuple(facts["classes"]), answer


def recipe_of_model(file: Path) -> list[str]:
    """Return the options that an exported or quantised model stands for: the preprocessing of its images.

    Raises:
        InputError: it is not a model that ``deit-kd export`` or ``deit-kd quantize`` wrote.
    """
    facts = open_exported(file).facts if file.suffix == SUFFIX else open_quantized(file).facts
    return data_options(Preprocessing(*(facts[field] for field in Preprocessing._fields)))  # type: ignore[literal-required]


def _write(file: TextIO, rows: list[Row]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("path", "head", "class", "probability"))
    writer.writerows(rows)
