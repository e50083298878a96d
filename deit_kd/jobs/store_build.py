"""``deit-kd store build``: run a teacher once on every view, in one go or in parts that are joined."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from deit_kd.config import Config
from deit_kd.console import SECONDS_BETWEEN_LINES, ViewMeter, duration_text, say, size_text
from deit_kd.data import Splits, TrainingLoader
from deit_kd.distributed import Processes, from_main, on_main, process_group
from deit_kd.interfaces import Batch, InputError, counted
from deit_kd.machine import seconds_of
from deit_kd.runs.data_errors import DataErrors, merge
from deit_kd.runs.opening import claimed
from deit_kd.runs.photos import agreed_splits, build_data_errors
from deit_kd.runs.viewing import build_loader_of_all, cached
from deit_kd.store import (
    MANIFEST,
    PARTS,
    VALIDATION,
    LabelStore,
    Plan,
    RecordingTeacher,
    Share,
    epoch_part,
    forget_parts,
    missing_parts,
    plan_of,
    progress_of_parts,
)
from deit_kd.teaching.fit import is_unfitted, online_teacher, teacher_folder
from deit_kd.teaching.recording import fill_epoch, fill_validation, shares_of_dense, writing


def build(config: Config, folder: str | None, epochs: int | None, batch_size: int, part: str | None = None) -> None:
    """Run the recipe's teacher on every view of every epoch and on the validation set; resume an unfinished build.

    Args:
        config: the recipe.
        folder: of the store; None is ``teacher.store``.
        epochs: view epochs to store; None is ``train.epochs``.
        batch_size: images that each process runs the teacher on at a time.
        part: such as ``3/16``: only this part of the views; `join` finishes. None is all of them.

    Raises:
        InputError: the recipe cannot work, or the folder holds something else.
    """
    folder = _named_folder(config, folder)
    config = config.with_keys(teacher={"store": folder})
    if not config.distill.has_token and not config.stores_vectors:
        raise InputError("distill.kind: 'none' needs no answers of a teacher; set soft or hard")
    if config.teacher.kind == "average":
        raise InputError(
            "teacher.kind: no store can keep the answers of the student's own average, which change with every step; "
            "train with --teacher.kind average as it is, or name a network"
        )
    if batch_size < 1 or (epochs is not None and epochs < 1):
        raise InputError(f"store build: --epochs {epochs} and --batch_size {batch_size} must be above 0")
    epochs = epochs or config.train.epochs
    share = None if part is None else Share.parse(part, epochs, batch_size)
    with process_group(config.train.device) as processes, ExitStack() as stack:
        if share is not None:
            on_main(processes, partial(share.refuse_other, folder))
        splits = agreed_splits(config, processes)
        splits = splits._replace(train=cached(config, splits.train, processes))
        loader = build_loader_of_all(config, splits.train, processes)
        with _one_fit(config, folder, splits, processes, share):
            teacher, checkpoint = online_teacher(config, processes, splits)
            store = stack.enter_context(writing(config, folder, splits, loader, processes, teacher, checkpoint, share))
        if processes.is_main:
            whole = store.record.bytes_per_view * loader.views_per_epoch * epochs
            say(
                f"store: {folder}, {counted(epochs, 'epoch')} of {loader.views_per_epoch} views, "
                f"{store.record.bytes_per_view} bytes each: {size_text(whole)}"
            )
            if epochs < config.train.epochs and epochs % config.augment.repeats:
                say(f"warning: {_better_epochs(epochs, config.augment.repeats)}")
        place = store.folder if share is None else share.folder(folder)
        errors = build_data_errors(config, splits, place, processes)
        if share is None or share.number == 1:
            fill_validation(config, store, teacher, splits, processes, errors)
        recorder = RecordingTeacher(teacher, store, shares_of_dense(config, loader))
        if share is not None:
            _fill_share(store, share, recorder, loader, processes, errors)
            return
        whole_epochs = dict.fromkeys(range(epochs), range(loader.views_per_epoch))
        total = epochs * loader.views_per_epoch
        last = _fill_epochs(store, recorder, loader, whole_epochs, epochs, processes, batch_size, errors)
        if processes.is_main:
            saving = _saving(recorder, last, total, processes.device)
            say(f"store: {store.folder} holds {counted(store.epochs, 'epoch')}{saving}")


def join(config: Config, folder: str | None) -> None:
    """Finish a store that was built in parts: join what they have answered, without a teacher or photos.

    Args:
        config: only ``teacher.store`` is read.
        folder: of the store; None is ``teacher.store``.

    Raises:
        InputError: a part is missing or still being built, another process joins them, or a file is damaged.
    """
    store = LabelStore(folder := _named_folder(config, folder))
    with LabelStore.lock(folder):
        plan = plan_of(folder)
        if plan is None:
            say(f"store: {folder} has no parts to join; it holds {counted(store.epochs, 'epoch')}")
            return
        _refuse_missing(store, plan)
        names = [epoch_part(epoch) for epoch in range(plan["epochs"])]
        with ViewMeter(len(names) * store.manifest["views"], is_main=True) as meter:
            for name in names:
                store.finish(name)
                meter.advance(store.manifest["views"])
        store.verify([VALIDATION, *names])
        merge(store.folder, [Share(number, plan).folder(folder) for number in range(1, plan["parts"] + 1)])
        forget_parts(store)
    say(
        f"store: {folder} holds {counted(store.epochs, 'epoch')}, joined from {counted(plan['parts'], 'part')}; "
        "all checksums match"
    )


def _refuse_missing(store: LabelStore, plan: Plan) -> None:
    lacking = missing_parts(store, plan)
    if lacking:
        names = [Share(number, plan).name for number in sorted(lacking)]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise InputError(
            f"store build --join: {store.folder} lacks {lacking.total()} answers of part{'s' * (len(names) > 1)} "
            f"{', '.join(names[:8])}{more}; build them with --part, then run --join again"
        )


def _named_folder(config: Config, folder: str | None) -> str:
    if folder is None and config.teacher.store is None:
        raise InputError("--store: is not set; name the folder of the label store")
    return folder or str(config.teacher.store)


@contextmanager
def _one_fit(config: Config, folder: str, splits: Splits, processes: Processes, share: Share | None) -> Iterator[None]:
    """Let one part of a store fit its teacher and begin the store, while the others wait.

    They wait in the folder of the store, since that is one for all: where they do not see the same teachers, each part
    would otherwise fit its own, and all but one would be refused hours later.

    Raises:
        InputError: the store was begun with a fitted teacher that is not here.
    """
    if share is None or not from_main(processes, partial(is_unfitted, config, splits)):
        yield
        return
    place = Path(folder).expanduser()

    def refuse_another() -> None:
        if (place / MANIFEST).is_file() and is_unfitted(config, splits):
            raise InputError(
                f"teacher.fit.folder: {teacher_folder(config, splits)} is not here, and another part of {folder} was "
                "built with it; let all parts see the same folder, or copy it"
            )

    with claimed(place / PARTS / "teacher", processes, f"store: another part of {folder} fits the teacher; waiting"):
        on_main(processes, refuse_another)
        yield


def _better_epochs(epochs: int, repeats: int) -> str:
    return (
        f"with augment.repeats {repeats}, {epochs} epochs do not show all photos equally often; for runs of more "
        f"epochs store {-(-epochs // repeats) * repeats}, or another multiple of {repeats}"
    )


def _fill_epochs(
    store: LabelStore,
    recorder: RecordingTeacher,
    loader: TrainingLoader,
    positions: Mapping[int, range],
    epochs: int,
    processes: Processes,
    batch_size: int,
    errors: DataErrors,
    told: Callable[[ViewMeter], None] = lambda meter: None,
) -> list[Batch]:
    """Answer `positions`, by epoch, of a store of so many `epochs`; return the last batch, if there was one."""
    last: list[Batch] = []
    with ViewMeter(sum(map(len, positions.values())), processes.is_main) as meter:
        done = 0
        for epoch, within in positions.items():

            def advance(batch: Batch) -> None:
                last[:] = [batch]
                meter.advance(batch.places * processes.count)
                told(meter)

            fill_epoch(store, recorder, loader, epoch, processes, batch_size, errors, advance, within)
            done += len(within)
            meter.reach(done, f"epoch {epoch + 1}/{epochs}, {size_text(store.bytes_on_disk)} on disk")
    return last


def _fill_share(
    store: LabelStore,
    share: Share,
    recorder: RecordingTeacher,
    loader: TrainingLoader,
    processes: Processes,
    errors: DataErrors,
) -> None:
    """Answer one part of a store, and say now and then how far all parts are."""
    positions, plan = share.positions(store), share.plan
    own, pause = sum(map(len, positions.values())), max(SECONDS_BETWEEN_LINES, plan["parts"])
    last_told = time.monotonic()

    def told(meter: ViewMeter) -> None:  # each part reads at most one file a second
        nonlocal last_told
        if processes.is_main and time.monotonic() - last_told > pause:
            last_told = time.monotonic()
            share.tell(store.folder, meter.done, own, meter.rate)
            say(progress_of_parts(store, plan))

    if processes.is_main:
        share.tell(store.folder, 0, own, 0.0)
    _fill_epochs(store, recorder, loader, positions, plan["epochs"], processes, plan["batch_size"], errors, told)
    if processes.is_main:
        share.tell(store.folder, own, own, 0.0)
        say(f"store: part {share.name} of {store.folder} is done, {own} views; {progress_of_parts(store, plan)}")


def _saving(recorder: RecordingTeacher, last: list[Batch], views: int, device: torch.device) -> str:
    """Say how long the teacher alone would take for `views`, measured on the last batch."""
    if not last or not len(last[0].labels):
        return ""

    answering = seconds_of(lambda: recorder(last[0]._replace(view_ids=None)), device)
    seconds = answering / len(last[0].labels) * views
    return (
        f"; each run that reads them all saves about {duration_text(seconds)} of the teacher's time on one such device"
    )
