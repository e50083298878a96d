"""Lessons from a label store: its epochs, checked, and what it knows about the validation set."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from deit_kd.config import Config
from deit_kd.console import say
from deit_kd.data import Photos
from deit_kd.distributed import from_main, together
from deit_kd.interfaces import InputError, counted
from deit_kd.run_folder import ScoreRecord, read_facts
from deit_kd.runs.prepared import Run
from deit_kd.store import (
    VALIDATION,
    Checksums,
    LabelStore,
    StoredTeacher,
    epoch_part,
)
from deit_kd.teaching.recording import SOFT_TOP
from deit_kd.teaching.store_identity import (
    has_constant_mix,
    identity_without_teacher,
    refuse_makers,
    refuse_other,
    validation_identity,
)


def stored_teacher(run: Run) -> StoredTeacher:
    """Check the files of the run's store, and return the teacher that reads it.

    The run's loader repeats the epochs of the store, as many of them as show all photos equally often. A resumed run
    keeps to those that it started with.

    Raises:
        InputError: the store is of other views or another teacher, is damaged, or holds too little.
    """
    config, processes = run.config, run.processes
    assert config.teacher.store is not None
    store = open_store(config.teacher.store)
    if config.distill.dense is not None and store.record.grid is None:
        raise InputError(
            f"teacher.store: {config.teacher.store} has no column for the dense term; build another store with this "
            "recipe (deit-kd store build), or leave out the term"
        )
    if config.stores_vectors and store.record.width is None and not config.teacher.is_named:
        raise InputError(
            f"teacher.store: {config.teacher.store} has no column for the pooled term; build another store with this "
            "recipe (deit-kd store build), or name the teacher, which is then loaded for its vectors"
        )
    refuse_other(store, identity_without_teacher(config, run.splits, store.views_version))
    refuse_makers(store, config)
    if not config.distill.takes_hard_labels and not store.record.holds_logits:
        raise InputError(
            f"distill.kind: {config.distill.kind!r} needs logits, but {config.teacher.store} holds only hard labels; "
            f"build another with --teacher.store_top {SOFT_TOP}"
        )
    # A builder may add an epoch while the processes look at the store.
    epochs = from_main(processes, lambda: _epochs_to_read(run, store))
    needed = min(epochs, config.train.epochs)
    if needed < config.train.epochs and not has_constant_mix(config):
        raise InputError(
            f"teacher.store: {config.teacher.store} holds {counted(epochs, 'epoch')} of views, and the run has "
            f"{config.train.epochs}, but the dense labels of a view belong to one step while their mix changes; run "
            "deit-kd store build with more epochs, or build another store with a constant mix"
        )

    checksums = Checksums(store, lambda part: processes.first_of_machine(f"{store.digest}/{part}"), processes.busy)

    def look() -> None:
        for epoch in range(needed):
            store.columns(epoch_part(epoch))  # complete, by length and header; the checksum waits until it is read
        checksums.expect(VALIDATION)

    together(processes, look)
    if processes.is_main:
        cycled = f", repeated for {counted(config.train.epochs, 'epoch')}" if needed < config.train.epochs else ""
        say(f"store: {config.teacher.store}, {counted(needed, 'epoch')} of views{cycled}; the teacher is not loaded")
    run.loader.cycle_views(epochs)
    run.loader.order_as(store.views_version)
    return StoredTeacher(store, epochs, checksums)


def _epochs_to_read(run: Run, store: LabelStore) -> int:
    """Return how many epochs of the store a run uses: all that it needs, or as many as it was started with."""
    epochs = store.epochs
    if run.checkpoint is None:
        return epochs if epochs >= run.config.train.epochs else _epochs_of_all_photos(epochs, run.config)
    facts = read_facts(run.folder)["teacher"]
    begun = epochs if facts is None else facts.get("view_epochs", epochs)
    if begun > epochs:
        raise InputError(
            f"resume: {run.folder} was started with {counted(begun, 'epoch')} of the store, which now has {epochs}; "
            "restore them, or name another output"
        )
    return begun


def _epochs_of_all_photos(epochs: int, config: Config) -> int:
    """Return how many of a store's epochs show all photos equally often, however often they are repeated."""
    repeats = config.augment.repeats
    if epochs >= repeats:
        return epochs // repeats * repeats
    raise InputError(
        f"teacher.store: {config.teacher.store} holds {counted(epochs, 'epoch')} of views, but with "
        f"augment.repeats {repeats} it takes {repeats} to show every photo; run deit-kd store build with "
        f"--epochs {repeats} or a multiple of it, or train for {counted(epochs, 'epoch')}"
    )


class StoredAnswers(NamedTuple):
    """What a store knows about the validation set."""

    score: ScoreRecord  # ``top1``, ``top5`` and ``nll``, as measured
    predictions: Tensor  # [n]
    logits: Tensor | None  # [n, C]; None if the store holds only hard labels


def stored_validation(config: Config, photos: Photos) -> StoredAnswers:
    """Return the teacher's answers to `photos`, read from the recipe's store.

    Raises:
        InputError: the photos are not the store's validation set, or are preprocessed differently.
    """
    assert config.teacher.store is not None
    store = LabelStore(config.teacher.store)
    refuse_other(store, validation_identity(config, photos))
    store.verify([VALIDATION])
    return StoredAnswers(store.score(), store.predictions(0, 1), store.logits())


def open_store(folder: str) -> LabelStore:
    """Return a store that holds at least one epoch.

    Raises:
        InputError: there is none.
    """
    store = LabelStore(folder)
    if not store.epochs:
        raise InputError(f"teacher.store: {folder} holds no complete epoch yet; run deit-kd store build on it")
    return store
