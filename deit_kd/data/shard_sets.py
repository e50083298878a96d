"""A dataset in tar shards: its splits, and the making of its indexes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from deit_kd.console import console
from deit_kd.data.names import Names
from deit_kd.data.photos import Photos, Splits, split_by_hash
from deit_kd.data.shard_index import (
    Facts,
    Found,
    check_complete,
    check_manifest,
    classes_of,
    fresh_index,
    manifest_of,
    scan,
    shards_in,
    write_found,
)
from deit_kd.data.shards import Shard, Shards
from deit_kd.data.split_names import refuse_missing, refuse_splits
from deit_kd.data.staging import staged
from deit_kd.interfaces import InputError
from deit_kd.places import TAR_SHARDS, photos_root


class Place(NamedTuple):
    """Where the shards of one split are."""

    folder: Path
    shards: list[str]


def shards(
    *,
    root: str | None,
    train_split: str,
    validation_split: str,
    validation_fraction: float,
    stage: str | None = None,
    **_: Any,
) -> Splits:
    """Return the splits of ``root/<split>/*.tar`` or, all in one folder, of ``root/*<split>*.tar``.

    Shards without the validation split are split by `split_by_hash`; those without either are all under `root`.

    Raises:
        InputError: shards are missing, damaged, or without a fresh index.
    """
    top = photos_root(root, TAR_SHARDS)
    train, validation = _place(top, train_split), _place(top, validation_split)
    if validation is None:
        check_complete(top, validation_split, top / validation_split, [])
        if train is None:
            words = sorted({word for name in shards_in(top) for word in _words_of(name)})
            refuse_missing(train_split, top, words)
            refuse_splits(words, top)
        split = "." if train is None else train_split
        return split_by_hash(one_split_of_shards(root, split, stage), validation_fraction)
    if train is None:
        raise InputError(
            f"data.train_split: {top} has no shards of {train_split!r}, though it has some of {validation_split!r}; "
            "name those of the training split"
        )
    said = _said(top, [train_split, validation_split])
    return Splits(*(_photos(top, split, stage, said) for split in (train_split, validation_split)))


def one_split_of_shards(root: str | None, split: str, stage: str | None = None) -> Photos:
    """Return the photos of one split of shards; the split ``.`` is all shards directly in `root`.

    Raises:
        InputError: shards are missing, damaged, or without a fresh index.
    """
    top = photos_root(root, TAR_SHARDS)
    return _photos(top, split, stage, _said(top, [split]))


def unread_in_shards(root: str | None, train_split: str, validation_split: str) -> list[str]:
    """Return the shards, and the folders of some, beside a training split from which `shards` holds out photos."""
    top = photos_root(root, TAR_SHARDS)
    train = _place(top, train_split)
    if train is None or _place(top, validation_split) is not None or train_split == ".":
        return []
    folders = sorted(place.name for place in top.iterdir() if place != top / train_split and shards_in(place))
    return folders + [name for name in shards_in(top) if train.folder != top or name not in train.shards]


def index_shards(*, root: str | None, splits: Sequence[str], processes: int) -> dict[str, int]:
    """Make the index of each folder of shards below `root`.

    Args:
        root: of the set.
        splits: to index, besides those of its manifest; those that are not there are passed over.
        processes: how many read at a time.

    Returns:
        the number of photos in each index, by its path.

    Raises:
        InputError: a shard is damaged, or is not that of the manifest.
    """
    top = photos_root(root, TAR_SHARDS)
    manifest = manifest_of(top)
    packed = [] if manifest is None else list(manifest["splits"])
    for split in packed:
        check_complete(top, split, top / split, shards_in(top / split))
    named = dict.fromkeys([*packed, *splits])
    places = {split: place for split in named if (place := _place(top, split)) is not None}
    places = places or {".": _complete(top, ".")}
    made: dict[str, int] = {}
    for folder in dict.fromkeys(place.folder for place in places.values()):
        here = shards_in(folder)
        found = dict(zip(here, _scanned(folder, here, processes), strict=True))
        for split, place in places.items():
            if place.folder == folder and manifest is not None:
                check_manifest(top, split, {folder / name: found[name] for name in place.shards})
        path = write_found(folder, found)
        made[str(path)] = sum(len(one.names) for one in found.values())
    return made


def _scanned(folder: Path, shards: Sequence[str], processes: int) -> Iterator[Found]:
    paths = [str(folder / name) for name in shards]
    if min(processes, len(paths)) == 1:
        yield from _tracked(map(scan, paths), len(paths))
        return
    with ProcessPoolExecutor(min(processes, len(paths))) as pool:
        yield from _tracked(pool.map(scan, paths), len(paths))


def _tracked(found: Iterator[Found], count: int) -> Iterable[Found]:
    return track(found, "indexing", count, console=console, disable=not console.is_terminal)


def _place(top: Path, split: str) -> Place | None:
    """Return where the shards of a split are: in its folder, or in `top` with its name as a word of theirs."""
    if below := shards_in(top / split):
        return Place(top / split, below)
    flat = [name for name in shards_in(top) if split in _words_of(name)]
    return Place(top, flat) if flat else None


def _words_of(shard: str) -> list[str]:
    return re.split(r"[-_.]", shard.removesuffix(".tar"))


def _complete(top: Path, split: str) -> Place:
    """Return where the shards of a split are; raises an InputError unless all that there should be are there."""
    place = _place(top, split) or Place(top / split, [])
    check_complete(top, split, *place)
    if not place.shards:
        compressed = [path.name for path in top.glob("**/*.tar.*") if not path.name.startswith(".")][:1]
        cure = f"unpack {compressed[0]}, shards are not compressed" if compressed else "name a folder with .tar files"
        raise InputError(f"data.root: {top} has no shards of the split {split!r}; {cure}")
    return place


def _photos(top: Path, split: str, stage: str | None, said: dict[int, str]) -> Photos:
    folder, chosen = _complete(top, split)
    index, facts = fresh_index(folder, shards_in(folder))
    wanted = set(chosen)
    is_chosen = np.array([one["name"] in wanted for one in facts["shards"]])
    names, columns = Names(index.names), index.columns
    if not is_chosen.all():
        rows = np.flatnonzero(is_chosen[columns["shard"]])
        names, columns = names.take(rows), {name: values[rows] for name, values in columns.items()}
    if not len(names):
        raise InputError(f"data.root: {folder} has no photos in its shards of {split!r}; pack some")
    labels, classes = _labelled(top, folder, columns["label"], facts, said)
    files = tuple(Shard(str(folder / one["name"]), one["size"], one["changed_ns"]) for one in facts["shards"])
    source = Shards(files, *(columns[name] for name in ("shard", "offset", "size", "digest")))
    if stage is not None:
        source = staged(source, Path(stage).expanduser())
    return Photos(names, labels, classes, source, folder)


def _said(top: Path, splits: Sequence[str]) -> dict[int, str]:
    """Return the class name of each label, as far as the shards of any of the splits say it.

    Raises:
        InputError: two labels have one name, or one has two.
    """
    said: dict[int, str] = {}
    for split in splits:
        folder = _complete(top, split).folder
        _, facts = fresh_index(folder, shards_in(folder))
        for label, name in {} if facts["by_name"] else facts["classes"].items():
            if said.setdefault(label, name) != name:
                raise InputError(
                    f"data.root: class {label} is {name!r} in the shards of {split!r}, and {said[label]!r} in those of "
                    f"{splits[0]!r}; pack both splits with the same classes"
                )
    twice = next((name for name, count in Counter(said.values()).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"data.root: the shards of {top} call two classes {twice!r}; pack both splits again")
    return said


def _labelled(
    top: Path, folder: Path, numbers: np.ndarray, facts: Facts, said: dict[int, str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels that are counted without a gap, and the names of their classes.

    Raises:
        InputError: a label is not in the manifest or the list of classes.
    """
    given, places = np.unique(numbers, return_inverse=True)
    listed = classes_of(top)
    place_of = {name: place for place, name in (said.items() if listed is None else enumerate(listed))}
    order: Sequence[int] = range(len(given))
    if facts["by_name"]:
        names = [facts["classes"][number] for number in given.tolist()]
        unknown = [] if listed is None else [name for name in names if name not in place_of]
        if unknown:
            raise InputError(f"data.root: {folder} has photos of {unknown[0]!r}, which {top} does not list; add it")
        order = sorted(order, key=lambda i: (place_of.get(names[i], 0), names[i]))
    elif listed is None:
        names = [said.get(number, str(number)) for number in given.tolist()]
    elif given[-1] >= len(listed):
        raise InputError(
            f"data.root: {folder} has photos of class {given[-1]}, and {top} lists {len(listed)} classes; copy both "
            "again"
        )
    else:
        names = [listed[number] for number in given.tolist()]
    return np.argsort(order)[places], tuple(names[i] for i in order)
