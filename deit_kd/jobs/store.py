"""``deit-kd store``: run a teacher once on every view, and let any student read its answers."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from deit_kd.config import Config
from deit_kd.console import ViewMeter, duration_text, say, size_text
from deit_kd.data import Splits, TrainingLoader
from deit_kd.distributed import Processes, process_group
from deit_kd.interfaces import Batch, InputError
from deit_kd.randomness import generator
from deit_kd.runs import parts
from deit_kd.runs.data_errors import DataErrors
from deit_kd.runs.viewing import build_training_loader, cached
from deit_kd.store import VALIDATION, LabelStore, RecordingTeacher, epoch_part
from deit_kd.teachers import NetworkTeacher
from deit_kd.teaching.fit import online_teacher
from deit_kd.teaching.recording import fill_epoch, fill_validation, writing
from deit_kd.teaching.store_identity import accepted, identity, in_use, refuse_other, verify, weights_hash
from deit_kd.teaching.stored import open_store

LARGEST_CHANGED_SHARE = 0.01  # of changed argmaxes that a check accepts
LARGEST_GAP_SHARE = 0.05  # of the logits' spread that a check accepts: several times bf16's rounding


def build(config: Config, folder: str | None, epochs: int | None, batch_size: int) -> None:
    """Run the recipe's teacher on every view of every epoch and on the validation set; resume an unfinished build.

    Args:
        config: the recipe.
        folder: of the store; None is ``teacher.store``.
        epochs: view epochs to store; None is ``train.epochs``.
        batch_size: images that each process runs the teacher on at a time.

    Raises:
        InputError: the recipe cannot work, or the folder holds something else.
    """
    folder = folder or config.teacher.store
    if folder is None:
        raise InputError("--store: is not set; name the folder of the label store")
    if not config.distill.has_token:
        raise InputError("distill.kind: 'none' needs no answers of a teacher; set soft or hard")
    if batch_size < 1 or (epochs is not None and epochs < 1):
        raise InputError(f"store build: --epochs {epochs} and --batch_size {batch_size} must be above 0")
    epochs = epochs or config.train.epochs
    with process_group(config.train.device) as processes:
        splits = parts.agreed_splits(config, processes)
        splits = splits._replace(train=cached(config, splits.train, processes))
        loader = _loader_of_all(config, splits, processes)
        teacher, checkpoint = online_teacher(config, processes, splits)
        with writing(config, folder, splits, loader, processes, teacher, checkpoint) as store:
            if processes.is_main:
                whole = store.record.bytes_per_view * loader.views_per_epoch * epochs
                say(
                    f"store: {folder}, {epochs} epochs of {loader.views_per_epoch} views, "
                    f"{store.record.bytes_per_view} bytes each: {size_text(whole)}"
                )
                if epochs < config.train.epochs and epochs % config.augment.repeats:
                    say(f"warning: {_better_epochs(epochs, config.augment.repeats)}")
            errors = parts.build_data_errors(config, splits, store.folder, processes)
            fill_validation(config, store, teacher, splits, processes, errors)
            _fill_epochs(store, RecordingTeacher(teacher, store), loader, range(epochs), processes, batch_size, errors)


def check(config: Config, folder: str, samples: int) -> dict[str, float]:
    """Compare every checksum, then run the teacher on random views again and compare its answers.

    If they agree, the executor and the versions of the libraries in use may use the store from now on.

    Returns:
        ``largest_difference`` of the kept logits, their ``mean_gap_share`` of the logits' spread, and the
        ``changed_share`` of the argmax.

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
        verify(store, [VALIDATION, *map(epoch_part, range(store.epochs))], processes)
        views = loader.views_per_epoch
        drawn = np.unique(generator("store check", config.seed).integers(store.epochs * views, size=samples))
        batches = loader.views(np.stack(np.divmod(drawn, views), axis=1), config.evaluate.batch_size)
        result = _compare(store, teacher, batches, processes.device)
        if processes.is_main:
            say(
                f"store: {folder}, all checksums match; {len(drawn)} views run again: largest difference "
                f"{result['largest_difference']:.4f} (on average {100 * result['mean_gap_share']:.2f} % of the logits' "
                f"spread), argmax changed in {100 * result['changed_share']:.2f} %"
            )
        if result["changed_share"] > LARGEST_CHANGED_SHARE or not result["mean_gap_share"] <= LARGEST_GAP_SHARE:
            raise InputError(
                f"store check: {folder} disagrees with this teacher's answers to these views (allowed: "
                f"{100 * LARGEST_CHANGED_SHARE:g} % of the argmax, {100 * LARGEST_GAP_SHARE:g} % of the spread); build "
                "a store with this executor and these libraries"
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
    say(f"a record: {kept} of {record.classes} classes, {record.bytes_per_view} bytes")
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
    epochs: range,
    processes: Processes,
    batch_size: int,
    errors: DataErrors,
) -> None:
    last: list[Batch] = []
    total = len(epochs) * loader.views_per_epoch
    meter = ViewMeter(total, processes.is_main)
    with meter:
        for epoch in epochs:

            def advance(batch: Batch) -> None:
                last[:] = [batch]
                meter.advance(batch.places * processes.count)

            fill_epoch(store, recorder, loader, epoch, processes, batch_size, errors, advance)
            meter.reach(
                (epoch + 1) * loader.views_per_epoch,
                f"epoch {epoch + 1}/{len(epochs)}, {size_text(store.bytes_on_disk)} on disk",
            )
    if processes.is_main:
        say(f"store: {store.folder} holds {store.epochs} epochs{_saving(recorder, last, total, processes.device)}")


def _saving(recorder: RecordingTeacher, last: list[Batch], views: int, device: torch.device) -> str:
    """Say how long the teacher alone would take for `views`, measured on the last batch."""
    if not last or not len(last[0].labels):
        return ""

    def settle() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    since = settle()
    recorder(last[0]._replace(view_ids=None))
    seconds = (settle() - since) / len(last[0].labels) * views
    return (
        f"; each run that reads them all saves about {duration_text(seconds)} of the teacher's time on one such device"
    )


def _compare(
    store: LabelStore, teacher: NetworkTeacher, batches: Iterable[Batch], device: torch.device
) -> dict[str, float]:
    rows = []
    for batch in batches:
        assert batch.view_ids is not None
        records = store.find(batch.view_ids)
        store.expect_missing(batch.missing_ids())
        logits = teacher(batch.to(device)).logits.cpu()
        changed = store.record.decode(records).argmax(-1) != logits.argmax(-1)
        rows.append(torch.stack([store.record.gap(records, logits), logits.std(-1), changed.float()]))
    gap, spread, changed = torch.cat(rows, dim=1)
    return {
        "largest_difference": float(gap.max()),
        "mean_gap_share": float(gap.mean() / spread.mean()),
        "changed_share": float(changed.mean()),
    }


def _named(libraries: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in libraries.items())
