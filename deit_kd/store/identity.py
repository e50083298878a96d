"""What a label store's answers depend on, compared field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(stored: Mapping[str, Any], here: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Return a line for each field that differs, with both values.

    Args:
        stored: of the store, by field.
        here: of the recipe, by field; only these fields are compared.
        defaults: what a field meant before there was such a field: an old store has the default of a new one.
    """
    return [
        line
        for field, value in here.items()
        if (line := _difference(field, stored.get(field, defaults.get(field)), value)) is not None
    ]


def _difference(field: str, stored: Any, here: Any) -> str | None:
    if stored == here:
        return None
    if isinstance(stored, list) and isinstance(here, list) and len(stored) == len(here):
        index = next(i for i, (old, new) in enumerate(zip(stored, here, strict=True)) if old != new)
        return f"{field}: item {index} is {stored[index]!r} in the store, {here[index]!r} here"
    if isinstance(stored, list) and isinstance(here, list) and max(len(stored), len(here)) > 4:
        return f"{field}: {len(stored)} items in the store, {len(here)} here"
    return f"{field}: {stored!r} in the store, {here!r} here"
