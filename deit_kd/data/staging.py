"""Shards copied to a local disk before they are read, once for all processes of a machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict

from deit_kd.console import say, size_text
from deit_kd.data.cache import in_threads
from deit_kd.data.decode import UnreadableImage
from deit_kd.data.shards import Shard, Shards
from deit_kd.files import InUse, check_writable, held, read_json, whole_or_not, write_json
from deit_kd.interfaces import InputError

DONE = "staged.json"
AT_ONCE = 2**24  # bytes that a copy reads
PAUSE = 0.2  # seconds between two looks at what another process copies


class Copies(TypedDict):
    """What the copies of some shards look like: the name, size and time of the last change of each."""

    shards: list[tuple[str, int, int]]


def staged(source: Shards, into: Path) -> Shards:
    """Return the same images in copies of their shards, which are made unless they are there.

    The copies have a folder of their own in `into`, named by the shards and what is in them. One process of a machine
    makes them; the others wait.

    Raises:
        InputError: `into` cannot be written, has too little room, or the copies are not like the shards.
    """
    check_writable("data.stage", into)
    shards = [source.files[number] for number in _used(source)]
    folder = into / f"{Path(shards[0].path).parent.name}-{_identity(source, shards)}"
    while (copies := _found(folder, shards)) is None:
        try:
            with held(folder, f"data.stage: {folder} is written to by this process"):
                if _found(folder, shards) is None:
                    _stage(source, shards, folder)
        except InUse:
            time.sleep(PAUSE)
    return source.moved(dict(zip(shards, copies, strict=True)))


def _used(source: Shards) -> list[int]:
    return [int(number) for number in np.unique(source.shard)]


def _identity(source: Shards, shards: Sequence[Shard]) -> str:
    hasher = hashlib.blake2b(repr([(Path(one.path).name, one.size, one.changed_ns) for one in shards]).encode())
    hasher.update(source.digest.tobytes())
    return hasher.hexdigest()[:16]


def _found(folder: Path, shards: Sequence[Shard]) -> list[Shard] | None:
    """Return the copies of all shards, in their order; None unless all are there as they were made."""
    try:
        noted = read_json(folder / DONE, Copies)["shards"]
    except InputError:
        return None
    copies = [_as_it_is(folder / Path(one.path).name) for one in shards]
    is_whole = [(Path(one.path).name, one.size, one.changed_ns) for one in copies if one] == noted
    return [one for one in copies if one] if is_whole else None


def _as_it_is(path: Path) -> Shard | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return Shard(str(path), found.st_size, found.st_mtime_ns)


def _stage(source: Shards, shards: Sequence[Shard], folder: Path) -> None:
    there = [_as_it_is(folder / Path(one.path).name) for one in shards]
    missing = [one for one, copy in zip(shards, there, strict=True) if copy is None or copy.size != one.size]
    needed, free = sum(one.size for one in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"data.stage: {folder.parent} needs {size_text(needed)} more, and {size_text(free)} are free; free space, "
            "or name another folder"
        )
    say(f"data.stage: copying {len(missing)} of {len(shards)} shards ({size_text(needed)}) to {folder}")
    numbers = {source.files[number].path: number for number in _used(source)}

    def copy(index: int) -> Shard:
        return _copied(source, numbers[shards[index].path], folder)

    copies = in_threads(copy, range(len(shards)), "copying shards", shown=True)
    write_json(folder / DONE, Copies(shards=[(Path(one.path).name, one.size, one.changed_ns) for one in copies]))


def _copied(source: Shards, number: int, folder: Path) -> Shard:
    """Copy one shard unless a good copy is there."""
    shard = source.files[number]
    path = folder / Path(shard.path).name
    there = _as_it_is(path)
    if there is not None and _first_wrong(source, number, there) is None:
        return there
    with open(shard.path, "rb") as file, whole_or_not(path) as target:
        shutil.copyfileobj(file, target, AT_ONCE)
    copy = _as_it_is(path)
    wrong = None if copy is None else _first_wrong(source, number, copy)
    if copy is None or wrong is not None:
        path.unlink(missing_ok=True)
        raise InputError(f"data.stage: {path} is not like {shard.path} (from byte {wrong}); check the disk")
    return copy


def _first_wrong(source: Shards, number: int, copy: Shard) -> int | None:
    """Return where the first image is that the copy of a shard lacks; one that the shard lacks as well is none."""
    copied = source.moved({source.files[number]: copy})
    for row in np.flatnonzero(source.shard == number).tolist():
        if not _is_right(copied, row) and _is_right(source, row):
            return int(source.offset[row])
    return None


def _is_right(source: Shards, row: int) -> bool:
    try:
        source.open(row, "").close()
    except UnreadableImage:
        return False
    return True
