"""Names that are those of splits: such folders are no classes, and such shards are not one split."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deit_kd.interfaces import InputError

USUAL_TRAINING = "train"  # the only training split that may be missing: then there are no splits
USUAL = {
    *("train", "training", "trn", "val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing"),
    *("unlabelled", "unlabeled"),
}
NAME_THEM = "set data.train_split and data.validation_split to two of them"
MOST_NAMED = 8  # in a message


def refuse_missing(train_split: str, where: object, there: Sequence[str]) -> None:
    """Refuse a training split that was asked for and is not there; `there` are the names that are."""
    if train_split != USUAL_TRAINING and there:
        raise InputError(
            f"data.train_split: {where} has no {train_split!r}; use one of {shortened(there)}, or . for photos without "
            "splits"
        )


def refuse_splits(names: Sequence[str], where: object, cure: str = NAME_THEM) -> None:
    """Refuse names that would be taken for classes, or for parts of one split, if they name two splits or more.

    ``Training`` and ``Testing`` do, and so do ``seg_train`` and ``seg_test``; ``test tube`` and ``test strip`` do not.
    """
    if len(set().union(*map(split_words, names))) < 2:
        return
    splits = [name for name in names if split_words(name)]
    raise InputError(
        f"data.root: {where} holds what look like splits ({shortened(splits)}); {cure}, or set data.train_split . if "
        "they are none"
    )


def split_words(name: str) -> set[str]:
    """Return the words of a name that are usual names of splits."""
    return USUAL & set(re.split(r"[\W\d_]+", name.casefold()))


def shortened(names: Sequence[str]) -> str:
    """Return the first few names in a line."""
    return ", ".join(names[:MOST_NAMED]) + (" …" if len(names) > MOST_NAMED else "")
