"""Any ImageFolder tree: one folder for each class, with or without split folders above them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

from deit_kd.data.listing import listed_classes
from deit_kd.data.photos import Photos, Splits, split_by_hash
from deit_kd.data.source import TreeFiles
from deit_kd.data.split_names import refuse_missing, refuse_splits, shortened, split_words
from deit_kd.interfaces import InputError
from deit_kd.places import photos_root

LOOKED_INTO = 8  # classes of a tree without splits, to see whether the splits are below them


def folder(
    *,
    root: str | None,
    train_split: str,
    validation_split: str,
    validation_fraction: float,
    **_: Any,
) -> Splits:
    """Return the splits of ``root/<split>/<class>/…``.

    A tree without the validation folder is split by `split_by_hash`; a tree without either has its classes directly
    under `root`.

    Raises:
        InputError: the tree is missing or empty, a class has no images, or what would be classes are splits by their
            names (folders of folders, such as ``Training`` and ``Testing``) or hold some.
    """
    top = photos_root(root)
    train_folder, validation_folder = top / train_split, top / validation_split
    if validation_folder.is_dir() and not train_folder.is_dir():
        raise InputError(
            f"data.train_split: {train_folder} is not a folder, though {validation_folder} is; name the training folder"
        )
    if not validation_folder.is_dir():
        if not train_folder.is_dir():
            _check_has_no_splits(top, train_split)
        return split_by_hash(_scan(train_folder if train_folder.is_dir() else top), validation_fraction)
    return Splits(_scan(train_folder), _scan(validation_folder))


def unread_in_tree(root: str | None, train_split: str, validation_split: str) -> list[str]:
    """Return the folders beside a training split from which `folder` holds out photos."""
    top = photos_root(root)
    training = top / train_split
    if (top / validation_split).is_dir() or not training.is_dir() or training == top:
        return []
    return [name for name in _folders_of(top) if top / name != training]


def index_tree(*, root: str | None, train_split: str, validation_split: str) -> dict[str, int]:
    """List a tree and write an index of each of its splits.

    Returns:
        the number of photos in each folder that was indexed.

    Raises:
        InputError: as `folder` does.
        OSError: the cache cannot be written.
    """
    splits = folders_above_classes(root, train_split, validation_split)
    return {str(split): len(_scan(split, indexed=True)) for split in splits}


def folders_above_classes(root: str | None, train_split: str, validation_split: str) -> list[Path]:
    """Return the folders of a tree whose folders are classes: those of its splits, or else its root."""
    top = photos_root(root)
    return [top / split for split in (train_split, validation_split) if (top / split).is_dir()] or [top]


def one_split_of_tree(root: str | None, split: str) -> Photos:
    """Return the photos of ``root/<split>/<class>/…``; ``.`` is a tree without splits.

    Raises:
        InputError: the folder is missing or empty, or a class has no images.
    """
    top = photos_root(root)
    if not (top / split).is_dir():
        there = shortened(_folders_of(top))
        raise InputError(f"split: {top / split} is not there; use one of {there}, or . for photos without splits")
    return _scan(top / split)


def _folders_of(top: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(top) if entry.is_dir() and not entry.name.startswith("."))


def _check_has_no_splits(top: Path, train_split: str) -> None:
    """Raise an InputError if the folders of a tree without splits look like splits, or like data sets with some."""
    there = _folders_of(top)
    refuse_missing(train_split, top, there)
    refuse_splits([name for name in there if split_words(name) and _folders_alone(top / name)], top)
    for name in there[:LOOKED_INTO]:
        refuse_splits(_folders_alone(top / name), top / name, "name that folder, or move the splits above the classes")


def tree_within(photos: Photos) -> Path | None:
    """Return the folder of the only class of a tree if it holds several folders, which may be the classes."""
    place = None if photos.root is None else photos.root / photos.classes[0]
    return place if place is not None and place.is_dir() and len(_folders_alone(place)) > 1 else None


def _folders_alone(place: Path) -> list[str]:
    """Return the folders in a folder; none if it has an image of its own."""
    found = []
    with os.scandir(place) as inside:
        for entry in inside:
            if entry.name.lower().endswith(IMG_EXTENSIONS):
                return []
            if entry.is_dir():
                found.append(entry.name)
    return sorted(found)


def _scan(split_folder: Path, indexed: bool = False) -> Photos:
    try:
        classes, _ = find_classes(split_folder)
    except FileNotFoundError as error:
        cure = "set data.name shards" if any(split_folder.glob("*.tar")) else "put each class in a folder"
        raise InputError(f"data.root: {split_folder} holds no class folders; {cure}") from error
    found = listed_classes(split_folder, classes, "data.root", indexed)
    empty = [name for name, count in zip(classes, found.counts, strict=True) if not count]
    if empty:
        raise InputError(
            f"data.root: {split_folder} has no images ({', '.join(IMG_EXTENSIONS)}) in class "
            f"{', '.join(empty[:5])}{' …' if len(empty) > 5 else ''}; add some or remove the folder"
        )
    labels = np.repeat(np.arange(len(classes)), found.counts)
    files = TreeFiles(found.sizes, found.changed_ns, found.is_indexed)
    return Photos(found.names, labels, tuple(classes), files, split_folder)
