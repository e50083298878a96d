"""Indexes: what is known of many photos in one Arrow file, which all processes of a machine map instead of reading."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as arrow
import pyarrow.compute as compute

from deit_kd.data.names import TEXT
from deit_kd.files import write_atomically
from deit_kd.interfaces import InputError

FORMAT = 1
FACTS = b"deit_kd"  # the key of an index's facts in its schema
OUTSIDE = r"^/|(^|/)\.\.(/|$)|\x00"  # names that would leave their folder


class Index(NamedTuple):
    """What an index holds.

    Args:
        names: of the photos, an Arrow array of strings.
        columns: int64 [n] each, by name.
        facts: JSON.
    """

    names: arrow.Array
    columns: dict[str, np.ndarray]
    facts: dict[str, Any]


def place_of_index(folder: Path) -> Path:
    """Return where the index of a folder is kept, which itself may be read-only: in the user's cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    base = Path(os.environ.get("DEIT_KD_CACHE") or Path(caches, "deit_kd"))
    return Path(base, "index", hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=16).hexdigest() + ".arrow")


def write_index(path: Path, names: arrow.Array, columns: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write an index, whole or not at all; the folder above it is made.

    Args:
        path: of the file.
        names: of the photos, an Arrow array of large strings.
        columns: int64 [n] each, by name.
        facts: anything that JSON can hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.table({"name": names, **{name: arrow.array(values) for name, values in columns.items()}})
    table = table.replace_schema_metadata({FACTS: json.dumps({"format": FORMAT, **facts})})
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, len(table)))
    write_atomically(path, sink.getvalue())


def read_index(path: Path) -> Index:
    """Return the index in a file, which stays mapped: its pages are read when they are used, and shared.

    Raises:
        InputError: it is missing, damaged, of another format, or names photos outside their folder.
    """
    try:
        found = _read(path)
    except (OSError, ValueError, arrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: is no index of photos ({reason}); remove it, and run deit-kd data index") from error
    return found


def _read(path: Path) -> Index:
    with arrow.memory_map(str(path)) as file, arrow.ipc.open_file(file) as reader:
        schema = reader.schema
        facts = json.loads((schema.metadata or {}).get(FACTS, b"null"))
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        kinds = {field.name: field.type for field in schema}
        if kinds.pop("name", None) != TEXT or any(kind != arrow.int64() for kind in kinds.values()):
            raise ValueError("other columns")
        if reader.num_record_batches > 1:
            raise ValueError("several parts")
        batch = reader.read_all().combine_chunks().to_batches()
    if not batch:
        return Index(arrow.array([], TEXT), {name: np.empty(0, np.int64) for name in kinds}, facts)
    names = batch[0]["name"]
    batch[0].validate(full=True)
    if any(column.null_count for column in batch[0]):
        raise ValueError("values are missing")
    if compute.any(compute.match_substring_regex(names, OUTSIDE)).as_py():
        raise ValueError("it names photos outside their folder")
    return Index(names, {name: batch[0][name].to_numpy() for name in kinds}, facts)
