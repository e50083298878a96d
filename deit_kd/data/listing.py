"""The images below a folder: their names, and what their files look like, listed or from an index."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as arrow
from pydantic import Field
from torchvision.datasets.folder import IMG_EXTENSIONS
from typing_extensions import TypedDict

from deit_kd.data.decode import Stamp
from deit_kd.data.index import Index, place_of_index, read_index, write_index
from deit_kd.data.names import TEXT, Names
from deit_kd.files import checked
from deit_kd.interfaces import InputError

LARGE = 50_000  # photos, from which an index is made without being asked for
TRIED = 64  # files that are looked at one by one, to see how long it takes
SLOW = 100e-6  # seconds for a look, above which the file system is not a local disk
AT_ONCE = 32  # threads that look at files of a slow one
UNSETTLED = 2.0  # seconds in which a folder may change again without another time of change


class Listing(NamedTuple):
    """Images below a folder.

    Args:
        names: relative to the folder, in the order of torchvision's ImageFolder.
        sizes: bytes of each file, int64 [n]; -1 for a link to nowhere.
        changed_ns: when each file was last changed, int64 [n].
        counts: how many there are in each class.
        folders: of each class: when each of its folders was last changed, in ns; -1 if that may not have been the last
            change.
        is_indexed: whether all of it comes from an index.
    """

    names: Names
    sizes: np.ndarray
    changed_ns: np.ndarray
    counts: list[int]
    folders: list[dict[str, int]]
    is_indexed: bool = False


class Facts(TypedDict):
    """What the index of a tree says besides its columns."""

    of: str
    classes: list[str]
    counts: list[Annotated[int, Field(ge=0)]]
    folders: list[dict[str, int]]


def listed_classes(top: Path, classes: Sequence[str], key: str, indexed: bool = False) -> Listing:
    """Return the images of each class folder under `top`; folders that an index knows are not looked at again.

    Args:
        top: the folder above the classes.
        classes: names of folders, in order.
        key: of the recipe, for messages.
        indexed: whether to list everything and to write an index. Without it one is written for many photos, and where
            there was one, if the cache can be written.

    Raises:
        InputError: a name is not UTF-8.
    """
    known = None if indexed else _read_known(top)
    changed = set(classes) if known is None else _changed(top, known, classes)
    if known is not None and not changed:
        return known.listing
    parts = [list_images(top, name, key) if known is None or name in changed else known.of(name) for name in classes]
    found = _joined(parts)
    if not indexed and known is None and len(found.names) < LARGE:
        return found
    try:
        _write(top, classes, found)
    except OSError:
        if indexed:
            raise
        return found
    written = _read_known(top)
    return found if written is None else written.listing


def list_images(top: Path, folder: str, key: str) -> Listing:
    """Return every image in ``top/folder`` and below it, by looking.

    Raises:
        InputError: a name is not UTF-8; `key` says where it comes from.
    """
    now = time.time_ns()
    names: list[str] = []
    folders: dict[str, int] = {}
    base = os.path.join(top, "")
    for place, _, files in sorted(os.walk(os.path.join(base, folder), followlinks=True)):
        changed = os.stat(place).st_mtime_ns
        folders[place.removeprefix(base)] = changed if now - changed > UNSETTLED * 1e9 else -1
        below = os.path.join(place, "").removeprefix(base)
        names += [below + name for name in sorted(files) if name.lower().endswith(IMG_EXTENSIONS)]
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{key}: {base}{name} is not valid UTF-8; rename it") from error
    stamps = stamps_of([base + name for name in names])
    array = arrow.array([name.replace(os.sep, "/") for name in names], TEXT)
    return Listing(Names(array), stamps[:, 0], stamps[:, 1], [len(names)], [folders])


def not_taken(top: Path, classes: Sequence[str]) -> Counter[str]:
    """Count the files in the class folders under `top` that are not listed, by extension (small letters)."""
    found: Counter[str] = Counter()
    for name in classes:
        for _, _, files in os.walk(top / name, followlinks=True):
            found.update(Path(file).suffix.lower() for file in files if not file.lower().endswith(IMG_EXTENSIONS))
    return found


def stamps_of(paths: Sequence[str]) -> np.ndarray:
    """Return the `Stamp` of each file, as rows [n, 2] of int64; in threads where each look takes long."""
    since = time.perf_counter()
    found = [_stamp_of(path) for path in paths[:TRIED]]
    each = (time.perf_counter() - since) / max(1, len(found))
    if each > SLOW:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found += pool.map(_stamp_of, paths[TRIED:])
    else:
        found += map(_stamp_of, paths[TRIED:])
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _stamp_of(path: str) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return Stamp(-1, 0)
    return Stamp(found.st_size, found.st_mtime_ns)


class _Known(NamedTuple):
    """The index of a tree."""

    classes: list[str]
    listing: Listing

    def of(self, name: str) -> Listing:
        """Return the images of one class."""
        names, sizes, changed_ns, counts, folders, _ = self.listing
        label = self.classes.index(name)
        first = sum(counts[:label])
        own = slice(first, first + counts[label])
        return Listing(names[own], sizes[own], changed_ns[own], [counts[label]], [folders[label]])


def _read_known(top: Path) -> _Known | None:
    """Return what the index of a tree says; None if there is none that can be read: another is written in its place."""
    path = place_of_index(top)
    if not path.is_file():
        return None
    try:
        index = read_index(path)
        facts = checked({key: index.facts.get(key) for key in Facts.__annotations__}, Facts)
        _check_columns(index, facts)
    except (InputError, ValueError):
        return None
    columns = index.columns["size"], index.columns["changed_ns"]
    return _Known(facts["classes"], Listing(Names(index.names), *columns, facts["counts"], facts["folders"], True))


def _changed(top: Path, known: _Known, classes: Sequence[str]) -> set[str]:
    """Return the classes that an index does not know as they are now, or knows though they are gone."""
    before = dict(zip(known.classes, known.listing.folders, strict=True))
    unchanged = {
        name
        for name in classes
        if name in before and all(_is_unchanged(top / folder, at) for folder, at in before[name].items())
    }
    return set(classes).symmetric_difference(before) | (set(classes) - unchanged)


def _check_columns(index: Index, facts: Facts) -> None:
    if facts["of"] != "tree" or set(index.columns) != {"size", "changed_ns"}:
        raise ValueError("not of a tree")
    if not len(facts["classes"]) == len(facts["counts"]) == len(facts["folders"]):
        raise ValueError("counts of other classes")
    if sum(facts["counts"]) != len(index.names):
        raise ValueError("counts of other photos")


def _is_unchanged(folder: Path, changed: int) -> bool:
    try:
        return os.stat(folder).st_mtime_ns == changed
    except OSError:
        return False


def _joined(parts: Sequence[Listing]) -> Listing:
    return Listing(
        Names.joined([part.names for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.changed_ns for part in parts]),
        [len(part.names) for part in parts],
        [part.folders[0] for part in parts],
    )


def _write(top: Path, classes: Sequence[str], found: Listing) -> None:
    facts: Facts = {"of": "tree", "classes": list(classes), "counts": found.counts, "folders": found.folders}
    columns = {"size": found.sizes, "changed_ns": found.changed_ns}
    write_index(place_of_index(top), found.names.array(), columns, facts)
