"""The data of a line chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deit_kd.figures.style import INK
from deit_kd.interfaces import ANSWERS

# Legible on white and on black, and distinct for red-green colour blindness (after Okabe & Ito).
_HEADS = dict(zip((*ANSWERS, "teacher"), ("#3f8fd2", "#e58a1f", "#c65fa8", "#2aa876", "#8a8f98"), strict=True))
_OTHERS = ("#3f8fd2", "#e58a1f", "#2aa876", "#c65fa8", "#d9534f", "#8c7ae6", "#b5a336")


def colour_of(name: str, position: int = 0) -> str:
    """Return the colour of a head or of the teacher; of anything else, the one at its position."""
    return _HEADS.get(name.split("_")[0], _OTHERS[position % len(_OTHERS)])


@dataclass(frozen=True)
class Series:
    """One line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: str = "-"


@dataclass(frozen=True)
class Mark:
    """A vertical line: where something ends."""

    name: str
    x: float
    colour: str


@dataclass(frozen=True)
class Key:
    """What a colour or a dash stands for."""

    name: str
    colour: str = INK
    dash: str = "-"


@dataclass(frozen=True)
class Chart:
    """Lines on the same axes."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    levels: Sequence[tuple[str, float]] = ()  # horizontal lines: the teacher's score
    marks: Sequence[Mark] = ()
    keys: Sequence[Key] = ()  # in place of the names of lines and marks
