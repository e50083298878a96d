"""The class map: which columns of a teacher's head stand for each class of the dataset."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from deit_kd.interfaces import InputError, nearest
from deit_kd.origins import imagenet_names
from deit_kd.wordnet import description, plain, words_of

COLUMN = re.compile(r"[0-9]{1,9}")
LABEL, NUMBER = "label:", "column:"  # before an entry of a mapping file that could be either
PREFIXES = (LABEL, NUMBER)
LABEL_SETS = (
    "imagenet-1k",
    "imagenet-12k",
    "imagenet-21k-goog",
    "imagenet-21k-miil",
    "imagenet-22k",
    "imagenet-22k-ms",
)


MOST_PADDING = 4  # times the columns that are mapped


class ClassMap(nn.Module):
    """Turns a teacher's logits [..., M] into logits [..., C] of the dataset's classes.

    A class with one column keeps its logit; the softmax over the C results is then the teacher's distribution
    renormalised over the mapped columns. A class with several columns gets the log of their summed
    probability at T = 1 (log-sum-exp), so that a temperature acts on merged classes, never within one.

    Args:
        columns: of each class, in the dataset's order.
        labels: the teacher's names of its columns, by column, as far as known.
    """

    _index: Tensor
    _padding: Tensor

    def __init__(self, columns: Sequence[Sequence[int]], labels: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self.columns = [list(group) for group in columns]
        self.labels = dict(labels or {})
        widest = max(len(group) for group in self.columns)
        index = torch.tensor([[*group, *[group[0]] * (widest - len(group))] for group in self.columns])  # [C, G]
        padding = torch.tensor([[place >= len(group) for place in range(widest)] for group in self.columns])
        self.register_buffer("_index", index)  # in the state: processes and resumed runs must share the map
        self.register_buffer("_padding", padding, persistent=False)
        # Padding every class to a much larger one, such as a rest, takes as many times the memory of the logits.
        is_padded = padding.numel() <= MOST_PADDING * int((~padding).sum())
        self._merged = None if is_padded else [(label, g) for label, g in enumerate(self.columns) if len(g) > 1]

    def forward(self, logits: Tensor) -> Tensor:
        """Return logits [..., C] of the dataset's classes for a teacher's [..., M]."""
        if self._merged is not None:
            found = logits[..., self._index[:, 0]]
            for label, group in self._merged:
                found[..., label] = logits[..., self._index[label, : len(group)]].logsumexp(-1)
            return found
        groups = logits[..., self._index]  # [..., C, G]
        return groups.masked_fill(self._padding, float("-inf")).logsumexp(-1)

    def record(self, classes: Sequence[str]) -> dict[str, list[Any]]:
        """Return ``{class: [[column, label], …]}``, as ``run.json`` keeps it."""
        return {
            name: [[column, self.labels.get(column)] for column in group]
            for name, group in zip(classes, self.columns, strict=True)
        }


def described(label: str | None) -> str:
    """Return a column's label for display: a WordNet id comes with its description."""
    found = None if label is None else description(label)
    return label or "" if found is None else f"{label} ({found})"


def build_class_map(
    *,
    classes: tuple[str, ...],
    columns: int,
    label_names: tuple[str, ...] | None,
    timm_tag: bool,
    label_set: str | None,
    file: str | None,
    label_columns: tuple[tuple[int, ...], ...] | None = None,
    column_labels: Mapping[int, str] | None = None,
    rest: str | None = None,
) -> ClassMap | None:
    """Return the map from a teacher's columns to the dataset's classes; None if they are the same.

    The teacher's columns are named by its own `label_names`, else by `label_set`, else, only for timm's own pretrained
    tags, by timm's ImageNet names: a user's 1000-class teacher is not necessarily ImageNet. A class takes the columns
    of its own name (for ImageNet: its WordNet id), or those that `file` gives. Columns without names are taken in the
    order of the classes, unless the classes are numbers in another order.

    Args:
        classes: the dataset's class names, in label order.
        columns: M, outputs of the teacher's head.
        label_names: the names of the teacher's classes.
        timm_tag: whether the weights are timm's own.
        label_set: one of `LABEL_SETS`, for weights without names.
        file: CSV or JSON, see `read_mapping`.
        label_columns: the columns of each of `label_names`; None is one each, in order.
        column_labels: further names of single columns, if `label_columns` are given.
        rest: the one of `classes` that stands for all others, if there is one: it takes the columns of all names that
            are no class, never those of its own name alone. A `file` names its columns like those of any class.

    Raises:
        InputError: a class has no column, the columns have no names, or two classes share a column.
    """
    names = _label_names(columns, label_names, label_columns, timm_tag, label_set)
    if names is None and file is None:
        _check_order(classes, columns, timm_tag)
        return None
    groups = label_columns or tuple((column,) for column in range(columns))
    if file is None and names == classes and groups == tuple((column,) for column in range(columns)):
        return None
    places = _Places(columns, dict(column_labels or {}), names, groups, file)
    if file is not None:
        entries = read_mapping(file)
        _check_classes_of_file(classes, entries, file)
    else:
        entries = {name: [f"{LABEL}{name}"] for name in classes if name in set(names or ()) and name != rest}
        if rest is not None:
            others = [group for name, group in zip(names or (), groups, strict=False) if name not in entries]
            entries[rest] = [f"{NUMBER}{column}" for group in others for column in group]
    return _from_entries(classes, entries, places, file)


def _label_names(
    columns: int,
    label_names: tuple[str, ...] | None,
    label_columns: tuple[tuple[int, ...], ...] | None,
    timm_tag: bool,
    label_set: str | None,
) -> tuple[str, ...] | None:
    if label_names is not None:
        if label_columns is None and len(label_names) != columns:
            raise InputError(
                f"teacher: config.json has {len(label_names)} class names, but the weights have {columns} columns; "
                "correct it"
            )
        if label_columns is not None and max(column for group in label_columns for column in group) >= columns:
            raise InputError(
                f"teacher: its record names a column beyond the {columns} of the weights; name the weights themselves"
            )
        return label_names
    if label_set is not None:
        known = label_set_names(label_set)
        if len(known) != columns:
            raise InputError(
                f"teacher.label_set: {label_set} has {len(known)} classes, the teacher's head {columns}; name its own"
            )
        return known
    return imagenet_names(columns) if timm_tag else None


def _check_order(classes: tuple[str, ...], columns: int, timm_tag: bool) -> None:
    """Refuse columns without names that may not be the classes in their order."""
    cure = "give teacher.class_map a CSV or JSON of class and column"
    if timm_tag or columns != len(classes):
        raise InputError(
            f"teacher: its {columns} columns have no names, and the dataset has {len(classes)} classes; {cure}, or set "
            "teacher.label_set if they are ImageNet's"
        )
    if all(COLUMN.fullmatch(name) for name in classes) and list(classes) != sorted(classes, key=int):
        place = next(i for i, name in enumerate(sorted(classes, key=int)) if classes[i] != name)
        raise InputError(
            "teacher: its columns have no names, and the dataset's classes are numbers in another order (class "
            f"{place} is {classes[place]!r}); {cure}"
        )


def _check_classes_of_file(classes: tuple[str, ...], entries: Mapping[str, Any], file: str) -> None:
    unknown = [name for name in entries if name not in set(classes)]
    if unknown:
        raise InputError(
            f"teacher.class_map: {file} maps {unknown[0]!r}, which is not a class of the "
            f"dataset{nearest(unknown[0], classes)}; correct it, or leave it out"
        )


def label_set_names(label_set: str) -> tuple[str, ...]:
    """Return the WordNet ids of one of `LABEL_SETS`, in the order of a head that was trained on it.

    Raises:
        InputError: it is unknown.
    """
    if label_set not in LABEL_SETS:
        raise InputError(f"teacher.label_set: {label_set!r} is unknown; use one of {', '.join(LABEL_SETS)}")
    return tuple(ImageNetInfo(label_set).label_names())


def read_mapping(file: str) -> dict[str, list[str]]:
    """Read a mapping file: for each class of the dataset, one or more columns, WordNet ids or labels of the teacher.

    JSON is an object ``{"cat": [281, "n02123159", "Persian cat"], "tench": 0}``; CSV has the header
    ``class,teacher`` and one row for each column, so that a class with several columns has several rows.

    Raises:
        InputError: the file is missing, is neither, or names a class twice.
    """
    path = Path(file).expanduser()
    try:
        if path.suffix == ".json":
            loaded = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
            pairs = [(name, entry) for name, value in loaded.items() for entry in _as_list(value)]
        else:
            # Excel's files begin with a byte order mark.
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
    except _Twice as error:
        raise InputError(
            f"teacher.class_map: {str(error)!r} appears twice in {file}; give a class its columns as one list"
        ) from error
    except (ValueError, KeyError, AttributeError, RecursionError, csv.Error) as error:
        raise InputError(
            f'teacher.class_map: {file} is not a mapping; write JSON {{"class": column, …}} or CSV class,teacher'
        ) from error
    mapping: dict[str, list[str]] = {}
    for name, entry in pairs:
        if isinstance(entry, bool) or not isinstance(entry, int | str):
            raise InputError(
                f"teacher.class_map: {entry!r} of {name!r} in {file} is not a column, a WordNet id or a label"
            )
        mapping.setdefault(name, []).append(str(entry))
    return mapping


class _Twice(Exception):
    """A JSON key that appears twice; a reader would keep only one."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Twice(name)
        found[name] = value
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _from_entries(
    classes: tuple[str, ...], entries: Mapping[str, Sequence[str]], places: _Places, file: str | None
) -> ClassMap:
    unmapped = [name for name in classes if not entries.get(name)]
    if unmapped:
        raise InputError(
            f"teacher: {len(unmapped)} of {len(classes)} classes have no column of the teacher: "
            f"{', '.join(name + places.nearest(name) for name in unmapped[:10])}{' …' if len(unmapped) > 10 else ''}; "
            + (f"add them to {file}" if file else "map them with teacher.class_map, a CSV or JSON file")
        )
    groups = [sorted({column for entry in entries[name] for column in places.find(name, entry)}) for name in classes]
    owner: dict[int, str] = {}
    for name, group in zip(classes, groups, strict=True):
        for column in group:
            if column in owner:
                raise InputError(
                    f"teacher: column {column} is mapped to both {owner[column]!r} and {name!r}; the teacher cannot "
                    "tell these classes apart: merge them, or map them to different columns"
                )
            owner[column] = name
    return ClassMap(groups, places.labels)


class _Places:
    """Finds a teacher's columns by number, by name, or by a word that describes the name's WordNet id.

    Args:
        columns: M.
        labels: names of single columns, by column.
        names: of the teacher's classes, or None.
        groups: the columns of each of `names`.
        file: of the entries, for errors.
    """

    def __init__(
        self,
        columns: int,
        labels: dict[int, str],
        names: tuple[str, ...] | None,
        groups: Sequence[tuple[int, ...]],
        file: str | None,
    ) -> None:
        self._columns, self._file = columns, file
        named = list(zip(names or (), groups, strict=False))
        self.labels = {group[0]: name for name, group in named if len(group) == 1} | labels
        self._by_name: dict[str, set[tuple[int, ...]]] = {}
        self._by_word: dict[str, set[tuple[int, ...]]] = {}
        self._by_number: dict[int, set[tuple[int, ...]]] = {}
        known = set(names or ())
        for name, group in [*named, *((name, (column,)) for column, name in labels.items() if name not in known)]:
            self._by_name.setdefault(name, set()).add(group)
            if COLUMN.fullmatch(name):
                self._by_number.setdefault(int(name), set()).add(group)
            for word in words_of(name):
                self._by_word.setdefault(word, set()).add(group)

    def find(self, name: str, entry: str) -> tuple[int, ...]:
        """Return the columns that `entry` names, as a label or else as a number.

        Raises:
            InputError: it names none or several, or is the label of one column and the number of another.
        """
        if entry.startswith(PREFIXES):
            prefix, entry = entry[: entry.index(":") + 1], entry.partition(":")[2]
            return self._labelled(name, entry) if prefix == LABEL else (self._numbered(name, entry),)
        if not COLUMN.fullmatch(entry):
            return self._labelled(name, entry)
        labelled = self._by_name.get(entry) or self._by_number.get(int(entry), set())
        if not labelled:
            return (self._numbered(name, entry),)
        if len(labelled) == 1 and (int(entry) >= self._columns or (int(entry),) in labelled):
            return next(iter(labelled))
        others = " and ".join(str(group[0]) for group in sorted(labelled))
        raise InputError(
            f"teacher.class_map: {entry} of {name!r} in {self._file} is the label of column {others} and the number of "
            f"another; write {LABEL}{entry} or {NUMBER}{entry}"
        )

    def _numbered(self, name: str, entry: str) -> int:
        if not COLUMN.fullmatch(entry) or int(entry) >= self._columns:
            raise InputError(
                f"teacher.class_map: column {entry} of {name!r} in {self._file} is not below {self._columns}"
            )
        return int(entry)

    def _labelled(self, name: str, entry: str) -> tuple[int, ...]:
        found = sorted(self._by_name.get(entry) or self._by_word.get(plain(entry), set()))
        if len(found) == 1:
            return found[0]
        if found:
            where = f" in {self._file}" if self._file else " (its own name)"
            raise InputError(
                f"teacher.class_map: {entry!r} of {name!r}{where} is the name of columns "
                f"{' and '.join(str(group[0]) for group in found)}; write the number"
            )
        raise InputError(
            f"teacher.class_map: the teacher has no {entry!r}, which {self._file} maps {name!r} to{self.nearest(entry)}"
        )

    def nearest(self, name: str) -> str:
        """Return the teacher's names that are most similar to `name`, in brackets."""
        return nearest(name, self._by_name) or nearest(plain(name), self._by_word)
