"""Cross-validation: the fold of each photo, stratified, by the hash of its name."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deit_kd.data.hugging_face import HuggingFace
from deit_kd.data.names import Names
from deit_kd.data.photos import Photos, Splits
from deit_kd.data.source import Joined
from deit_kd.interfaces import InputError


def one_fold(splits: Splits, folds: int, fold: int) -> Splits:
    """Join both splits and hold out one fold of all the photos; over all folds each photo is held out once.

    Args:
        splits: of a dataset.
        folds: how many there are, at least 2.
        fold: the one to hold out, from 0.

    Raises:
        InputError: a class has fewer photos than there are folds, or both splits hold the same photos.
    """
    photos, names = _all_photos(splits)
    held_out = np.zeros(len(photos), dtype=bool)
    for label in range(len(photos.classes)):
        members = np.flatnonzero(photos.labels == label)
        if len(members) < folds:
            raise InputError(
                f"data.folds: {folds} is more than the {len(members)} photo(s) of class {photos.classes[label]!r}; "
                "use fewer folds, or add photos"
            )
        held_out[members] = np.array(deal([names[index] for index in members], folds)) == fold
    return Splits(photos.subset(np.flatnonzero(~held_out)), photos.subset(np.flatnonzero(held_out)))


def deal(names: Sequence[str], folds: int) -> list[int]:
    """Return the fold of each photo of one class; the folds' sizes differ by one at most.

    In the order of their hashes, photos go to the fold that their hash selects or, if it is full, to the next one with
    room. So a fold depends only on the names in the class, and adding or removing a photo moves fewer than `folds`
    others, however many there are. It cannot move none: each fold would then follow from the photo's own name alone,
    and some classes would leave a fold empty. (Dealing by rank would move most of them.)

    Args:
        names: of the photos, in any order.
        folds: at least 1.
    """
    share, larger = divmod(len(names), folds)  # `larger` folds may still take one more than their share
    hashes = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") for name in names]
    sizes, dealt = [0] * folds, [0] * len(names)
    for index in sorted(range(len(names)), key=hashes.__getitem__):
        fold = hashes[index] % folds
        while sizes[fold] >= share + (larger > 0):
            fold = (fold + 1) % folds
        larger -= sizes[fold] == share
        sizes[fold] += 1
        dealt[index] = fold
    return dealt


def joined(parts: Sequence[Photos]) -> Photos:
    """Return the photos of all parts, one after the other; parts on disk must be under the first one's root."""
    starts = np.cumsum([0, *(len(part.source.sizes) for part in parts)])
    rows = [np.arange(len(part)) if part.rows is None else part.rows for part in parts]
    return replace(
        parts[0],
        names=Names.joined([part.names for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        source=Joined([part.source for part in parts]),
        rows=np.concatenate([start + own for start, own in zip(starts, rows, strict=False)]),
    )


def _all_photos(splits: Splits) -> tuple[Photos, list[str]]:
    """Return all photos, ordered by name, and each one's name within its split, which may move to the other split."""
    train, validation = splits
    if train.root is not None and validation.root is not None and train.root != validation.root:
        top = Path(os.path.commonpath([train.root.absolute(), validation.root.absolute()]))
        train, validation = (photos.seen_from(top) for photos in splits)
    elif isinstance(train.source, HuggingFace) and train.source is not validation.source:
        parts = splits._asdict().items()
        train, validation = (replace(photos, names=photos.names.below(split)) for split, photos in parts)
    photos = joined([train, validation])
    twice = [name for name, count in Counter(photos.names).items() if count > 1]
    if twice:
        raise InputError(
            f"data.validation_split: holds {twice[0]!r}, which is also in the training split; name another folder"
        )
    in_split = [*splits.train.names, *splits.validation.names]
    names = list(photos.names)
    order = sorted(range(len(photos)), key=names.__getitem__)
    return photos.subset(order), [in_split[index] for index in order]
