"""``deit-kd store``: run a teacher once on every view, and let any student read its answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from deit_kd.config import Config
from deit_kd.console import SECONDS_BETWEEN_LINES, ViewMeter, duration_text, say, size_text
from deit_kd.data import Splits, TrainingLoader
from deit_kd.distributed import Processes, from_main, on_main, process_group
from deit_kd.interfaces import POOLED, Batch, InputError
from deit_kd.machine import seconds_of
from deit_kd.randomness import generator
from deit_kd.runs import parts
from deit_kd.runs.data_errors import DataErrors, merge
from deit_kd.runs.opening import claimed
from deit_kd.runs.viewing import build_training_loader, cached
from deit_kd.store import (
    MANIFEST,
    PARTS,
    VALIDATION,
    Gap,
    LabelStore,
    Plan,
    RecordingTeacher,
    Share,
    all_progress,
    epoch_part,
    forget_parts,
    missing_parts,
    plan_of,
    seconds_left,
)
from deit_kd.teachers import FrozenTeacher, NetworkTeacher
from deit_kd.teaching.fit import is_unfitted, online_teacher, teacher_folder
from deit_kd.teaching.recording import fill_epoch, fill_validation, shares_of_dense, writing
from deit_kd.teaching.store_identity import accepted, identity, in_use, refuse_other, verify, weights_hash
from deit_kd.teaching.stored import open_store

# Shares that a check accepts: few other classes, and numbers that differ by several times bf16's rounding.
ACCEPTED = {"argmax": 0.01, "logits": 0.05, "dense": 0.01, "pooled": 0.05}
FOUND = {
    "argmax": "of the views have another class",
    "logits": "of the spread is how far the logits of a view are from the store's",
    "dense": "of the places have another class",
    "pooled": "of the spread is how far the vector of a view is from the store's",
}


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
        splits = parts.agreed_splits(config, processes)
        splits = splits._replace(train=cached(config, splits.train, processes))
        loader = _loader_of_all(config, splits, processes)
        with _one_fit(config, folder, splits, processes, share):
            teacher, checkpoint = online_teacher(config, processes, splits)
            store = stack.enter_context(writing(config, folder, splits, loader, processes, teacher, checkpoint, share))
        if processes.is_main:
            whole = store.record.bytes_per_view * loader.views_per_epoch * epochs
            say(
                f"store: {folder}, {epochs} epochs of {loader.views_per_epoch} views, "
                f"{store.record.bytes_per_view} bytes each: {size_text(whole)}"
            )
            if epochs < config.train.epochs and epochs % config.augment.repeats:
                say(f"warning: {_better_epochs(epochs, config.augment.repeats)}")
        place = store.folder if share is None else share.folder(folder)
        errors = parts.build_data_errors(config, splits, place, processes)
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
            say(f"store: {store.folder} holds {store.epochs} epochs{_saving(recorder, last, total, processes.device)}")


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
            say(f"store: {folder} has no parts to join; it holds {store.epochs} epochs")
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
    say(f"store: {folder} holds {store.epochs} epochs, joined from {plan['parts']} parts; all checksums match")


def _refuse_missing(store: LabelStore, plan: Plan) -> None:
    lacking = missing_parts(store, plan)
    if lacking:
        names = [Share(number, plan).name for number in sorted(lacking)]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise InputError(
            f"store build --join: {store.folder} lacks {lacking.total()} answers of part{'s' * (len(names) > 1)} "
            f"{', '.join(names[:8])}{more}; build them with --part, then run --join again"
        )


def check(config: Config, folder: str, samples: int) -> dict[str, float]:
    """Compare every checksum, then run the teacher on random views again and compare its answers.

    If they agree, the executor and the versions of the libraries in use may use the store from now on.

    Returns:
        How far each column of the store is from them, as a share, see `Record.gaps`.

    Raises:
        InputError: the store is damaged or of another recipe, or the answers differ.
    """
    if samples < 1:
        raise InputError(f"--samples: {samples} is not above 0")
    with process_group(config.train.device) as processes:
        splits = parts.agreed_splits(config, processes)
        splits = splits._replace(train=cached(config, splits.train, processes))
        loader = _loader_of_all(config, splits, processes)
        store = open_store(folder)
        loader.order_as(store.views_version)
        teacher, checkpoint = online_teacher(config, processes, splits)
        refuse_other(store, identity(config, splits) | {"teacher.weights": weights_hash(teacher, checkpoint)})
        if store.record.grid is not None and not config.distill.stores_dense:
            raise InputError(
                f"store check: {folder} holds the class of each place, which depends on the dense term of the recipe, "
                "and this recipe has none; name the one that the store was built with"
            )
        verify(store, [VALIDATION, *map(epoch_part, range(store.epochs))], processes)
        views = loader.views_per_epoch
        drawn = np.unique(generator("store check", config.seed).integers(store.epochs * views, size=samples))
        batches = loader.views(np.stack(np.divmod(drawn, views), axis=1), config.evaluate.batch_size)
        result = _compare(store, teacher, batches, processes.device, shares_of_dense(config, loader))
        if processes.is_main:
            say(f"store: {folder}, all checksums match; {len(drawn)} views run again:")
            for name, share in result.items():
                say(f"  {name}: {100 * share:.2f} % {FOUND[name]} (at most {100 * ACCEPTED[name]:g} %)")
        wrong = [name for name, share in result.items() if not share <= ACCEPTED[name]]
        if wrong:
            raise InputError(
                f"store check: {folder} disagrees with this teacher's answers to these views ({', '.join(wrong)}); "
                "build a store with this executor and these libraries"
            )
        if processes.is_main and (here := in_use(config)) not in accepted(store):
            store.accept(here)
            say(f"store: now accepts {_named(here)}")
        return result


def info(folder: str) -> None:
    """Print what a store holds, what it depends on, and what may use it.

    Raises:
        InputError: there is no store.
    """
    store = LabelStore(folder)
    record, views = store.record, store.manifest["views"]
    kept = "only the hard label" if not record.holds_logits else f"{min(record.top, record.classes)} logits"
    say(
        f"{folder}: {store.epochs} epochs of {views} views, {store.manifest['validation']} validation images, "
        f"{size_text(store.bytes_on_disk)}"
    )
    vector = "" if record.width is None else f", a vector of {record.width}"
    places = "" if record.grid is None else f", the class of each of {record.grid[0]} x {record.grid[1]} places"
    say(f"a record: {kept} of {record.classes} classes{places}{vector}, {record.bytes_per_view} bytes")
    if (plan := plan_of(folder)) is not None:
        say(f"parts: {_of_all_parts(store, plan)}")
    begun = [path.name.removesuffix(".pieces") for path in sorted(store.folder.glob("*.pieces"))]
    if begun:
        say(f"unfinished: {', '.join(begun)}; deit-kd store build continues them")
    if store.manifest["teacher"]["random_weights"]:
        say("warning: the teacher has random weights and teaches nothing")
    if store.holds(VALIDATION):
        say(f"teacher: top-1 {store.score()['top1']:.2f} % on the validation images")
    say("built for these values, and refused where one differs:")
    for field, value in store.manifest["identity"].items():
        shown = f"{len(value)} names" if field == "classes" else value
        say(f"  {field}: {shown}")
    for libraries in accepted(store):
        say(f"  made with: {_named(libraries)}")
    kinds = "soft or hard" if record.holds_logits else "hard"
    say(
        f"may be used with distill.kind {kinds}, and with any student, alpha, temperature, learning rate, batch size, "
        f"number of processes, workers and epochs (above {store.epochs}, the views repeat)"
    )
    if "train.epochs" in store.manifest["identity"]:
        say("a dense term learns from it only with these train.epochs and train.batch_size, since its mix changes")


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


def _loader_of_all(config: Config, splits: Splits, processes: Processes) -> TrainingLoader:
    """Return a loader of all views of an epoch; the caller decides which of them a process loads."""
    return build_training_loader(config, splits.train, replace(processes, rank=0, count=1))


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
            say(_of_all_parts(store, plan))

    if processes.is_main:
        share.tell(store.folder, 0, own, 0.0)
    _fill_epochs(store, recorder, loader, positions, plan["epochs"], processes, plan["batch_size"], errors, told)
    if processes.is_main:
        share.tell(store.folder, own, own, 0.0)
        say(f"store: part {share.name} of {store.folder} is done, {own} views; {_of_all_parts(store, plan)}")


def _of_all_parts(store: LabelStore, plan: Plan) -> str:
    """Say how far all parts of a store are."""
    told, views = all_progress(store.folder, plan), plan["epochs"] * store.manifest["views"]
    if all(part and part["done"] == part["views"] for part in told):
        return f"all {len(told)} parts are done: deit-kd store build --join finishes"
    seconds = seconds_left(told, views, time.time())
    done, begun = sum(part["done"] for part in told if part), sum(part is not None for part in told)
    left = "" if seconds is None else f", {duration_text(seconds)} left"
    return f"{begun} of {len(told)} parts have begun, {100 * done / views:.1f} % of {views} views are answered{left}"


def _saving(recorder: RecordingTeacher, last: list[Batch], views: int, device: torch.device) -> str:
    """Say how long the teacher alone would take for `views`, measured on the last batch."""
    if not last or not len(last[0].labels):
        return ""

    answering = seconds_of(lambda: recorder(last[0]._replace(view_ids=None)), device)
    seconds = answering / len(last[0].labels) * views
    return (
        f"; each run that reads them all saves about {duration_text(seconds)} of the teacher's time on one such device"
    )


def _compare(
    store: LabelStore,
    teacher: NetworkTeacher,
    batches: Iterable[Batch],
    device: torch.device,
    shares: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Return how far each column is from the teacher's answers to the views of `batches`, see `Gap.share`."""
    teacher.ask_for_dense(store.record.grid is not None)
    if store.record.width is not None:
        assert isinstance(teacher, FrozenTeacher)  # or it could not have filled the store
        teacher.ask_for((POOLED,))
    gaps: list[dict[str, Gap]] = []
    for batch in batches:
        assert batch.view_ids is not None
        records = store.find(batch.view_ids)
        store.expect_missing(batch.missing_ids())
        answer = teacher(batch.to(device))
        labels = None
        if store.record.grid is not None:
            labels = answer.mixed(shares(batch.view_ids).to(device)).argmax(-1).cpu()
        vectors = None if answer.features is None else answer.features[POOLED].cpu()
        gaps.append(store.record.gaps(records, answer.needed_logits().cpu(), labels, vectors))
    return {name: Gap(*map(torch.cat, zip(*(of[name] for of in gaps), strict=True))).share for name in gaps[0]}


def _named(libraries: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in libraries.items())
