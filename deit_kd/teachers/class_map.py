"""The class map: which columns of a teacher's head speak for each class of the dataset."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from deit_kd.interfaces import InputError, nearest

COLUMN = re.compile(r"\d{1,9}")
LABEL_SETS = (
    "imagenet-1k",
    "imagenet-12k",
    "imagenet-21k-goog",
    "imagenet-21k-miil",
    "imagenet-22k",
    "imagenet-22k-ms",
)


class ClassMap(nn.Module):
    """Turns a teacher's logits [B, M] into logits [B, C] of the dataset's classes.

    A class with one column keeps its logit; the softmax over the C results is then the teacher's distribution
    renormalised over the mapped columns. A class with several columns gets the log of their summed
    probability at T = 1 (log-sum-exp), so that a temperature acts on merged classes, never within one.

    Args:
        columns: of each class, in the dataset's order.
        labels: the teacher's names of all its M columns, or None where nothing is known about them.
    """

    _index: Tensor
    _padding: Tensor

    def __init__(self, columns: Sequence[Sequence[int]], labels: Sequence[str] | None = None) -> None:
        super().__init__()
        self.columns = [list(group) for group in columns]
        self.labels = labels
        widest = max(len(group) for group in self.columns)
        index = torch.tensor([[*group, *[group[0]] * (widest - len(group))] for group in self.columns])  # [C, G]
        padding = torch.tensor([[place >= len(group) for place in range(widest)] for group in self.columns])
        self.register_buffer("_index", index)  # of the state: processes and resumed runs must hold the same map
        self.register_buffer("_padding", padding, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """Return logits [B, C] of the dataset's classes for a teacher's [B, M]."""
        groups = logits[:, self._index]  # [B, C, G]
        return groups.masked_fill(self._padding, float("-inf")).logsumexp(-1)

    def record(self, classes: Sequence[str]) -> dict[str, list[Any]]:
        """Return ``{class: [[column, label], …]}``, as ``run.json`` keeps it."""
        return {
            name: [[column, None if self.labels is None else self.labels[column]] for column in group]
            for name, group in zip(classes, self.columns, strict=True)
        }


def build_class_map(
    *,
    classes: tuple[str, ...],
    columns: int,
    label_names: tuple[str, ...] | None,
    timm_tag: bool,
    label_set: str | None,
    file: str | None,
) -> ClassMap | None:
    """Return the map from a teacher's columns to the dataset's classes; None where they are the same.

    The teacher's columns are named by its checkpoint's own `label_names`, else by `label_set`, else, for timm's
    own pretrained tags alone, by what timm knows about ImageNet: a person's 1000-class teacher is not ImageNet.
    A class takes the column of its own name (for ImageNet: its WordNet id), or what `file` says of it.

    Args:
        classes: the dataset's class names, in label order.
        columns: M, outputs of the teacher's head.
        label_names: saved beside the teacher's weights.
        timm_tag: whether the weights are timm's own.
        label_set: one of `LABEL_SETS`, of weights that carry no names.
        file: CSV or JSON, see `read_mapping`.

    Raises:
        InputError: a class has no column, the columns have no names, or two classes share a column.
    """
    labels = _label_names(columns, label_names, timm_tag, label_set)
    if file is not None:
        return _from_entries(classes, read_mapping(file), columns, labels, file)
    if labels == classes or (labels is None and columns == len(classes) and not timm_tag):
        return None
    if labels is None:
        raise InputError(
            f"teacher: its {columns} columns have no names, and the dataset has {len(classes)} classes; give "
            "teacher.class_map a CSV or JSON of class and column, or set teacher.label_set if they are ImageNet's"
        )
    return _from_entries(classes, {name: [name] for name in classes if name in set(labels)}, columns, labels, None)


def _label_names(
    columns: int, label_names: tuple[str, ...] | None, timm_tag: bool, label_set: str | None
) -> tuple[str, ...] | None:
    if label_names is not None:
        if len(label_names) != columns:
            raise InputError(
                f"teacher: {len(label_names)} class names lie beside weights of {columns} columns; repair config.json"
            )
        return label_names
    if label_set is not None:
        known = label_set_names(label_set)
        if len(known) != columns:
            raise InputError(
                f"teacher.label_set: {label_set} has {len(known)} classes, the teacher's head {columns}; name its own"
            )
        return known
    subset = infer_imagenet_subset({"num_classes": columns}) if timm_tag else None
    return None if subset is None else tuple(ImageNetInfo(subset).label_names())


def label_set_names(label_set: str) -> tuple[str, ...]:
    """Return the WordNet ids of one of `LABEL_SETS`, in the order of a head that was trained on it.

    Raises:
        InputError: it is unknown.
    """
    if label_set not in LABEL_SETS:
        raise InputError(f"teacher.label_set: {label_set!r} is unknown; use one of {', '.join(LABEL_SETS)}")
    return tuple(ImageNetInfo(label_set).label_names())


def read_mapping(file: str) -> dict[str, list[int | str]]:
    """Read a mapping file: for each dataset class one or several columns, WordNet ids or labels of the teacher.

    JSON is an object ``{"cat": [281, "n02123159", "Persian cat"], "tench": 0}``; CSV has the header
    ``class,teacher`` and one row for each column, so that a class with several columns has several rows.

    Raises:
        InputError: the file is missing or is neither.
    """
    path = Path(file).expanduser()
    try:
        if path.suffix == ".json":
            loaded = json.loads(path.read_text(encoding="utf-8-sig"))
            pairs = [(name, entry) for name, value in loaded.items() for entry in _as_list(value)]
        else:
            # Excel's begin with a mark of their bytes' order.
            with open(path, newline="", encoding="utf-8-sig") as opened:
                rows = list(csv.DictReader(opened, skipinitialspace=True))
            pairs = [(row["class"], row["teacher"]) for row in rows]
            surplus = [row for row in rows if row.get(None)]
            if surplus:
                several = surplus[0]["class"]
                raise InputError(
                    f"teacher.class_map: {several!r} has several columns in one row of {file}; write a row for each"
                )
    except OSError as error:
        raise InputError(f"teacher.class_map: {file} cannot be read ({error.strerror}); name a CSV or JSON") from error
    except (ValueError, KeyError, AttributeError, RecursionError, csv.Error) as error:
        raise InputError(
            f'teacher.class_map: {file} is no mapping; write JSON {{"class": column, …}} or CSV class,teacher'
        ) from error
    mapping: dict[str, list[int | str]] = {}
    for name, entry in pairs:
        if isinstance(entry, bool) or not isinstance(entry, int | str):
            raise InputError(f"teacher.class_map: {entry!r} of {name!r} in {file} is no column, WordNet id or label")
        mapping.setdefault(name, []).append(int(entry) if COLUMN.fullmatch(str(entry)) else str(entry))
    return mapping


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _from_entries(
    classes: tuple[str, ...],
    entries: dict[str, list[int | str]],
    columns: int,
    labels: tuple[str, ...] | None,
    file: str | None,
) -> ClassMap:
    places = _Places(columns, labels, file)
    unmapped = [name for name in classes if not entries.get(name)]
    if unmapped:
        raise InputError(
            f"teacher: {len(unmapped)} of {len(classes)} classes have no column of the teacher: "
            f"{', '.join(name + places.nearest(name) for name in unmapped[:10])}{' …' if len(unmapped) > 10 else ''}; "
            + (f"add them to {file}" if file else "map them with teacher.class_map, a CSV or JSON file")
        )
    groups = [sorted({places.find(name, entry) for entry in entries[name]}) for name in classes]
    owner: dict[int, str] = {}
    for name, group in zip(classes, groups, strict=True):
        for column in group:
            if column in owner:
                raise InputError(
                    f"teacher: column {column} would speak for both {owner[column]!r} and {name!r}; "
                    "the teacher cannot tell these classes apart: merge them, or map them to different columns"
                )
            owner[column] = name
    return ClassMap(groups, labels)


class _Places:
    """Finds a teacher's column by number, by name, or by a word that describes the name's WordNet id."""

    def __init__(self, columns: int, labels: tuple[str, ...] | None, file: str | None) -> None:
        self._columns, self._file = columns, file
        self._by_name: dict[str, list[int]] = {}
        self._by_word: dict[str, list[int]] = {}
        are_wordnet = labels is not None and all(re.fullmatch(r"n\d{8}", name) for name in labels)
        info = ImageNetInfo() if are_wordnet else None
        for column, name in enumerate(labels or ()):
            self._by_name.setdefault(name, []).append(column)
            description = name if info is None else info.label_name_to_description(name)
            for word in {_plain(word) for word in (description, *description.split(","))}:
                self._by_word.setdefault(word, []).append(column)

    def find(self, name: str, entry: int | str) -> int:
        """Return the column that `entry` names.

        Raises:
            InputError: none is, or several are.
        """
        if isinstance(entry, int):
            if not 0 <= entry < self._columns:
                raise InputError(
                    f"teacher.class_map: column {entry} of {name!r} in {self._file} is not below {self._columns}"
                )
            return entry
        found = self._by_name.get(entry) or self._by_word.get(_plain(entry), [])
        if len(found) == 1:
            return found[0]
        if found:
            where = f" in {self._file}" if self._file else ", its own,"
            raise InputError(
                f"teacher.class_map: {entry!r} of {name!r}{where} is the name of columns "
                f"{' and '.join(map(str, found))}; write the number"
            )
        raise InputError(
            f"teacher.class_map: the teacher has no {entry!r}, which {self._file} gives {name!r}{self.nearest(entry)}"
        )

    def nearest(self, name: str) -> str:
        """Return the teacher's names most like `name`, in brackets."""
        return nearest(name, self._by_name) or nearest(_plain(name), self._by_word)


def _plain(words: str) -> str:
    return " ".join(words.replace("_", " ").lower().split())
