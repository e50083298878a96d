"""A recipe's teacher fills a label store, on its own or while it teaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deit_kd.asking import score_teacher
from deit_kd.config import Config, as_schedule, differences
from deit_kd.console import say
from deit_kd.data import Splits, TrainingLoader
from deit_kd.distributed import Processes, from_main, on_main
from deit_kd.interfaces import DENSE, POOLED, Batch, InputError, TeacherOutput
from deit_kd.randomness import VIEWS_VERSION
from deit_kd.runs import parts
from deit_kd.runs.data_errors import DataErrors
from deit_kd.runs.photos import build_evaluation_loader
from deit_kd.runs.prepared import AfterEpoch, Run
from deit_kd.store import (
    MANIFEST,
    VALIDATION,
    VIEWS_FIELD,
    LabelStore,
    Record,
    RecordingTeacher,
    Share,
    epoch_part,
)
from deit_kd.teachers import FrozenTeacher, NetworkTeacher
from deit_kd.teaching.store_identity import (
    IN_THE_STORE,
    SHAPE,
    identity,
    in_use,
    refuse_differences,
    refuse_makers,
    refuse_other,
    verify,
    weights_hash,
    weights_source,
)

SOFT_TOP = 10  # logits kept for soft labels unless teacher.store_top says otherwise


@contextmanager
def recording(
    run: Run, teacher: NetworkTeacher, checkpoint: str | None
) -> Iterator[tuple[RecordingTeacher, AfterEpoch]]:
    """Fill the run's store while it trains: yield the teacher to use, and what to call after every epoch.

    Raises:
        InputError: the store is of other views or another teacher, or another process writes to it.
    """
    config, processes = run.config, run.processes
    assert config.teacher.store is not None
    on_main(processes, lambda: _refuse_gap(run), f"looks into {config.teacher.store}")
    with writing(config, config.teacher.store, run.splits, run.loader, processes, teacher, checkpoint) as store:
        fill_validation(config, store, teacher, run.splits, processes, run.errors)
        recorder = RecordingTeacher(teacher, store, shares_of_dense(config, run.loader))

        def after_epoch(epoch: int, beat: Callable[[], None]) -> None:
            recorder.flush()
            size = config.evaluate.batch_size
            fill_epoch(store, recorder, run.loader, epoch, processes, size, run.errors, lambda batch: beat())

        if processes.is_main:
            say(f"store: filling {config.teacher.store}, {store.record.bytes_per_view} bytes per view")
        yield recorder, after_epoch


def _refuse_gap(run: Run) -> None:
    """Refuse a store without the views of an epoch that a resumed run will not see again: it would keep that gap.

    Raises:
        InputError: so it is.
    """
    folder = str(run.config.teacher.store)
    step = 0 if run.checkpoint is None else run.checkpoint["progress"]["step"]
    if step == run.loader.total_steps:  # a finished run adds no views
        return
    done = step // run.loader.steps_per_epoch
    is_there = (Path(folder).expanduser() / MANIFEST).is_file()
    held = LabelStore(folder).epochs if is_there else 0
    if held < done:
        raise InputError(
            f"teacher.store: {folder} lacks epoch {held} of the views, which {run.folder} has behind it; name the "
            f"store that the run filled, fill this one first with deit-kd store build --epochs {done}, or record no "
            "more (--teacher.store null --teacher.store_mode read)"
        )


@contextmanager
def writing(
    config: Config,
    folder: str,
    splits: Splits,
    loader: TrainingLoader,
    processes: Processes,
    teacher: NetworkTeacher,
    checkpoint: str | None,
    share: Share | None = None,
) -> Iterator[LabelStore]:
    """Open or begin a store that every process may write pieces to, locked against other programs.

    Args:
        config: the recipe.
        folder: of the store.
        splits: the recipe's photos.
        loader: of the recipe's views.
        processes: of the job.
        teacher: whose answers are recorded.
        checkpoint: where its weights come from; None is timm or random weights.
        share: which part of the store the job builds; None is all of it, and no other program may write to it.

    Raises:
        InputError: the store is of other views or another teacher, or another process writes to it.
    """
    fields = identity(config, splits) | {"teacher.weights": weights_hash(teacher, checkpoint)}
    top = config.teacher.store_top
    manifest = {
        "identity": fields | weights_source(config, splits) | {VIEWS_FIELD: VIEWS_VERSION},
        "classes": list(splits.train.classes),
        "top": logits_kept(config),
        "views": loader.views_per_epoch,
        "validation": len(splits.validation),
        **({"columns": columns} if (columns := columns_of(config, teacher)) else {}),
        "libraries": [in_use(config)],
        "teacher": {
            **teacher.facts,
            "weights": fields["teacher.weights"],
            "random_weights": parts.has_random_weights(config.teacher),
        },
    }
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(LabelStore.lock(folder) if share is None else share.lock(folder))
            store = LabelStore.begin(folder, manifest)
            refuse_other(store, fields)
            shape = {key: {"columns": {}, **manifest}[key] for key in SHAPE}
            refuse_differences(store, differences({"columns": {}, **store.manifest}, shape, IN_THE_STORE))
            refuse_makers(store, config)
            if top is not None and top != store.record.top:
                raise InputError(
                    f"teacher.store_top: {store.record.top} in the store, {top} here; use the store's, or name another "
                    "folder"
                )
            if not config.distill.takes_hard_labels and not store.record.holds_logits:
                raise InputError(
                    f"distill.kind: {config.distill.kind!r} needs logits, but {folder} holds only hard labels; name "
                    "another folder"
                )
            if share is not None:
                share.agree(folder)

        on_main(processes, enter, f"opens {folder}")
        store = LabelStore(folder)
        loader.order_as(store.views_version)  # an existing store keeps its order
        mine = store.parts if share is None else share.finished(store)
        verify(store, processes.share(mine), processes)
        yield store


def columns_of(config: Config, teacher: NetworkTeacher) -> dict[str, Any]:
    """Return what a store of this recipe holds of each view besides the answer, by column: its size."""
    found: dict[str, Any] = {}
    if config.distill.stores_dense and teacher.grid:
        found[DENSE] = list(teacher.grid)
    if config.stores_vectors and isinstance(teacher, FrozenTeacher):
        found[POOLED] = teacher.pooled_width(config.data.image_size)
    return found


def shares_of_dense(config: Config, loader: TrainingLoader) -> Callable[[Tensor], Tensor]:
    """Return what gives the share of dense logits [B], in fp64, at the steps that learn from views [B, 2]."""
    term = config.distill.dense
    mix = None if term is None else as_schedule(term.mix)

    def shares(view_ids: Tensor) -> Tensor:
        assert mix is not None
        within = (view_ids[:, 1] // config.train.batch_size).clamp_max(loader.steps_per_epoch - 1)
        steps, places = (view_ids[:, 0] * loader.steps_per_epoch + within).unique(return_inverse=True)
        found = [mix.at(step / loader.total_steps) for step in steps.tolist()]
        return torch.tensor(found, dtype=torch.float64)[places]

    return shares


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
    """Run the teacher on every image of the validation set, and keep the answers and their score."""
    if processes.share(store.holds(VALIDATION)):
        return
    asked = _Listener(teacher, store.record.of_whole_images)
    batches = build_evaluation_loader(config, splits.validation, processes)
    score, _ = score_teacher(
        asked,
        processes.busy_over("runs the teacher", errors.watch("validation", batches)),
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
    """Runs a teacher and keeps the records of its answers, in order."""

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
    within: range | None = None,
) -> None:
    """Record what an epoch, or its positions `within`, still lacks, each process its share of blocks."""
    processes.wait()
    part = epoch_part(epoch)
    missing = from_main(processes, lambda: store.missing(part, within), f"looks for what {part} lacks")
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
    if within is None or len(within) == loader.views_per_epoch:
        on_main(processes, lambda: store.finish(part), f"joins {part} of {store.folder}")
