"""The table of datasets: a name in a recipe becomes a training and a validation split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deit_kd.data.digits import digits
from deit_kd.data.downloads import cifar10, cifar100, imagenette
from deit_kd.data.folder import folder, one_split_of_tree, tree_within, unread_in_tree
from deit_kd.data.folds import one_fold
from deit_kd.data.hugging_face import hugging_face, one_split_of_hub, unread_in_hub
from deit_kd.data.photos import Photos, Splits
from deit_kd.data.shard_sets import one_split_of_shards, shards, unread_in_shards
from deit_kd.data.split_names import shortened
from deit_kd.data.subsets import share_of, with_classes, with_rest
from deit_kd.data.unlabelled import unlabelled_photos
from deit_kd.interfaces import InputError, nearest

SETS: dict[str, Callable[..., Splits]] = {
    "folder": folder,
    "shards": shards,
    "hf": hugging_face,
    "digits": digits,
    "imagenette": imagenette,
    "cifar10": cifar10,
    "cifar100": cifar100,
}
UNREAD = {"folder": unread_in_tree, "shards": unread_in_shards, "hf": unread_in_hub}


def build_splits(
    *,
    name: str,
    root: str | None,
    train_split: str,
    validation_split: str,
    validation_fraction: float,
    folds: int | None,
    fold: int | None,
    download: bool,
    unlabelled: str | None = None,
    classes: Sequence[str] | str | None = None,
    rest: str | None = None,
    rest_share: float = 1.0,
    fraction: float | None = None,
    per_class: int | None = None,
    stage: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Splits:
    """Return the training and the validation split of the dataset called `name`.

    In this order: `classes` are taken alone, see `with_classes`. With `folds`, all photos are joined, and fold number
    `fold` is held out, see `one_fold`. With `unlabelled`, the photos of that folder are the training split, see
    `unlabelled_photos`. Of the training split, `fraction` or `per_class` of each class are taken, see `share_of`. With
    `rest`, all classes go through this, and then those that `classes` does not name become one, see `with_rest`: a fold
    holds out the same photos whichever classes are joined.

    Raises:
        InputError: the name is unknown, there are no shards for `stage`, or the data are missing, empty, inconsistent
            or of one class.
    """
    if name not in SETS:
        raise InputError(f"data.name: {name!r} is unknown; use one of {', '.join(SETS)}{nearest(name, SETS)}")
    if stage is not None and name != "shards":
        raise InputError(f"data.stage: {stage}, but data.name {name} has no shards to copy; unset it")
    splits = SETS[name](
        root=root,
        train_split=train_split,
        validation_split=validation_split,
        validation_fraction=validation_fraction,
        download=download,
        stage=stage,
        image_column=image_column,
        label_column=label_column,
    )
    if classes is not None and rest is None:
        splits = Splits(*(with_classes(photos, classes) for photos in splits))
    _check_same_classes(splits)
    if len(splits.train.classes) < 2:
        within = tree_within(splits.train)
        cure = "add the folder of another" if within is None else f"name {within} if its folders are the classes"
        raise InputError(f"data.root: {root} has one class, {splits.train.classes[0]!r}; {cure}")
    if folds is not None and fold is not None:
        splits = one_fold(splits, folds, fold)
    if unlabelled is not None:
        splits = splits._replace(train=unlabelled_photos(unlabelled, splits.validation))
    splits = splits._replace(train=share_of(splits.train, fraction, per_class))
    if classes is None or rest is None:
        return splits
    return Splits(with_rest(splits.train, classes, rest, rest_share), with_rest(splits.validation, classes, rest))


def _check_same_classes(splits: Splits) -> None:
    train, validation = set(splits.train.classes), set(splits.validation.classes)
    if train == validation:
        return
    differences = [
        f"only in {part}: {', '.join(sorted(names)[:5])}{' …' if len(names) > 5 else ''}"
        for part, names in (("train", train - validation), ("validation", validation - train))
        if names
    ]
    raise InputError(f"data.root: class folders differ between the splits ({'; '.join(differences)}); make them agree")


def unread_note(*, name: str, root: str | None, train_split: str, validation_split: str) -> str | None:
    """Return the line that names what lies beside a training split from which photos are held out.

    Some of it may have been meant to be the validation split. None if there is nothing.
    """
    unread = UNREAD[name](root, train_split, validation_split) if name in UNREAD else []
    said = f"{root} has no split {validation_split!r}, so photos of {train_split!r} are held out; not read: "
    return f"data.validation_split: {said}{shortened(unread)}" if unread else None


def one_split(
    *,
    name: str,
    root: str | None,
    split: str,
    classes: Sequence[str] | str | None = None,
    rest: str | None = None,
    stage: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Photos:
    """Return the photos of any split of a dataset, see `build_splits`; the split ``.`` is `root` itself.

    Raises:
        InputError: the dataset has no splits but two, the split is missing or empty, or a class is not there.
    """
    if name == "folder":
        photos = one_split_of_tree(root, split)
    elif name == "shards":
        photos = one_split_of_shards(root, split, stage)
    elif name == "hf":
        photos = one_split_of_hub(root, split, image_column, label_column)
    else:
        raise InputError(f"--split: {name} has no split {split!r}; use train or validation")
    if classes is None:
        return photos
    return with_classes(photos, classes) if rest is None else with_rest(photos, classes, rest)
