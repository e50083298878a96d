"""What another value of a recipe's key changes, said beside the key."""

from __future__ import annotations

from enum import Flag, auto
from typing import Any

from pydantic import Field
from pydantic.fields import FieldInfo


class Effect(Flag):
    """What another value of a key changes."""

    NOTHING = 0  # or what is compared otherwise: photos and weights by their contents
    RESULT = auto()  # the student that a run ends with
    FIT = auto()  # and the teacher that it fits
    ANSWERS = auto()  # and what a teacher says about a view
    VIEWS = auto()  # and the views themselves


NOTHING, RESULT, FIT, ANSWERS, VIEWS = Effect.NOTHING, Effect.RESULT, Effect.FIT, Effect.ANSWERS, Effect.VIEWS


def key(default: Any, effect: Effect, **constraints: Any) -> Any:
    """Return the field of a key.

    Args:
        default: its value unless set; ... if it must be set.
        effect: what another value changes. A run is resumed with any value of a key that changes nothing; label stores
            and fitted teachers are found again by the keys that change them.
        constraints: as pydantic's ``Field`` takes them.
    """
    return Field(default, json_schema_extra={"effect": effect.value}, **constraints)


def effect_of(field: FieldInfo) -> Effect | None:
    """Return what a field declares that it changes; None if it declares nothing."""
    said = field.json_schema_extra
    return Effect(said["effect"]) if isinstance(said, dict) and "effect" in said else None
