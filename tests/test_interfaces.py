"""What every room says alike."""

from __future__ import annotations

import pytest

from deit_kd.interfaces import counted


@pytest.mark.parametrize(
    ("count", "noun", "said"),
    [
        (1, "photo", "1 photo"),
        (0, "photo", "0 photos"),
        (2, "photo", "2 photos"),
        (1, "class", "1 class"),
        (3, "class", "3 classes"),
        (2, "training image", "2 training images"),
    ],
)
def test_one_thing_is_not_said_as_several(count: int, noun: str, said: str) -> None:
    assert counted(count, noun) == said
