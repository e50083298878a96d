"""``deit-kd data check``: read every photo of a tree once, and report what training would stumble over."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track
from rich.table import Table
from torchvision.datasets.folder import IMG_EXTENSIONS

from deit_kd.config import Config
from deit_kd.console import console, say
from deit_kd.data import Photos, Splits, UnreadableImage
from deit_kd.data.listing import not_taken
from deit_kd.data.source import TreeFiles
from deit_kd.files import write_json
from deit_kd.interrupts import raise_pending
from deit_kd.runs.photos import build_splits, tell_unread


def tell_taken(config: Config, splits: Splits) -> None:
    """Print what part of the photos a recipe takes, if not all."""
    tell_unread(config)
    if not config.data.taken:
        return
    everything = config.with_keys(data={"classes": None, "rest": None, "fraction": None, "per_class": None})
    whole = build_splits(everything)
    (train, validation), (all_train, all_validation) = splits, whole
    named = str(len(train.classes))
    if train.rest is not None:
        named = f"{len(train.classes) - 1}, and as {train.rest.name} the {len(train.rest.classes)} others,"
    say(
        f"taken: {named} of {len(all_train.classes)} classes, {len(train)} of {len(all_train)} training "
        f"and {len(validation)} of {len(all_validation)} validation images ({config.data.taken})"
    )


@dataclass(frozen=True)
class Finding:
    """What reading one photo found."""

    split: str
    name: str
    size: tuple[int, int] | None  # pixels, width and height; None when it cannot be read
    digest: str | None  # of the file's bytes; None when it cannot be read
    error: str | None


def check_data(splits: Splits, processes: int, json_file: Path | None) -> bool:
    """Print counts by class and split, image sizes, unreadable files and exact duplicates; return whether all is well.

    Duplicates are files with the same bytes. One that is in both splits leaks the validation set into training.

    Args:
        splits: of files on disk.
        processes: how many read at a time.
        json_file: where to write the findings as well.
    """
    raise_pending()
    findings = _read_all(splits, processes)
    unreadable = [finding for finding in findings if finding.error is not None]
    within, across = _duplicates(findings)
    console.print(_class_table(splits))
    sizes = [finding.size for finding in findings if finding.size is not None]
    if sizes:
        widths, heights = zip(*sizes, strict=True)
        say(f"sizes: {min(widths)} to {max(widths)} pixels wide, {min(heights)} to {max(heights)} high")
    others = _not_taken(splits)
    if others:
        kinds = ", ".join(f"{others[kind]} {kind or 'without one'}" for kind in sorted(others))
        say(f"not taken: {others.total()} files with another extension ({kinds}); taken: {' '.join(IMG_EXTENSIONS)}")
    say(f"unreadable: {len(unreadable)}")
    for finding in unreadable:
        say(f"  {finding.error}")
    for title, groups in (("within a split", within), ("across splits (leakage)", across)):
        say(f"exact duplicates {title}: {len(groups)}")
        for group in groups:
            say("  " + " = ".join(group))
    if json_file is not None:
        counts = {split: dict(_counts(photos)) for split, photos in splits._asdict().items()}
        unread = [{"split": finding.split, "name": finding.name, "error": finding.error} for finding in unreadable]
        write_json(
            json_file,
            {
                "counts": counts,
                "not_taken": others,
                "unreadable": unread,
                "duplicates": {"within": within, "across": across},
            },
        )
    return not unreadable and not across


def _not_taken(splits: Splits) -> Counter[str]:
    """Count the files in the folders of a tree that no run takes, by extension."""
    trees = {photos.root: photos.classes for photos in splits if isinstance(photos.source, TreeFiles) and photos.root}
    return sum((not_taken(root, classes) for root, classes in trees.items()), Counter())


def _read_all(splits: Splits, processes: int) -> list[Finding]:
    photos = [(split, index) for split, photos in splits._asdict().items() for index in range(len(photos))]
    with ProcessPoolExecutor(processes, initializer=_check_these, initargs=(splits,)) as pool:
        found: Iterable[Finding] = pool.map(_read, photos, chunksize=64)
        return list(track(found, "reading", len(photos), console=console, disable=not console.is_terminal))


_checked: dict[str, Photos] = {}  # in a process that reads, by split


def _check_these(splits: Splits) -> None:
    _checked.update(splits._asdict())


def _read(photo: tuple[str, int]) -> Finding:
    split, index = photo
    photos = _checked[split]
    name = photos.names[index]
    try:
        size = photos.image(index).size
    except UnreadableImage as error:
        return Finding(split, name, None, None, str(error))
    return Finding(split, name, size, hashlib.blake2b(photos.content(index), digest_size=16).hexdigest(), None)


def _duplicates(findings: list[Finding]) -> tuple[list[list[str]], list[list[str]]]:
    by_digest: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.digest is not None:
            by_digest[finding.digest].append(finding)
    within: list[list[str]] = []
    across: list[list[str]] = []
    for group in by_digest.values():
        if len(group) > 1:
            names = [f"{finding.split}/{finding.name}" for finding in group]
            (within if len({finding.split for finding in group}) == 1 else across).append(names)
    return within, across


def _counts(photos: Photos) -> Counter[str]:
    return Counter(photos.classes[label] for label in photos.labels)


def _class_table(splits: Splits) -> Table:
    table = Table(title=f"{len(splits.train)} training and {len(splits.validation)} validation images")
    table.add_column("class")
    table.add_column("train", justify="right")
    table.add_column("validation", justify="right")
    train, validation = _counts(splits.train), _counts(splits.validation)
    for name in splits.train.classes:
        table.add_row(name, str(train[name]), str(validation[name]))
    return table
