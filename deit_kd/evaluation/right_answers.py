"""Labels from a file: several right answers to a photo, or none (Beyer et al. 2020, arXiv 2006.07159: ReaL)."""

from __future__ import annotations

import hashlib
import json
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit_kd.evaluation.classes import match_classes
from deit_kd.interfaces import InputError, nearest
from deit_kd.origins import imagenet_names

REAL = "real"  # the labels of ImageNet's validation images that timm contains
REAL_IN_TIMM = ("timm.data", "_info/imagenet_real_labels.json")
NUMBERED = re.compile(r"ILSVRC2012_val_([0-9]{8})\.\w+")  # ImageNet's validation images, from 1

AN_OBJECT = 'an object, {"NAME": ["CLASS", …]}'


class RightAnswers(NamedTuple):
    """The classes that are right for each photo of a split."""

    right: Tensor  # bool [n, C]
    file: str
    digest: str  # of its content


def read_right_answers(file: str, names: Sequence[str], classes: Sequence[str]) -> RightAnswers:
    """Read the right answers to photos.

    The file is JSON. A list, such as the published ``real.json``, has the columns of ImageNet's classes for each of its
    validation images, whose names have their numbers. An object has the names of classes, or their places among
    `classes`, for each photo, by its name or that of its file. Columns of classes that the photos lack do not count.

    Args:
        file: its path, or ``real`` for the list that timm contains.
        names: of the photos.
        classes: of the photos.

    Raises:
        InputError: it cannot be read, has no entry for a photo, names an unknown class, or leaves no photo.
    """
    text = _text_of(file)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"--labels: {file} is not JSON ({str(error).splitlines()[0]}); name one like real.json"
        ) from error
    if isinstance(entries, list):
        label_of: dict[Any, int] = _labels_of_columns(file, classes)
        found = [_numbered(file, entries, name) for name in names]
    elif isinstance(entries, dict):
        label_of = {**dict(enumerate(range(len(classes)))), **{name: label for label, name in enumerate(classes)}}
        found = [_named(file, entries, name) for name in names]
    else:
        raise InputError(f"--labels: {file} is neither a list nor an object; name one like real.json")
    right = torch.zeros(len(names), len(classes), dtype=torch.bool)
    most = 1000 if isinstance(entries, list) else len(classes)
    for row, (name, own) in enumerate(zip(names, found, strict=True)):
        for entry in own if isinstance(own, list) else [own]:
            label = label_of.get(entry) if isinstance(entry, str) or type(entry) is int else None
            if label is not None:
                right[row, label] = True
            elif type(entry) is not int or not 0 <= entry < most:
                known = [key for key in label_of if isinstance(key, str)]
                raise InputError(
                    f"--labels: {file} gives {name} the class {entry!r}, which is not one of "
                    f"{most}{nearest(str(entry), known)}; correct it"
                )
    if not right.any():
        raise InputError(f"--labels: {file} has no right answer to any of the {len(names)} photos; name their labels")
    return RightAnswers(right, file, hashlib.blake2b(text, digest_size=8).hexdigest())


def _text_of(file: str) -> bytes:
    path = Path(file).expanduser()
    try:
        text = pkgutil.get_data(*REAL_IN_TIMM) if file == REAL and not path.exists() else path.read_bytes()
    except OSError as error:
        raise InputError(
            f"--labels: {file} cannot be read ({error.strerror}); name a file like real.json, or {REAL}"
        ) from error
    return text or b""


def _labels_of_columns(file: str, classes: Sequence[str]) -> dict[Any, int]:
    """Return the label of each of ImageNet's columns that is a class of the photos."""
    imagenet = imagenet_names(1000)
    assert imagenet is not None
    try:
        columns = match_classes("ImageNet", imagenet, classes).columns
    except InputError as error:
        raise InputError(
            f"--labels: {file} is a list of ImageNet's columns, and not all classes of the photos are ImageNet's; "
            f"write {AN_OBJECT}"
        ) from error
    return {column: label for label, column in enumerate(columns)}


def _numbered(file: str, entries: Sequence[Any], name: str) -> Any:
    number = NUMBERED.fullmatch(PurePosixPath(name).name)
    if number is None:
        raise InputError(
            f"--labels: {file} is a list in the order of ImageNet's validation images, and {name} is not named like "
            "one "
            f"(ILSVRC2012_val_00000001.JPEG); write {AN_OBJECT}"
        )
    if not 1 <= int(number[1]) <= len(entries):
        raise InputError(
            f"--labels: {file} has {len(entries)} entries, none for {name}; name the labels of these photos"
        )
    return entries[int(number[1]) - 1]


def _named(file: str, entries: dict[str, Any], name: str) -> Any:
    for key in (name, PurePosixPath(name).name):
        if key in entries:
            return entries[key]
    raise InputError(f"--labels: {file} has no entry for {name}; add one, [] if none is right")
