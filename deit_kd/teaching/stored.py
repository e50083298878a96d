"""Between a recipe and a label store: who may read or write one, and how the recipe's teacher fills it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deit_kd.config import Config, flat
from deit_kd.data import Photos, Splits, TrainingLoader
from deit_kd.distributed import Processes, on_main, together
from deit_kd.engine import score_teacher
from deit_kd.interfaces import Batch, InputError, TeacherOutput
from deit_kd.models import tensors_hash
from deit_kd.origins import open_origin
from deit_kd.places import TEACHER_OF_RUN
from deit_kd.randomness import VIEWS_VERSION
from deit_kd.runs import parts
from deit_kd.runs.prepared import AfterEpoch, Run
from deit_kd.store import (
    VALIDATION,
    VIEWS_FIELD,
    LabelStore,
    Record,
    RecordingTeacher,
    StoredTeacher,
    differences,
    epoch_part,
)
from deit_kd.teachers import NetworkTeacher
from deit_kd.teaching.fit import teacher_folder
from deit_kd.tracking import HEADS_FILE, DataErrors, read_facts, say

SOFT_TOP = 10  # logits kept for soft labels unless teacher.store_top says otherwise
SHAPE = ("classes", "views", "validation")  # of a store's parts
LIBRARIES = ("numpy", "pillow", "timm", "torch", "torchvision")  # that views depend on

# Keys of the sections data, augment and teacher that change neither a view nor an answer. Any other key, of today
# or later, does.
NOT_IN_IDENTITY = {
    "data.name",  # the photos themselves are compared
    "data.root",
    "data.train_split",
    "data.validation_split",
    "data.validation_fraction",
    "data.download",
    "data.unlabelled",
    "data.workers",
    "data.in_memory",
    "data.on_error",  # what is missing is marked
    "data.max_errors",
    "augment.label_smoothing",  # changes targets, not views
    "teacher.pretrained",  # the weights themselves are compared
    "teacher.checkpoint",
    "teacher.random_weights",
    "teacher.channels_last",
    "teacher.class_map",  # what the file says is compared
    "teacher.compile",
    "teacher.head",  # a store holds logits
    "teacher.min_top1",
    "teacher.store",
    "teacher.store_mode",
    "teacher.store_top",
}


def stored_teacher(run: Run) -> StoredTeacher:
    """Return the teacher that is read from the run's store, after every file that it needs was checked.

    The run's loader deals the epochs of the store over and over, as many of them as show all photos equally often. A
    run that is resumed keeps to those it began with.

    Raises:
        InputError: the store is of other views or another teacher, is damaged, or holds too little.
    """
    config, processes = run.config, run.processes
    assert config.teacher.store is not None
    store = open_store(config.teacher.store)
    refuse_other(store, _identity_without_teacher(config, run.splits, store.views_version))
    _refuse_libraries(store)
    if not config.distill.takes_hard_labels and not store.record.holds_logits:
        raise InputError(
            f"distill.kind: {config.distill.kind!r} needs logits, but {config.teacher.store} holds the hard label "
            f"alone; build another with --teacher.store_top {SOFT_TOP}"
        )
    # A builder may add an epoch while the processes look.
    epochs: int = processes.share(on_main(processes, lambda: _epochs_to_read(run, store)))
    needed = min(epochs, config.train.epochs)

    def verify_once(part: str) -> None:
        if processes.first_of_machine(f"{store.digest}/{part}"):
            with processes.busy(f"compares the checksum of {part} of {store.folder}"):
                store.verify([part])

    def look() -> None:
        for epoch in range(needed):
            store.columns(epoch_part(epoch))  # whole, by its length and header; its checksum when it is first read
        verify_once(VALIDATION)

    together(processes, look)
    if processes.is_main:
        cycled = f", dealt over and over for {config.train.epochs} epochs" if needed < config.train.epochs else ""
        say(f"store: {config.teacher.store}, {needed} epochs of views{cycled}; the teacher is not in memory")
    run.loader.cycle_views(epochs)
    run.loader.order_as(store.views_version)
    return StoredTeacher(store, epochs, verify_once)


def _epochs_to_read(run: Run, store: LabelStore) -> int:
    """Return how many epochs of the store a run deals: all that it needs, or as many as it was begun with."""
    epochs = store.epochs
    if run.checkpoint is None:
        return epochs if epochs >= run.config.train.epochs else _epochs_of_all_photos(epochs, run.config)
    facts = read_facts(run.folder)["teacher"]
    begun = epochs if facts is None else facts.get("view_epochs", epochs)
    if begun > epochs:
        raise InputError(f"resume: {run.folder} was begun with {begun} epochs of the store, which has {epochs} now")
    return begun


def verify(store: LabelStore, parts_of_store: Sequence[str], processes: Processes) -> None:
    """Compare the checksums of parts, each process its share.

    Raises:
        InputError: a part is damaged.
    """

    def verify_share() -> None:
        with processes.busy(f"compares checksums of {store.folder}"):
            store.verify(parts_of_store[processes.rank :: processes.count])

    together(processes, verify_share)


def _epochs_of_all_photos(epochs: int, config: Config) -> int:
    """Return how many of a store's epochs show all photos equally often, however often they are dealt."""
    repeats = config.augment.repeats
    if epochs >= repeats:
        return epochs // repeats * repeats
    raise InputError(
        f"teacher.store: {config.teacher.store} holds {epochs} epochs of views, but with augment.repeats {repeats} it "
        f"takes {repeats} to show every photo; run deit-kd store build with --epochs {repeats} or a multiple of it, or "
        f"train for {epochs} epochs"
    )


class StoredAnswers(NamedTuple):
    """What a store knows about the validation set."""

    score: dict[str, Any]  # ``top1``, ``top5`` and ``nll``, as they were measured
    predictions: Tensor  # [n]
    logits: Tensor | None  # [n, C]; None where the store holds hard labels alone


def stored_validation(config: Config, photos: Photos) -> StoredAnswers:
    """Return what the teacher said about `photos`, read from the recipe's store.

    Raises:
        InputError: the photos are not the store's validation set, or are seen otherwise.
    """
    assert config.teacher.store is not None
    store = LabelStore(config.teacher.store)
    refuse_other(store, _validation_identity(config, photos))
    store.verify([VALIDATION])
    return StoredAnswers(store.score(), store.predictions(0, 1), store.logits())


@contextmanager
def recording(
    run: Run, teacher: NetworkTeacher, checkpoint: str | None
) -> Iterator[tuple[RecordingTeacher, AfterEpoch]]:
    """Fill the run's store while it trains: yield the teacher to ask, and what to call after every epoch.

    Raises:
        InputError: the store is of other views or another teacher, or somebody else writes to it.
    """
    config, processes = run.config, run.processes
    assert config.teacher.store is not None
    with writing(config, config.teacher.store, run.splits, run.loader, processes, teacher, checkpoint) as store:
        fill_validation(config, store, teacher, run.splits, processes, run.errors)
        recorder = RecordingTeacher(teacher, store)

        def after_epoch(epoch: int, beat: Callable[[], None]) -> None:
            recorder.flush()
            size = config.evaluate.batch_size
            fill_epoch(store, recorder, run.loader, epoch, processes, size, run.errors, lambda batch: beat())

        if processes.is_main:
            say(f"store: {config.teacher.store} is filled, {store.record.bytes_per_view} bytes a view")
        yield recorder, after_epoch


@contextmanager
def writing(
    config: Config,
    folder: str,
    splits: Splits,
    loader: TrainingLoader,
    processes: Processes,
    teacher: NetworkTeacher,
    checkpoint: str | None,
) -> Iterator[LabelStore]:
    """Open a store that every process may write pieces to, or begin it; nobody else writes to it meanwhile.

    Args:
        config: the recipe.
        folder: of the store.
        splits: the recipe's photos.
        loader: of the recipe's views.
        processes: of the job.
        teacher: that will be asked.
        checkpoint: where its weights come from; None is timm, or random ones.

    Raises:
        InputError: the store is of other views or another teacher, or somebody else writes to it.
    """
    fields = identity(config, splits) | {"teacher.weights": weights_hash(teacher, checkpoint)}
    top = config.teacher.store_top
    manifest = {
        "identity": fields | _source(config, splits) | {VIEWS_FIELD: VIEWS_VERSION},
        "classes": list(splits.train.classes),
        "top": logits_kept(config),
        "views": loader.views_per_epoch,
        "validation": len(splits.validation),
        "libraries": [libraries_in_use()],
        "teacher": {
            **teacher.facts,
            "weights": fields["teacher.weights"],
            "random_weights": parts.has_random_weights(config.teacher),
        },
    }
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(LabelStore.lock(folder))
            store = LabelStore.begin(folder, manifest)
            refuse_other(store, fields)
            _refuse(store, differences(store.manifest, {key: manifest[key] for key in SHAPE}, {}))
            _refuse_libraries(store)
            if top is not None and top != store.record.top:
                raise InputError(
                    f"teacher.store_top: {store.record.top} in the store, {top} here; use its own, or name another "
                    "folder"
                )
            if not config.distill.takes_hard_labels and not store.record.holds_logits:
                raise InputError(
                    f"distill.kind: {config.distill.kind!r} needs logits; {folder} holds hard labels alone"
                )

        on_main(processes, enter, f"opens {folder}")
        store = LabelStore(folder)
        loader.order_as(store.views_version)  # one that is there goes on as it was begun
        verify(store, processes.share(store.parts), processes)
        yield store


def logits_kept(config: Config) -> int:
    """Return how many logits of an answer a new store of this recipe keeps."""
    if config.teacher.store_top is not None:
        return config.teacher.store_top
    return 0 if config.distill.takes_hard_labels else SOFT_TOP


def fill_validation(
    config: Config,
    store: LabelStore,
    teacher: NetworkTeacher,
    splits: Splits,
    processes: Processes,
    errors: DataErrors,
) -> None:
    """Ask for every image of the validation set, and keep the answers and their score."""
    if processes.share(store.holds(VALIDATION)):
        return
    asked = _Listener(teacher, store.record)
    batches = parts.build_evaluation_loader(config, splits.validation, processes)
    score, _ = score_teacher(
        asked,
        processes.busy_over("asks the teacher", errors.watch("validation", batches)),
        classes=len(splits.validation.classes),
        total=len(splits.validation),
        processes=processes,
    )
    positions = torch.arange(processes.rank, len(splits.validation), processes.count)
    store.write_piece(VALIDATION, positions, asked.columns())
    errors.tell()
    processes.wait()
    on_main(processes, lambda: store.finish(VALIDATION, score), f"joins {VALIDATION} of {store.folder}")


class _Listener:
    """Asks a teacher and keeps the records of its answers, in order."""

    def __init__(self, teacher: NetworkTeacher, record: Record) -> None:
        self._teacher, self._record = teacher, record
        self._kept: list[dict[str, Tensor]] = []

    def __call__(self, batch: Batch) -> TeacherOutput:
        answer: TeacherOutput = self._teacher(batch)
        logits = answer.needed_logits()
        records = self._record.encode(logits)
        if batch.missing:
            whole, rows = self._record.missing(batch.places, logits.device), batch.rows()
            for name, column in whole.items():
                column[rows] = records[name]
            records = whole
        self._kept.append(records)
        return answer

    def columns(self) -> dict[str, Tensor]:
        """Return all records by column."""
        kept = self._kept or [self._record.empty(0)]
        return {name: torch.cat([records[name] for records in kept]).cpu() for name in kept[0]}


def fill_epoch(
    store: LabelStore,
    recorder: RecordingTeacher,
    loader: TrainingLoader,
    epoch: int,
    processes: Processes,
    batch_size: int,
    errors: DataErrors,
    advance: Callable[[Batch], None] = lambda batch: None,
) -> None:
    """Ask for what an epoch still lacks, each process its share of blocks."""
    processes.wait()
    part = epoch_part(epoch)
    missing: Any = processes.share(on_main(processes, lambda: store.missing(part), f"looks what {part} lacks"))
    block = batch_size + batch_size % 2
    starts = range(processes.rank * block, len(missing), processes.count * block)
    if len(starts):
        positions = np.concatenate([missing[first : first + block] for first in starts])
        view_ids = np.stack([np.full_like(positions, epoch), positions], axis=1)
        for batch in errors.watch("train", loader.views(view_ids, block)):
            batch = batch.to(processes.device)
            recorder(batch)
            advance(batch)
    recorder.flush()
    errors.tell()
    processes.wait()
    on_main(processes, lambda: store.finish(part), f"joins {part} of {store.folder}")


def open_store(folder: str) -> LabelStore:
    """Return a store that holds an epoch at least.

    Raises:
        InputError: there is none.
    """
    store = LabelStore(folder)
    if not store.epochs:
        raise InputError(f"teacher.store: {folder} holds no whole epoch yet; run deit-kd store build on it")
    return store


def identity(config: Config, splits: Splits) -> dict[str, Any]:
    """Return everything but the weights that a view or an answer depends on, by field."""
    tree = config.model_dump(mode="json", include={"data", "augment", "teacher"})
    keys = {key: value for key, value in flat(tree).items() if key not in NOT_IN_IDENTITY}
    return {
        "train.images": len(splits.train),
        "train.photos": splits.train.digest(),
        **_validation_identity(config, splits.validation),
        **{key: value for key, value in keys.items() if not key.startswith("teacher.fit.")},
        "seed": config.seed,
        "teacher.image_size": config.teacher.image_size or config.data.image_size,
        "teacher.precision": parts.teacher_precision(config),
        "teacher.class_map": _file_digest(config.teacher.class_map),
    }


def _file_digest(path: str | None) -> str | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise InputError(f"teacher.class_map: {path} is no file; name a CSV or JSON file")
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def _validation_identity(config: Config, photos: Photos) -> dict[str, Any]:
    """Return what a view of a validation image depends on, by field."""
    keys = {"image_size", "crop_fraction", "crop_mode", "interpolation", "mean", "std"}
    seen = config.data.model_dump(mode="json", include=keys)
    return {
        "classes": list(photos.classes),
        "validation.images": len(photos),
        "validation.photos": photos.digest(),
        **{f"data.{key}": value for key, value in seen.items()},
    }


def _identity_without_teacher(config: Config, splits: Splits, views: int) -> dict[str, Any]:
    """Return what can be said of a recipe whose teacher is not in memory, and perhaps not on this machine.

    Weights are compared where their file is at hand. A recipe that names no teacher takes the store's. Where one is
    fitted, it is the one of the version of `views`.
    """
    fields, section = identity(config, splits), config.teacher
    if section.name is None and section.checkpoint is None and not section.members:
        return {key: value for key, value in fields.items() if not key.startswith("teacher.")}
    checkpoint = section.checkpoint
    if section.fit.epochs and (teacher_folder(config, splits, views) / HEADS_FILE).is_file():
        checkpoint = str(teacher_folder(config, splits, views))
    if checkpoint is None or checkpoint.endswith(TEACHER_OF_RUN):
        return fields | _source(config, splits, views)
    return fields | {"teacher.weights": weights_hash(None, checkpoint)}


def _source(config: Config, splits: Splits, views: int = VIEWS_VERSION) -> dict[str, str]:
    """Return where a recipe's weights come from, to compare where they are not at hand."""
    section = config.teacher
    if section.fit.epochs:
        return {"teacher.source": teacher_folder(config, splits, views).name}
    if section.pretrained or section.random_weights:
        return {"teacher.source": "timm" if section.pretrained else "random"}
    return {"teacher.source": "file"} if section.checkpoint is not None else {}


def weights_hash(teacher: NetworkTeacher | None, checkpoint: str | None) -> str:
    """Return a hash of the weights' file or, where they come from none, of the network."""
    if checkpoint is None or checkpoint.endswith(TEACHER_OF_RUN):
        assert teacher is not None
        return tensors_hash(teacher.state_dict())
    return open_origin("teacher.checkpoint", checkpoint).digest


def libraries_in_use() -> dict[str, str]:
    """Return the versions of the libraries that views depend on."""
    return {name: version(name).split("+")[0] for name in LIBRARIES}


def refuse_other(store: LabelStore, here: dict[str, Any]) -> None:
    """Raise an InputError with both values of every field of `here` that the store was not made for."""
    _refuse(store, differences(store.manifest["identity"], here, flat(Config().model_dump(mode="json"))))


def _refuse(store: LabelStore, found: list[str]) -> None:
    if found:
        more = f"; {len(found) - 3} more" if len(found) > 3 else ""
        raise InputError(
            f"teacher.store: {store.folder} holds answers to other questions ({'; '.join(found[:3])}{more}); undo "
            "that, or name another store"
        )


def _refuse_libraries(store: LabelStore) -> None:
    here, accepted = libraries_in_use(), store.manifest["libraries"]
    if here in accepted:
        return
    fewest = min((differences(known, here, {}) for known in accepted), key=len)
    raise InputError(
        f"teacher.store: {store.folder} was made with other libraries ({'; '.join(fewest)}), which may change a view; "
        "run deit-kd store check on it, which lets these use it if the answers hold"
    )
