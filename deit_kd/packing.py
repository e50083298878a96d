"""Photos of a tree written to tar shards: the WebDataset layout, whole shards only, the same bytes each time.

Each photo is ``<key>.jpg`` (or its own format), ``<key>.cls`` (its label) and ``<key>.json`` (its name in the tree, its
label and a digest of its bytes). A WebDataset key ends at the first dot of a file's name, so it cannot be the name.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from typing_extensions import TypedDict

from deit_kd.console import size_text
from deit_kd.data import Photos, UnreadableImage, one_split
from deit_kd.data.decode import shrunk
from deit_kd.data.shard_index import MANIFEST, Manifest, SplitRecord, scan, shards_in, write_found
from deit_kd.data.shards import as_text, digest_of
from deit_kd.files import read_json, whole_or_not, write_json
from deit_kd.interfaces import InputError
from deit_kd.tars import END, member, padded

Item = TypeVar("Item")
Made = TypeVar("Made")

PLAN = ".pack.json"
AHEAD = 4  # photos that each thread reads before they are written
OVERHEAD = 3 * 512 + 2 * 512  # bytes in a tar beside a photo's own: three headers, label and name


class Look(NamedTuple):
    """How packed photos look.

    Args:
        short_side: pixels that the shorter side of a larger photo is brought to; None keeps its size.
        quality: of the JPEG files; None packs the files as they are.
    """

    short_side: int | None = None
    quality: int | None = None


class Plan(TypedDict):
    """What a folder of shards is packed from; packing is continued with the same plan only."""

    photos: dict[str, str]
    look: list[int | None]
    shard_bytes: int


class Packed(NamedTuple):
    """One photo on its way into a shard."""

    name: str
    content: bytes | None  # None if it is left out
    reason: str  # why it is left out


def keep_to_plan(out: Path, splits: dict[str, Photos], look: Look, shard_bytes: int) -> None:
    """Write down what `out` is packed from, or compare it with what is written there.

    Raises:
        InputError: `out` holds something else.
    """
    photos = {split: part.digest() for split, part in splits.items()}
    plan = Plan(photos=photos, look=list(look), shard_bytes=shard_bytes)
    if (out / PLAN).exists():
        if read_json(out / PLAN, Plan) != plan:
            raise InputError(f"{out}: holds shards of other photos, or made with other options; name another folder")
    elif any(not name.startswith(".") for name in os.listdir(out)):
        raise InputError(f"{out}: is not empty; name another folder")
    else:
        write_json(out / PLAN, plan)


def check_room(out: Path, splits: Iterable[Photos]) -> None:
    """Raise an InputError if photos that are packed as they are do not fit on the disk."""
    needed = sum(int(photos.source.sizes.clip(0).sum()) + OVERHEAD * len(photos) for photos in splits)
    there = sum(path.stat().st_size for path in out.rglob("*.tar"))
    free = shutil.disk_usage(out).free
    if needed - there > free:
        raise InputError(
            f"{out}: needs {size_text(needed - there)}, and {size_text(free)} are free; free space, or name another "
            "folder"
        )


def pack(
    photos: Photos,
    folder: Path,
    *,
    numbers: Sequence[int],
    look: Look,
    shard_bytes: int,
    threads: int,
    leave_out: Callable[[str, str], None],
    advance: Callable[[int], None],
) -> None:
    """Write the photos of one split to ``000000.tar``, … in `folder`; whole shards that are there stay.

    Any shard is a fair sample of the split, as those who stream them expect: the order is that of the names' hashes.

    Args:
        photos: of a tree.
        folder: for the shards.
        numbers: the label to write for each class of `photos`.
        look: see `Look`.
        shard_bytes: what the photos of one shard take in the tree, at most, unless it is one photo.
        threads: that read and encode.
        leave_out: called with the name of a photo that cannot be packed, and why; it may raise.
        advance: called with a number of photos when they are done.

    Raises:
        InputError: a photo has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = _keys(photos.names)
    with ThreadPoolExecutor(threads) as pool:
        for count, shard in enumerate(_shards(photos, shard_bytes)):
            path = folder / f"{count:06d}.tar"
            if path.exists():
                advance(len(shard))
                continue
            with whole_or_not(path) as file:
                for index, packed in _ahead(pool, lambda i: _packed(photos, i, look), shard, AHEAD * threads):
                    if packed.content is None:
                        leave_out(packed.name, packed.reason)
                    else:
                        number = numbers[int(photos.labels[index])]
                        extension = "jpg" if look.quality is not None else _extension(packed.name)
                        file.writelines(_members(keys[index], extension, packed.name, number, packed.content))
                    advance(1)
                file.write(END)


def _shards(photos: Photos, shard_bytes: int) -> Iterator[list[int]]:
    """Yield the photos of each shard, in the order of their names' hashes."""
    hashes = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in photos.names]
    sizes = photos.source.sizes if photos.rows is None else photos.source.sizes[photos.rows]
    shard: list[int] = []
    taken = 0
    for index in sorted(range(len(photos)), key=hashes.__getitem__):
        size = padded(max(0, int(sizes[index]))) + OVERHEAD
        if shard and taken + size > shard_bytes:
            yield shard
            shard, taken = [], 0
        shard.append(index)
        taken += size
    if shard:
        yield shard


def _packed(photos: Photos, index: int, look: Look) -> Packed:
    name = photos.names[index]
    try:
        content = photos.content(index) if look.quality is None else _encoded(photos, index, look)
        return Packed(name, content, "")
    except UnreadableImage as error:
        return Packed(name, None, str(error))


def _encoded(photos: Photos, index: int, look: Look) -> bytes:
    assert look.quality is not None
    image = shrunk(photos.image(index), look.short_side)
    file = io.BytesIO()
    try:
        image.save(file, "JPEG", quality=look.quality, subsampling=0)
    except (OSError, ValueError) as error:  # more than 65,500 pixels a side
        raise UnreadableImage(
            f"{photos.where(index)}: cannot be written as JPEG ({error}); set --short-side"
        ) from error
    return file.getvalue()


def _ahead(
    pool: ThreadPoolExecutor, act: Callable[[Item], Made], items: Iterable[Item], most: int
) -> Iterator[tuple[Item, Made]]:
    """Yield each item with what `act` makes of it, in order, at most `most` ahead of the caller."""
    waiting: deque[tuple[Item, Future[Made]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(act, item)))
            if len(waiting) > most:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _members(key: str, extension: str, name: str, number: int, content: bytes) -> Iterator[bytes]:
    about = {"filename": name, "label": number, "blake2b": as_text(digest_of(content))}
    yield member(f"{key}.{extension}", content)
    yield member(f"{key}.cls", str(number).encode())
    yield member(f"{key}.json", json.dumps(about).encode())


def _keys(names: Iterable[str]) -> list[str]:
    """Return a WebDataset key for each name: unlike any other, and without a dot in its last part."""
    taken: set[str] = set()
    keys = []
    for name in names:
        folder, slash, last = name.rpartition("/")
        plain = f"{folder}{slash}{last.rpartition('.')[0].replace('.', '_') or '_'}"
        key, count = plain, 1
        while key in taken:
            count += 1
            key = f"{plain}_{count}"
        taken.add(key)
        keys.append(key)
    return keys


def _extension(name: str) -> str:
    extension = name.rpartition(".")[2].lower()
    return "jpg" if extension == "jpeg" else extension


def record_packed(out: Path, trees: Mapping[str, Photos], classes: list[str], look: Look) -> Manifest:
    """Read the shards that were packed, write an index of each split and the manifest, and return it.

    Raises:
        InputError: the shards do not hold the photos of the trees.
    """
    splits: dict[str, SplitRecord] = {}
    left_out: dict[str, list[str]] = {}
    for split, tree in trees.items():
        folder = out / split
        found = {name: scan(str(folder / name)) for name in shards_in(folder)}
        packed = {name for one in found.values() for name in one.names}
        missing = [name for name in tree.names if name not in packed]
        if len(packed) + len(missing) != len(tree):
            raise InputError(f"{folder}: holds photos that are not in {tree.root}; remove it, and pack again")
        if missing:
            left_out[split] = missing
        write_found(folder, found)
        splits[split] = {
            "photos": len(packed),
            "shards": [
                {"name": name, "size": one.stamp["size"], "photos": len(one.names), "digest": one.digest()}
                for name, one in found.items()
            ],
        }
    manifest: Manifest = {
        "version": 1,
        "classes": classes,
        "short_side": look.short_side,
        "quality": look.quality,
        "splits": splits,
        "left_out": left_out,
    }
    write_json(out / MANIFEST, manifest)
    for split, record in splits.items():  # read as a run will read them
        record["digest"] = one_split(name="shards", root=str(out), split=split).digest()
    write_json(out / MANIFEST, manifest)
    return manifest
