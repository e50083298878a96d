"""A recipe by the paths of its keys: the known keys, what each changes, and the differences of two recipes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from pydantic import BaseModel

from deit_kd.config.effects import Effect, effect_of
from deit_kd.config.recipe import Config
from deit_kd.config.sections import Guide
from deit_kd.interfaces import InputError

# The teacher, or a key that a guide has as well; not in a path, nor the keys that act on both (teacher.precision).
_OF_A_ROLE = re.compile(rf"^teacher(?=: )|(?<![\w./:-])teacher(?=\.(?:{'|'.join(Guide.model_fields)})\b(?!/))")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by the path of their keys, e.g. ``distill.temperature``."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and not key.endswith("args"):
            values.update(flat(value, f"{prefix}{key}."))
        else:
            values[prefix + key] = value
    return values


@cache
def effects(section: type[BaseModel] = Config, prefix: str = "") -> Mapping[str, Effect]:
    """Return what each key of the schema changes, by its path."""
    found: dict[str, Effect] = {}
    for name, field in section.model_fields.items():
        effect = effect_of(field)
        if effect is not None:
            found[prefix + name] = effect
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= effects(field.annotation, f"{prefix}{name}.")
    return found


def known_keys() -> list[str]:
    """Return every section and key of the schema with its path, e.g. ``distill`` and ``distill.temperature``."""
    parts = [path.split(".") for path in effects()]
    return list(dict.fromkeys(".".join(names[:depth]) for names in parts for depth in range(1, len(names) + 1)))


def keys_that_change(effect: Effect, prefixes: Iterable[str] = ("",)) -> list[str]:
    """Return the paths of the keys with any of these effects whose path begins with one of the `prefixes`."""
    return [path for path, own in effects().items() if own & effect and path.startswith(tuple(prefixes))]


def in_keys_of(role: str, message: str) -> str:
    """Return a message about a teacher with the keys of `role`, which is in its place: ``teacher`` or ``guide``."""
    return _OF_A_ROLE.sub(role, message)


@contextmanager
def keys_of(role: str) -> Iterator[None]:
    """Within the context, errors about a teacher name the keys of `role`, see `in_keys_of`."""
    try:
        yield
    except InputError as error:
        message = in_keys_of(role, str(error))
        if message == str(error):
            raise
        raise InputError(message) from error


def differences(before: Mapping[str, Any], here: Mapping[str, Any], where: str) -> list[str]:
    """Return a line for each field that differs, with both values.

    Args:
        before: values by field; a key of the recipe that is not among them has its default.
        here: the same; only these fields are compared.
        where: the words for the values `before`, such as ``in the store``.
    """
    defaults = flat(Config().model_dump(mode="json"))
    return [
        line
        for field, value in here.items()
        if (line := _difference(field, before.get(field, defaults.get(field)), value, where)) is not None
    ]


def _difference(field: str, before: Any, here: Any, where: str) -> str | None:
    if before == here:
        return None
    if isinstance(before, list) and isinstance(here, list) and len(before) == len(here):
        index = next(i for i, (old, new) in enumerate(zip(before, here, strict=True)) if old != new)
        return f"{field}: item {index} is {before[index]!r} {where}, {here[index]!r} here"
    if isinstance(before, list) and isinstance(here, list) and max(len(before), len(here)) > 4:
        return f"{field}: {len(before)} items {where}, {len(here)} here"
    return f"{field}: {before!r} {where}, {here!r} here"
