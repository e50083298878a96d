"""Parts of a dataset without copying: some of its classes, perhaps with a rest, and a share of the training photos."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deit_kd.data.photos import UNLABELLED, Photos
from deit_kd.interfaces import InputError, Rest, nearest
from deit_kd.wordnet import by_words, same_words

CLASS_LISTS = Path(__file__).with_name("class_lists")  # each file names its source
COMMENT = "#"


def with_classes(photos: Photos, named: Sequence[str] | str) -> Photos:
    """Return the photos of the named classes alone, as if only their folders existed.

    Args:
        photos: with labels.
        named: the classes, or where they are listed, see `class_names`.

    Raises:
        InputError: a class is not there or named twice, it is the only one, or the list cannot be read.
    """
    names, where = class_names(named)
    place = "the photos" if photos.root is None else str(photos.root)
    kept = _found(names, photos.classes, where, place)
    if len(kept) < 2:
        raise InputError(f"{where}: names one class, {names[0]!r}; name another")
    return of_classes(photos, kept)


def with_rest(photos: Photos, named: Sequence[str] | str, rest: str, share: float = 1.0) -> Photos:
    """Return the photos with all but the named classes joined to one, the last: those of a specialist.

    Args:
        photos: with labels.
        named: the classes that stay, as for `with_classes`; one is enough.
        rest: the name of the class that the others become.
        share: of all photos, which those of the rest may be at most. The photos with the smallest hashes are taken, see
            `share_of`.

    Raises:
        InputError: as `with_classes` does; or `rest` is the name of a class, or no class is left for it.
    """
    names, where = class_names(named)
    place = "the photos" if photos.root is None else str(photos.root)
    kept = _found(names, photos.classes, where, place)
    others = tuple(name for label, name in enumerate(photos.classes) if label not in set(kept))
    if rest in photos.classes:
        raise InputError(f"data.rest: {rest!r} is a class of {place}; choose another name")
    if not others:
        raise InputError(f"data.rest: {where} names all {len(kept)} classes, so none is left for it; unset it")
    renumbered = np.full(len(photos.classes) + 1, len(kept))
    renumbered[kept] = np.arange(len(kept))
    renumbered[UNLABELLED] = UNLABELLED
    labels = renumbered[photos.labels]
    taken, share_taken = _thinned(photos, labels == len(kept), share)
    return replace(
        photos.subset(taken),
        labels=labels[taken],
        classes=(*(photos.classes[label] for label in kept), rest),
        rest=Rest(rest, others, share_taken),
    )


def _thinned(photos: Photos, of_rest: np.ndarray, share: float) -> tuple[np.ndarray, float]:
    """Return the photos to take so that the rest is at most a share of them, and the share of the rest's that they are.

    Args:
        photos: with the labels of their own classes.
        of_rest: [n], whether each is of the rest.
        share: above 0, at most 1.
    """
    there, others = int(of_rest.sum()), int((~of_rest).sum())
    if share == 1 or not there or not others:
        return np.arange(len(photos)), 1.0
    wanted = min(there, max(1, round(others * share / (1 - share))))
    rows = np.flatnonzero(of_rest)
    left_out = rows[np.argsort(_hashes(photos.subset(rows)), kind="stable")[wanted:]]
    return np.setdiff1d(np.arange(len(photos)), left_out), wanted / there


def of_classes(photos: Photos, kept: Sequence[int]) -> Photos:
    """Return the photos of the classes with the labels `kept`, in ascending order, which become 0, 1, 2, …"""
    renumbered = np.full(len(photos.classes), -1)
    renumbered[list(kept)] = np.arange(len(kept))
    taken = photos.subset(np.flatnonzero(renumbered[photos.labels] >= 0))
    return replace(taken, labels=renumbered[taken.labels], classes=tuple(photos.classes[label] for label in kept))


def class_names(named: Sequence[str] | str) -> tuple[list[str], str]:
    """Return the names of classes that a recipe lists, and where they are listed.

    Args:
        named: the names; or a list in `CLASS_LISTS`; or a file with one name a line, of which a CSV's first column
            counts (or its column ``class``). Empty lines and lines with ``#`` in front do not count.

    Raises:
        InputError: there is no such list, it cannot be read, or it is empty.
    """
    if not isinstance(named, str):
        names, where = list(named), "data.classes"
    else:
        shipped = {path.stem: path for path in CLASS_LISTS.glob("*.txt")}
        path = shipped.get(named, Path(named).expanduser())
        names, where = _read(path, named, sorted(shipped)), f"data.classes: {named}"
    if not names:
        raise InputError(f"{where}: names no class; name two or more, or unset data.classes")
    return names, where


def _read(path: Path, named: str, shipped: Sequence[str]) -> list[str]:
    if not path.is_file():
        raise InputError(
            f"data.classes: {named} is neither a file nor one of {', '.join(shipped)}{nearest(named, shipped)}; write "
            'names as a list, ["a", "b"]'
        )
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel's files begin with a byte order mark
            lines = [line for line in file.read().splitlines() if line.strip() and not line.startswith(COMMENT)]
        if path.suffix.lower() != ".csv":
            return [line.strip() for line in lines]
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, skipinitialspace=True, strict=True)]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"data.classes: {named} cannot be read ({error}); name a text file or a CSV") from error
    if rows and "class" in rows[0]:
        column = rows[0].index("class")
        return [row[column] if column < len(row) else "" for row in rows[1:]]
    return [row[0] for row in rows]


def _found(names: Sequence[str], classes: Sequence[str], where: str, place: str) -> list[int]:
    """Return the labels of the named classes, in ascending order."""
    labels = {name: label for label, name in enumerate(classes)}
    missing = [name for name in names if name not in labels]
    known = by_words(classes if missing else ())
    found: dict[str, str] = {}
    for name in names:
        own = name if name in labels else _by_words(name, known, classes, where, place)
        if own in found:
            other = found[own]
            also = "" if name == other else f", as {other!r} and {name!r}"
            raise InputError(f"{where}: names class {own!r} twice{also}; name it once")
        found[own] = name
    return sorted(labels[own] for own in found)


def _by_words(name: str, known: dict[str, set[str]], classes: Sequence[str], where: str, place: str) -> str:
    """Return the class that is described by the same words: a WordNet id by a name, or the reverse."""
    own = same_words(name, known)
    if len(own) == 1:
        return own.pop()
    if own:
        raise InputError(f"{where}: {name!r} describes the classes {' and '.join(sorted(own))}; write which one")
    raise InputError(
        f"{where}: {name!r} is not among the {len(classes)} classes of {place}{nearest(name, classes)}; correct it, "
        "or leave it out"
    )


def share_of(photos: Photos, fraction: float | None, per_class: int | None) -> Photos:
    """Return a share of each class, chosen by the hash of the photos' names, in the same order.

    The photos with the smallest hashes are taken. So a smaller share lies within a larger one, a share depends on the
    names in the class alone, and a photo that is added moves at most one other.

    Args:
        photos: with labels; those without are one class.
        fraction: of each class, above 0 and at most 1, rounded; None takes all.
        per_class: number of each class, if `fraction` is None; a class with fewer photos is taken whole.

    Raises:
        InputError: `fraction` leaves a class empty.
    """
    labels, group, sizes = np.unique(photos.labels, return_inverse=True, return_counts=True)
    if fraction is not None:
        wanted = np.floor(sizes * fraction + 0.5).astype(np.int64)
        _check_none_empty(photos, fraction, labels, sizes, wanted)
    elif per_class is not None:
        wanted = np.minimum(sizes, per_class)
    else:
        return photos
    order = np.lexsort((_hashes(photos), group))  # class by class
    rank = np.empty(len(photos), dtype=np.int64)
    rank[order] = np.arange(len(photos)) - (sizes.cumsum() - sizes)[group[order]]
    return photos.subset(np.flatnonzero(rank < wanted[group]))


def _check_none_empty(
    photos: Photos, fraction: float, labels: np.ndarray, sizes: np.ndarray, wanted: np.ndarray
) -> None:
    if wanted.all():
        return
    smallest = int(sizes.argmin())
    label, size = int(labels[smallest]), int(sizes[smallest])
    which = f"of class {photos.classes[label]!r}" if label >= 0 else "without labels"
    least = np.ceil(5000 / size) / 10_000
    raise InputError(
        f"data.fraction: {fraction:g} of the {size} training photo(s) {which} is none; set {least:g} or more, or "
        "data.per_class"
    )


def _hashes(photos: Photos) -> np.ndarray:
    """Return a hash [n] of each photo's name from the folder of its class on: the split above may change."""
    hashes = np.empty(len(photos), dtype=np.uint64)
    for row, (name, label) in enumerate(zip(photos.names, photos.labels.tolist(), strict=True)):
        start = f"/{name}".find(f"/{photos.classes[label]}/") if label >= 0 else 0
        own = name[max(start, 0) :].encode()
        hashes[row] = int.from_bytes(hashlib.blake2b(own, digest_size=8, person=b"share").digest(), "big")
    return hashes
