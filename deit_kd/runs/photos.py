"""The photos of a recipe, the same on every process, and how a job reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from deit_kd import data, views
from deit_kd.config import Config
from deit_kd.console import say
from deit_kd.data import Photos, Splits
from deit_kd.distributed import Processes, together
from deit_kd.interfaces import Batch, InputError
from deit_kd.runs.data_errors import DataErrors
from deit_kd.runs.held_out import check_checkpoints
from deit_kd.runs.splits import splits_of


def build_splits(config: Config) -> Splits:
    """Return the recipe's dataset.

    Raises:
        InputError: it cannot be loaded, or weights that the recipe names have learned from photos that it holds out.
    """
    splits = splits_of(config.data)
    check_checkpoints(config, splits)
    return splits


def with_labels(config: Config) -> Config:
    """Return the recipe with the labelled training photos in place of those without labels."""
    return config.with_keys(data={"unlabelled": None})


def agreed_splits(config: Config, processes: Processes) -> Splits:
    """Return the recipe's dataset; one process of each machine lists it first, and the others find its index.

    Raises:
        InputError: it cannot be loaded, or is not the same everywhere.
    """

    def listed() -> Splits:
        with processes.busy("lists the photos"):
            return build_splits(config)

    is_first = processes.first_of_machine(f"photos/{config.data.root}")
    first = together(processes, lambda: listed() if is_first else None)
    splits = together(processes, lambda: listed() if first is None else first)
    compare_photos(processes, splits._asdict())
    if processes.is_main:
        tell_unread(config)
    return splits


def tell_unread(config: Config) -> None:
    """Print which splits the recipe does not read, if it has to hold out photos of its training split."""
    where = config.data
    note = data.unread_note(
        name=where.name, root=where.root, train_split=where.train_split, validation_split=where.validation_split
    )
    if note is not None:
        say(note)


def compare_photos(processes: Processes, photos: Mapping[str, Photos]) -> None:
    """Raise an InputError if a process has other photos of a split than the main process."""
    for split, ours in photos.items():
        with processes.busy("lists the photos"):
            digest = ours.digest()
        if not processes.same_everywhere(digest):
            _refuse_others(processes, split, ours, digest)


def _refuse_others(processes: Processes, split: str, photos: Photos, digest: str) -> None:
    expected, theirs = processes.share((digest, photos.lines()))

    def refuse() -> None:
        if digest != expected:
            ours = photos.lines()
            differing = sorted({line.split("\t")[0] for line in set(ours) ^ set(theirs)})
            first = f"the first that differs is {differing[0]}" if differing else "they are decoded differently"
            raise InputError(
                f"data.root: the {len(ours)} photos of {split!r} differ from the {len(theirs)} of process 0 ({first}); "
                "give every process the same photos"
            )

    together(processes, refuse)


def skips(config: Config) -> bool:
    """Return whether photos that cannot be read are left out."""
    return config.data.on_error == "skip"


def build_data_errors(
    config: Config, splits: Splits, folder: Path, processes: Processes, first_step: int = 0
) -> DataErrors:
    """Return the list of photos that cannot be read."""
    return DataErrors(
        folder,
        {split: photos.names for split, photos in splits._asdict().items()},
        most=config.data.max_errors,
        processes=processes,
        first_step=first_step,
        skips=skips(config),
    )


def build_evaluation_transform(config: Config) -> views.Transform:
    """Return what turns an image into the student's evaluation view."""
    return views.evaluation_transform(config.data.preprocessing)


def build_evaluation_loader(
    config: Config, photos: Photos, processes: Processes, skip: bool | None = None
) -> Iterable[Batch]:
    """Return the loader of this process's share of a split; `skip` leaves out what cannot be read; None follows the
    recipe.
    """
    return data.build_evaluation_loader(
        photos,
        build_evaluation_transform(config),
        batch_size=config.evaluate.batch_size,
        rank=processes.rank,
        processes=processes.count,
        workers=config.data.workers,
        pin_memory=processes.device.type == "cuda",
        skip=skips(config) if skip is None else skip,
    )
