"""The classes of photos among those of a student: by name, number or word, in any order, and perhaps fewer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from deit_kd.interfaces import InputError, StudentOutput, nearest
from deit_kd.teachers import ClassMap
from deit_kd.teachers.class_map import described
from deit_kd.wordnet import by_words, same_words

NUMBER = re.compile(r"[0-9]{1,9}")
MOST_NAMED = 5  # classes in one line


class Matched(NamedTuple):
    """Which columns of a student's head stand for the classes of photos."""

    classes: tuple[str, ...]  # of the head, in order
    columns: tuple[int, ...]  # of the photos' classes, in their order
    by_word: tuple[int, ...] = ()  # labels of the photos' classes that have another name than the student's

    @property
    def names(self) -> tuple[str, ...]:
        """The student's names of the photos' classes."""
        return tuple(self.classes[column] for column in self.columns)

    @property
    def class_map(self) -> ClassMap | None:
        """The map from the student's logits to those of the photos' classes; None if they are the same."""
        if self.columns == tuple(range(len(self.classes))):
            return None
        return ClassMap([[column] for column in self.columns], dict(enumerate(self.classes)))

    def answer(self, output: StudentOutput) -> StudentOutput:
        """Return the logits [n, C] of the photos' classes from those of the student's."""
        mapping = self.class_map
        return output if mapping is None else output.mapped(mapping)

    def line(self, student: str, ours: Sequence[str]) -> str | None:
        """Return a line that says how the photos' classes were found; None if they are the student's, in its order."""
        if self.class_map is None and not self.by_word:
            return None
        is_part = len(ours) < len(self.classes)
        how = "restricted to" if is_part else "taken in the order of"
        line = f"{student}: its logits are {how} the photos' {len(ours)}{f' of {len(self.classes)}' * is_part} classes"
        named = [f"{ours[label]} is {described(self.names[label])}" for label in self.by_word]
        more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        return f"{line}, found by words: {'; '.join(named[:MOST_NAMED])}{more}" if named else line


def match_classes(student: str, theirs: tuple[str, ...], ours: Sequence[str]) -> Matched:
    """Find each class of photos among a student's.

    Names are compared first, numbers as numbers; then words: a WordNet id has those of its description.

    Args:
        student: its name, for errors.
        theirs: the student's classes, in the order of its head.
        ours: the photos' classes.

    Raises:
        InputError: a class is unknown, could be several, or is the same as another; or there is only one of several.
    """
    exact = {name: column for column, name in enumerate(theirs)}
    numbers = {int(name): column for column, name in enumerate(theirs) if NUMBER.fullmatch(name)}
    known = by_words(theirs) if any(name not in exact for name in ours) else {}
    owner: dict[int, str] = {}
    unknown, by_word = [], []
    for label, name in enumerate(ours):
        column = exact.get(name, numbers.get(int(name)) if NUMBER.fullmatch(name) else None)
        if column is None:
            others = sorted(same_words(name, known))
            if len(others) > 1:
                raise InputError(
                    f"data.root: {name!r} describes the classes {' and '.join(others)} of {student}; rename its folder"
                )
            if not others:
                unknown.append(name)
                continue
            column = exact[others[0]]
            by_word.append(label)
        if column in owner:
            raise InputError(
                f"data.root: {owner[column]!r} and {name!r} are the same class of {student}, {theirs[column]!r}; join "
                "their folders"
            )
        owner[column] = name
    if unknown:
        named = ", ".join(repr(name) + nearest(name, theirs) for name in unknown[:MOST_NAMED])
        raise InputError(
            f"data.root: {student} has {len(theirs)} classes, the data have {len(ours)}, and it does not know "
            f"{len(unknown)} of them: {named}{' …' * (len(unknown) > MOST_NAMED)}; rename their folders, or take the "
            "others with data.classes"
        )
    if len(ours) == 1 and len(theirs) > 1:
        raise InputError(f"data.root: the data have one class, {ours[0]!r}, so every answer is right; add another")
    return Matched(theirs, tuple(owner), tuple(by_word))


def knows_any(theirs: tuple[str, ...], ours: Sequence[str]) -> bool:
    """Return whether a student has any class of photos, by its name or its words."""
    if not {*theirs}.isdisjoint(ours):
        return True
    known = by_words(theirs)
    return any(same_words(name, known) for name in ours)
