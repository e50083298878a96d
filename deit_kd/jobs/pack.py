"""``deit-kd data pack``: write a tree of photos to tar shards."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.progress import TaskID

from deit_kd.config import Config
from deit_kd.console import console, duration_text, progress_bar, say, size_text
from deit_kd.data import Photos, one_split
from deit_kd.data.shard_index import Manifest
from deit_kd.data.subsets import share_of
from deit_kd.files import check_writable, held
from deit_kd.interfaces import InputError, counted
from deit_kd.interrupts import raise_pending
from deit_kd.packing import Look, check_room, keep_to_plan, pack, record_packed
from deit_kd.places import photos_root


def pack_tree(
    config: Config, tree: str, out: Path, splits: Sequence[str], look: Look, shard_bytes: int, threads: int
) -> None:
    """Pack the splits of a tree into ``out/<split>/*.tar`` with an index each, and write a manifest.

    What a former, killed call has finished is kept.

    Args:
        config: says which splits there are, which of their photos to take, and what to do with one that cannot be
            packed.
        tree: folder of the photos.
        out: folder for the shards.
        splits: to pack; the recipe's two, or the whole tree if it has neither, unless any are named.
        look: of the packed photos.
        shard_bytes: what the photos of one shard take in the tree, at most.
        threads: that read and encode.

    Raises:
        InputError: the tree is no tree, `out` holds something else, or a photo cannot be packed.
    """
    top = photos_root(tree)
    named = [split for split in (config.data.train_split, config.data.validation_split) if (top / split).is_dir()]
    taken = splits or named or ["."]
    parts = {split: _taken(config, tree, split) for split in taken}
    for part in parts.values():
        if part.root is not None and out.resolve().is_relative_to(part.root.resolve()):
            raise InputError(f"{out}: is inside the photos of {part.root}; name a folder elsewhere")
    check_writable("data pack", out)
    since = time.perf_counter()
    with held(out, f"{out}: another process packs photos there; wait for it"):
        keep_to_plan(out, parts, look, shard_bytes)
        if look.quality is None:
            check_room(out, parts.values())
        manifest = _pack_all(config, parts, out, look, shard_bytes, threads)
    for split, record in manifest["splits"].items():
        count, size = len(record["shards"]), sum(shard["size"] for shard in record["shards"])
        say(f"{split}: {counted(record['photos'], 'photo')} in {counted(count, 'shard')}, {size_text(size)}")
    for split, names in manifest["left_out"].items():
        say(f"{split}: {counted(len(names), 'photo')} could not be packed, see left_out in {out}/manifest.json")
    say(f"packed in {duration_text(time.perf_counter() - since)}: --data.name shards --data.root {out}")


def _taken(config: Config, tree: str, split: str) -> Photos:
    """Return the photos of a split that a recipe takes."""
    data = config.data
    if data.rest is not None:
        raise InputError(f"data.rest: {data.rest}, but shards keep the classes of the tree; unset it")
    photos = one_split(name="folder", root=tree, split=split, classes=data.classes)
    return share_of(photos, data.fraction, data.per_class) if split == data.train_split else photos


def _pack_all(
    config: Config, parts: dict[str, Photos], out: Path, look: Look, shard_bytes: int, threads: int
) -> Manifest:
    left_out: dict[str, list[str]] = defaultdict(list)
    classes = sorted({name for part in parts.values() for name in part.classes})
    progress = progress_bar()
    progress.disable = not console.is_terminal
    with progress:
        for split, photos in parts.items():
            task = progress.add_task(f"packing {split}", total=len(photos), note="")

            def advance(count: int, task: TaskID = task) -> None:
                raise_pending()
                progress.advance(task, count)

            def leave_out(name: str, reason: str, split: str = split) -> None:
                if config.data.on_error == "raise":
                    raise InputError(f"{reason}; data.on_error skip leaves it out")
                left_out[split].append(name)
                if sum(map(len, left_out.values())) > config.data.max_errors:
                    raise InputError(f"data.max_errors: {config.data.max_errors} photos are left out, and {reason}")
                say(f"left out: {reason}")

            pack(
                photos,
                out / split,
                numbers=[classes.index(name) for name in photos.classes],
                look=look,
                shard_bytes=shard_bytes,
                threads=threads,
                leave_out=leave_out,
                advance=advance,
            )
    return record_packed(out, parts, classes, look)
