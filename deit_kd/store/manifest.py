"""What a label store says of itself: its manifest, and how the answers in each of its parts are recorded."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import ConfigDict, Field, with_config
from typing_extensions import NotRequired, TypedDict

from deit_kd.store.record import Record

FORMAT = 1
MANIFEST = "store.json"
PARTS = "parts"  # folder of what several machines need to know that build the store together
VALIDATION = "validation"
VIEWS_FIELD = "views.version"  # of a store's identity
ESSENTIAL = ("format", "identity", "classes", "top", "views", "validation", "columns")  # what records depend on


@with_config(ConfigDict(extra="allow"))
class TeacherOfStore(TypedDict):
    """What answered."""

    name: str
    random_weights: bool
    weights: str


class ColumnsOfStore(TypedDict):
    """What the records of views hold besides the teacher's answer to the whole image."""

    dense: NotRequired[Annotated[list[Annotated[int, Field(gt=0, lt=2**10)]], Field(min_length=2, max_length=2)]]
    pooled: NotRequired[Annotated[int, Field(gt=0, lt=2**20)]]


@with_config(ConfigDict(extra="allow"))
class Manifest(TypedDict):
    """What ``store.json`` holds."""

    format: int
    identity: dict[str, Any]
    classes: Annotated[list[str], Field(min_length=1)]
    top: Annotated[int, Field(ge=0)]
    views: Annotated[int, Field(ge=0, lt=2**40)]
    validation: Annotated[int, Field(ge=0, lt=2**40)]
    columns: NotRequired[ColumnsOfStore]  # absent if there are none
    libraries: Annotated[list[dict[str, str]], Field(min_length=1)]
    teacher: TeacherOfStore


def record_of(manifest: Manifest) -> Record:
    """Return how the answers to views are recorded."""
    columns = manifest.get("columns", {})
    grid = columns.get("dense")
    places = None if grid is None else (grid[0], grid[1])
    return Record(len(manifest["classes"]), manifest["top"], places, columns.get("pooled"))


def digest_of(manifest: Manifest) -> str:
    """Return a hash of everything that the records depend on, including their format."""
    essence = {key: value for key, value in manifest.items() if key in ESSENTIAL}
    return hashlib.blake2b(json.dumps(essence, sort_keys=True).encode(), digest_size=16).hexdigest()
