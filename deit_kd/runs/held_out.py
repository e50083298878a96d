"""Checks that students, teachers and guides of other runs have not learned from the photos that a fold holds out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deit_kd.config import Config, Data
from deit_kd.data import Splits
from deit_kd.interfaces import InputError
from deit_kd.origins import recipe_of
from deit_kd.places import path_of
from deit_kd.run_folder import FACTS_FILE, read_facts, run_of
from deit_kd.runs.splits import splits_of

# The keys that say where photos are, and not which of them are taken.
WHERE = ("name", "root", "train_split", "validation_split", "download", "stage", "image_column", "label_column")


def check_checkpoints(config: Config, splits: Splits) -> None:
    """Refuse a recipe whose weights have learned from photos that `splits` hold out, see `check_fold`."""
    for key, weights in _checkpoints(config):
        if weights is not None:
            check_fold(key, weights, config.data, splits)


def _checkpoints(config: Config) -> Iterator[tuple[str, str | None]]:
    yield "student.checkpoint", config.student.checkpoint
    for number, peer in enumerate(config.peers):
        yield f"peers.{number}.checkpoint", peer.checkpoint
    yield "teacher.checkpoint", config.teacher.checkpoint
    yield "guide.checkpoint", config.guide.checkpoint
    for number, member in enumerate(config.teacher.members):
        yield f"teacher.members.{number}.checkpoint", member.checkpoint


def check_fold(key: str, weights: str, here: Data, splits: Splits) -> None:
    """Refuse the weights of a run that has learned from photos that are held out here.

    Args:
        key: the recipe's key that names them.
        weights: where they are; only for those of a run is it known what they have learned from.
        here: the ``data`` section of this recipe.
        splits: of this recipe.

    Raises:
        InputError: the run used the same photos, wherever they were, either has folds, and it held out others of them;
            it may have learned from fewer or more of the rest.
    """
    run = run_of(path_of(weights))
    if run is None or not (run / FACTS_FILE).is_file():
        return
    theirs = recipe_of(run).data
    has_folds = theirs.folds is not None or here.folds is not None
    if has_folds and not _held_out(run, splits, here) and _used_same_photos(run, here):
        raise InputError(
            f"{key}: {weights} held out {_fold_of(theirs)} of these photos, but this recipe holds out "
            f"{_fold_of(here)}, so it has learned from some of them; name weights of the same fold, trained with the "
            "photos that are there now"
        )


def check_own_fold(run: Path, here: Data, splits: Splits) -> None:
    """Refuse photos that a run has learned from, and its recipe's folds if the photos are others."""
    check_fold("data.fold", str(run), here, splits)
    own = recipe_of(run).data
    is_own = (here.folds, here.fold) == (own.folds, own.fold)
    if own.folds is not None and is_own and not was_trained_on(run, splits):
        raise InputError(
            f"data.fold: {run} held out {_fold_of(own)} of {own.root}, but {here.root} has other photos; score all of "
            "them with --data.folds null --data.fold null"
        )


def was_trained_on(run: Path, splits: Splits) -> bool:
    """Return whether a run learned from, and was scored on, exactly these photos, wherever they are stored.

    Photos without labels may be any but those of validation.
    """
    facts, compared = read_facts(run)["data"], splits._asdict()
    if recipe_of(run).data.unlabelled is not None:
        del compared["train"]
    return all(facts.get(split) == photos.digest() for split, photos in compared.items())


def _held_out(run: Path, splits: Splits, here: Data) -> bool:
    """Return whether a run held out the photos that `splits` hold out, perhaps with other classes joined to a rest."""
    held_out = read_facts(run)["data"].get("validation")
    if held_out == splits.validation.digest():
        return True
    theirs = recipe_of(run).data
    if theirs.rest is None and splits.validation.rest is None:
        return False
    again = splits_of(_moved(theirs, here)).validation
    return again.digest() == held_out and sorted(again.names) == sorted(splits.validation.names)


def _used_same_photos(run: Path, here: Data) -> bool:
    """Return whether a run used the photos of this recipe: in the same folder, or the same files in another."""
    theirs = recipe_of(run).data
    if _place(theirs) == _place(here):
        return True
    try:
        again = splits_of(_moved(theirs, here)).validation
    except InputError:  # of other classes
        return False
    return again.digest() == read_facts(run)["data"].get("validation")


def _moved(theirs: Data, here: Data) -> Data:
    """Return what a run took, of the photos where they are here."""
    return theirs.model_copy(update={"unlabelled": None, **{name: getattr(here, name) for name in WHERE}})


def _place(section: Data) -> tuple[str, Path | None]:
    return section.name, None if section.root is None else Path(section.root).expanduser().resolve()


def _fold_of(section: Data) -> str:
    return "no fold" if section.folds is None else f"fold {section.fold} of {section.folds}"
