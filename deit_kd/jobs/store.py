"""``deit-kd store check`` and ``info``: what a label store holds, and whether its answers are still the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from deit_kd.config import Config
from deit_kd.console import say, size_text
from deit_kd.distributed import process_group
from deit_kd.interfaces import POOLED, Batch, InputError, counted
from deit_kd.randomness import generator
from deit_kd.runs.photos import agreed_splits
from deit_kd.runs.viewing import build_loader_of_all, cached
from deit_kd.store import VALIDATION, Gap, LabelStore, epoch_part, plan_of, progress_of_parts
from deit_kd.teachers import FrozenTeacher, NetworkTeacher
from deit_kd.teaching.fit import online_teacher
from deit_kd.teaching.recording import shares_of_dense
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
        splits = agreed_splits(config, processes)
        splits = splits._replace(train=cached(config, splits.train, processes))
        loader = build_loader_of_all(config, splits.train, processes)
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
            say(f"store: {folder}, all checksums match; {counted(len(drawn), 'view')} run again:")
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
        f"{folder}: {counted(store.epochs, 'epoch')} of {views} views, "
        f"{store.manifest['validation']} validation images, {size_text(store.bytes_on_disk)}"
    )
    vector = "" if record.width is None else f", a vector of {record.width}"
    places = "" if record.grid is None else f", the class of each of {record.grid[0]} x {record.grid[1]} places"
    say(f"a record: {kept} of {record.classes} classes{places}{vector}, {record.bytes_per_view} bytes")
    if (plan := plan_of(folder)) is not None:
        say(f"parts: {progress_of_parts(store, plan)}")
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
