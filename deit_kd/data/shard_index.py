"""The index of tar shards: where each photo is, its size, label and digest, found in one pass over the headers."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as arrow
from torchvision.datasets.folder import IMG_EXTENSIONS
from typing_extensions import NotRequired, TypedDict

from deit_kd.data.index import Index, place_of_index, read_index, write_index
from deit_kd.data.names import TEXT
from deit_kd.data.shards import as_number, digest_of
from deit_kd.files import checked, read_json
from deit_kd.interfaces import InputError
from deit_kd.tars import Member, checked_name, members

INDEX, MANIFEST = "index.arrow", "manifest.json"
CLASS_LISTS = ("classes.txt", "classnames.txt")  # of sets that others have packed: one name a line, in label order
LABELS = ("label", "class", "cls")  # keys of a JSON file
LONGEST_LABEL = 2**20  # bytes of a label's file
READ_AHEAD = 4096  # bytes: a label and the headers beside it
COLUMNS = {"shard", "offset", "size", "label", "digest"}


class ShardStamp(TypedDict):
    """What a shard looked like when it was indexed."""

    name: str
    size: int
    changed_ns: int


class Facts(TypedDict):
    """What the index of shards says besides its columns."""

    of: str
    shards: list[ShardStamp]
    classes: dict[int, str]  # names by label, as far as the shards say them
    by_name: bool  # whether the shards give names in place of labels, so that these are only this index's


class ShardRecord(TypedDict):
    """What a manifest says about one shard."""

    name: str
    size: int
    photos: int
    digest: str


class SplitRecord(TypedDict):
    """What a manifest says about one split."""

    photos: int
    shards: list[ShardRecord]
    digest: NotRequired[str]  # of the photos, as runs record it


class Manifest(TypedDict):
    """What ``deit-kd data pack`` says about what it has packed."""

    version: int
    classes: list[str]
    splits: dict[str, SplitRecord]
    short_side: int | None
    quality: int | None
    left_out: dict[str, list[str]]


class Found(NamedTuple):
    """The photos of one shard."""

    names: list[str]
    numbers: np.ndarray  # int64 [n, 3]: offset, size and digest of each
    labels: list[int | str]
    are_filenames: bool  # whether the names are those of files in a tree
    stamp: ShardStamp

    def digest(self) -> str:
        """Return a hash of names, sizes, labels and digests."""
        hasher = hashlib.blake2b(digest_size=16)
        for name, (_, size, digest), label in zip(self.names, self.numbers.tolist(), self.labels, strict=True):
            hasher.update(f"{name}\t{size}\t{label}\t{digest}\n".encode())
        return hasher.hexdigest()


def manifest_of(root: Path) -> Manifest | None:
    """Return the manifest of a packed set; None if it has none.

    Raises:
        InputError: it is damaged, names folders outside `root`, or is of a later version.
    """
    path = root / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path, Manifest)
    for split in manifest["splits"]:
        if split != ".":
            checked_name(split, str(path))
    if manifest["version"] != 1:
        raise InputError(f"{path}: is of version {manifest['version']}, this program reads 1; update it")
    return manifest


def classes_of(root: Path) -> list[str] | None:
    """Return the class names of a packed set, in label order, from its manifest or a list; None if there is none.

    Raises:
        InputError: it cannot be read, or names a class twice.
    """
    manifest = manifest_of(root)
    at = next((root / name for name in (MANIFEST, *CLASS_LISTS) if (root / name).exists()), None)
    if at is None:
        return None
    try:
        classes = at.read_text().splitlines() if manifest is None else manifest["classes"]
    except (OSError, ValueError) as error:
        raise InputError(f"{at}: cannot be read ({error}); write one class name a line") from error
    twice = next((name for name, count in Counter(classes).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{at}: names the class {twice!r} twice; name each once, in the order of the labels")
    return classes


def shards_in(folder: Path) -> list[str]:
    """Return the names of the tars in a folder, in order."""
    if not folder.is_dir():
        return []
    return sorted(name for name in os.listdir(folder) if name.endswith(".tar") and not name.startswith("."))


def write_found(folder: Path, found: Mapping[str, Found]) -> Path:
    """Write the index of all shards in a folder.

    Args:
        folder: of the shards.
        found: what `scan` found in each shard, by its name.

    Returns:
        where it is: beside the shards or, where that cannot be written, in the user's cache.

    Raises:
        InputError: a photo is there twice, or some labels are numbers and others names.
    """
    shards, parts = list(found), list(found.values())
    names = _unlike_names(folder, shards, parts)
    by_name = any(isinstance(label, str) for one in parts for label in one.labels)
    labels, classes = _by_name(folder, parts) if by_name else _by_number(parts)
    numbers = np.concatenate([one.numbers for one in parts])
    shard = np.repeat(np.arange(len(parts)), [len(one.names) for one in parts])
    columns = {"shard": shard, "offset": numbers[:, 0], "size": numbers[:, 1], "digest": numbers[:, 2], "label": labels}
    order = _in_tree_order(names, labels)
    facts: Facts = {"of": "shards", "shards": [one.stamp for one in parts], "classes": classes, "by_name": by_name}
    path = folder / INDEX if os.access(folder, os.W_OK) else place_of_index(folder)
    in_order = {name: np.ascontiguousarray(values[order], dtype=np.int64) for name, values in columns.items()}
    write_index(path, arrow.array([names[i] for i in order.tolist()], TEXT), in_order, facts)
    return path


def fresh_index(folder: Path, shards: Sequence[str]) -> tuple[Index, Facts]:
    """Return the index of the shards in a folder, and what it says about them.

    Raises:
        InputError: there is none, it is older than its shards, or it is damaged.
    """
    reasons = []
    now = [_stamp(folder / name) for name in shards]
    for path in (folder / INDEX, place_of_index(folder)):
        if not path.is_file():
            continue
        index = read_index(path)
        try:
            facts = checked({key: index.facts.get(key) for key in Facts.__annotations__}, Facts)
            _check_columns(index, facts)
        except ValueError as error:
            raise InputError(f"{path}: is no index of shards ({error}); run deit-kd data index") from error
        before = {one["name"]: one for one in facts["shards"]}
        changed = [one["name"] for one in now if before.pop(one["name"], None) != one] + sorted(before)
        if not changed:
            return index, facts
        reasons.append(f"{path}: is older than its shards ({changed[0]} is new, gone or changed)")
    reason = reasons[0] if reasons else f"data.root: {folder} has shards without an index"
    raise InputError(f"{reason}; run deit-kd data index on the folder that data.root names")


def check_manifest(root: Path, split: str, found: Mapping[Path, Found]) -> None:
    """Raise an InputError unless the shards of a split, by their paths, are those of the manifest."""
    manifest = manifest_of(root)
    assert manifest is not None
    classes = manifest["classes"]
    record = manifest["splits"].get(split)
    digests = {} if record is None else {one["name"]: one["digest"] for one in record["shards"]}
    for path, one in found.items():
        for name, label in zip(one.names, one.labels, strict=True):
            ours = classes[label] if isinstance(label, int) and label < len(classes) else None
            if name.partition("/")[0] != ours:
                of = f"class {label}, which is {ours!r}" if ours else f"class {label} of {len(classes)}"
                raise InputError(f"{path}: holds {name!r} as {of} in {root / MANIFEST}; copy both again")
        if digests.get(path.name) != one.digest():
            raise InputError(f"{path}: is not the shard that {root / MANIFEST} lists; copy it again")


def check_complete(root: Path, split: str, folder: Path, shards: Sequence[str]) -> None:
    """Raise an InputError if a shard that the manifest lists is not there."""
    manifest = manifest_of(root)
    if manifest is None or split not in manifest["splits"]:
        return
    missing = [one["name"] for one in manifest["splits"][split]["shards"] if one["name"] not in shards]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder / missing[0]}: is missing{others}, though the manifest lists it; copy it again")


def scan(path: str) -> Found:
    """Return the photos of one shard: groups of files with one key, an image and its label.

    Raises:
        InputError: the shard is damaged, or a photo has no label.
    """
    names: list[str] = []
    numbers: list[tuple[int, int, int]] = []
    labels: list[int | str] = []
    filenames = 0
    stamp = _stamp(Path(path))
    with open(path, "rb", buffering=READ_AHEAD) as file:
        for key, group in groupby(members(file, path), key=lambda one: _key_and_extension(one.name)[0]):
            parts = {}
            for one in group:
                extension = _key_and_extension(one.name)[1].lower()
                if extension in parts:
                    raise InputError(f"{path}: {one.name!r} is there twice; pack the photos again")
                parts[extension] = _Part(one, _small(file, one, path) if extension in ("cls", "json") else b"")
            images = [extension for extension in parts if f".{extension}" in IMG_EXTENSIONS]
            if not images:
                continue
            if len(images) > 1:
                raise InputError(f"{path}: {key!r} has {len(images)} images; pack one for each key")
            image = parts[images[0]].member
            about = _json(parts["json"].content, key, path) if "json" in parts else {}
            label = _label(parts["cls"].content if "cls" in parts else None, about, key, path)
            filename = about.get("filename")
            filenames += isinstance(filename, str)
            names.append(checked_name(filename, path) if isinstance(filename, str) else image.name)
            numbers.append((image.offset, image.size, _digest(file, image, about)))
            labels.append(label)
    return Found(names, np.array(numbers, np.int64).reshape(-1, 3), labels, filenames == len(names), stamp)


class _Part(NamedTuple):
    member: Member
    content: bytes  # empty for an image


def _key_and_extension(name: str) -> tuple[str, str]:
    """Return the key of a WebDataset file, which ends at the first dot of its last part, and the rest."""
    folder, slash, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return f"{folder}{slash}{key}", extension


def _small(file: BinaryIO, member: Member, where: str) -> bytes:
    if member.size > LONGEST_LABEL:
        raise InputError(f"{where}: {member.name!r} has {member.size} bytes, too many for a label; pack it again")
    file.seek(member.offset)
    return file.read(member.size)


def _json(content: bytes, key: str, where: str) -> dict[str, Any]:
    try:
        about = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {key + '.json'!r} is no JSON ({error}); pack it again") from error
    return about if isinstance(about, dict) else {}


def _label(content: bytes | None, about: Mapping[str, Any], key: str, where: str) -> int | str:
    given: Any = next((about[name] for name in LABELS if name in about), None)
    if content is not None:
        given = content.decode(errors="replace").strip()
        given = int(given) if given.isascii() and given.isdigit() and len(given) < 10 else given
    if isinstance(given, bool) or not isinstance(given, int | str) or given == "" or (given == -1):
        raise InputError(
            f"{where}: {key!r} has no label; add {key + '.cls'!r}, or {' or '.join(LABELS)} to {key + '.json'!r}"
        )
    if isinstance(given, int) and not 0 <= given < 10**9:
        raise InputError(f"{where}: {key!r} is of class {given}; classes are counted from 0, pack it again")
    return given


def _digest(file: BinaryIO, image: Member, about: Mapping[str, Any]) -> int:
    """Return the digest of a photo as it was packed, or of its bytes where the shard does not say."""
    said = as_number(about.get("blake2b"))
    if said is not None:
        return said
    file.seek(image.offset)
    return digest_of(file.read(image.size))


def _unlike_names(folder: Path, shards: Sequence[str], found: Sequence[Found]) -> list[str]:
    """Return the names of all photos; where shards count their keys anew, with the shard's name before them."""
    names = [name for one in found for name in one.names]
    if len(set(names)) < len(names):
        stems = [shard.removesuffix(".tar") for shard in shards]
        names = [f"{stem}/{name}" for stem, one in zip(stems, found, strict=True) for name in one.names]
        taken: set[str] = set()
        for name in names:
            if name in taken:
                raise InputError(f"{folder}: {name!r} is there twice; pack the photos again")
            taken.add(name)
    return names


def _by_number(found: Sequence[Found]) -> tuple[np.ndarray, dict[int, str]]:
    """Return the labels of all photos, and the folder of each label if all names are of files in class folders."""
    labels = np.array([label for one in found for label in one.labels], np.int64)
    if not all(one.are_filenames for one in found):
        return labels, {}
    folders: dict[int, set[str]] = {}
    for one in found:
        for name, label in zip(one.names, one.labels, strict=True):
            folders.setdefault(int(label), set()).add(name.partition("/")[0] if "/" in name else "")
    names = {label: next(iter(here)) for label, here in folders.items() if len(here) == 1 and "" not in here}
    return labels, names if len(set(names.values())) == len(folders) else {}


def _by_name(folder: Path, found: Sequence[Found]) -> tuple[np.ndarray, dict[int, str]]:
    """Return the labels of all photos whose shards say names: their places in the order of all names."""
    texts = [label for one in found for label in one.labels]
    numbers = [label for label in texts if isinstance(label, int)]
    if numbers:
        raise InputError(f"{folder}: labels are numbers, such as {numbers[0]}, and names; use one kind")
    classes = {name: label for label, name in enumerate(sorted({str(text) for text in texts}))}
    return np.array([classes[str(text)] for text in texts]), {label: name for name, label in classes.items()}


def _in_tree_order(names: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Return the order in which torchvision's ImageFolder lists the files: by class, folder and name."""
    parts = [name.rpartition("/") for name in names]
    label = labels.tolist()
    return np.array(sorted(range(len(names)), key=lambda i: (label[i], parts[i][0], parts[i][2])), np.int64)


def _stamp(path: Path) -> ShardStamp:
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); restore it") from error
    return {"name": path.name, "size": found.st_size, "changed_ns": found.st_mtime_ns}


def _check_columns(index: Index, facts: Facts) -> None:
    """Raise a ValueError if the columns of an index lead out of its shards."""
    if facts["of"] != "shards" or set(index.columns) != COLUMNS:
        raise ValueError("not of shards")
    shard, offset, size = (index.columns[name] for name in ("shard", "offset", "size"))
    if not len(shard):
        return
    if shard.min() < 0 or shard.max() >= len(facts["shards"]):
        raise ValueError("it names shards that it does not list")
    lengths = np.array([one["size"] for one in facts["shards"]], np.int64)[shard]
    if min(offset.min(), size.min(), index.columns["label"].min()) < 0 or (size > lengths - offset).any():
        raise ValueError("photos lie outside their shards")
    if facts["by_name"] and not set(np.unique(index.columns["label"]).tolist()) <= set(facts["classes"]):
        raise ValueError("it names labels that it does not list")
