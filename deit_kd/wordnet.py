"""WordNet ids, which name the classes of ImageNet, and the words that describe them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from timm.data import ImageNetInfo

WORDNET_ID = re.compile(r"n[0-9]{8}")


def description(name: str) -> str | None:
    """Return the description of a WordNet id, words with commas between them; None for any other name."""
    if not WORDNET_ID.fullmatch(name):
        return None
    try:
        found: str = _imagenet().label_name_to_description(name)
    except KeyError:  # not one of ImageNet's
        return None
    return found


def words_of(name: str) -> set[str]:
    """Return the words that stand for a class, in their plain form: those of its description, or of its name."""
    described = description(name) or name
    return {plain(word) for word in (described, *described.split(","))}


def plain(words: str) -> str:
    """Return words in lower case, with single spaces between them."""
    return " ".join(words.replace("_", " ").lower().split())


def by_words(names: Iterable[str]) -> dict[str, set[str]]:
    """Return the names of classes by each of their words, see `words_of`."""
    found: dict[str, set[str]] = {}
    for name in names:
        for word in words_of(name):
            found.setdefault(word, set()).add(name)
    return found


def same_words(name: str, known: Mapping[str, set[str]]) -> set[str]:
    """Return the names that share a word with `name`: a WordNet id has those of its description.

    Two WordNet ids are two classes, whatever words they share.

    Args:
        name: of a class.
        known: the result of `by_words`.
    """
    found = set().union(*(known.get(word, set()) for word in words_of(name)))
    return {other for other in found if not (WORDNET_ID.fullmatch(name) and WORDNET_ID.fullmatch(other))}


@cache
def _imagenet() -> ImageNetInfo:
    return ImageNetInfo("imagenet-22k")
