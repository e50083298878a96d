"""A teacher whose columns are exchanged is refused by name, and one that is merely weak never is."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deit_kd import InputError
from deit_kd.teachers import check_columns, exchanged_columns

CLASSES = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")
PHOTOS = (32, 14, 49, 24, 49, 29, 26, 25, 12, 81)  # of a validation set of ten classes


def answers(rates: np.ndarray, photos: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and predictions of a teacher that answers class i with column j at `rates[i, j]`."""
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(photos)), photos)
    return labels, np.concatenate([draw.choice(len(rates), n, p=row) for n, row in zip(photos, rates, strict=True)])


def teacher(recall: float, classes: int = 10) -> np.ndarray:
    """Return the rates of a teacher with that recall, whose other answers go anywhere."""
    rates = np.full((classes, classes), (1 - recall) / (classes - 1))
    np.fill_diagonal(rates, recall)
    return rates


def exchange(predictions: np.ndarray, *order: int) -> np.ndarray:
    """Let each column of `order` answer for the next one."""
    moved = predictions.copy()
    for column, after in zip(order, [*order[1:], order[0]], strict=True):
        moved[predictions == column] = after
    return moved


@pytest.mark.parametrize("recall", [0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("order", [(0, 9), (2, 4), (4, 5), (6, 7), (0, 2, 4), (9, 5, 2, 4)])
def test_exchanged_columns_are_found_whichever_they_are(order: tuple[int, ...], recall: float) -> None:
    for seed in range(5):
        labels, predictions = answers(teacher(recall), PHOTOS, seed)
        found = exchanged_columns(labels, exchange(predictions, *order), 10)
        assert [sorted(cycle) for cycle in found] == [sorted(order)]


def test_two_exchanges_are_two_findings_and_a_rotation_is_one() -> None:
    labels, predictions = answers(teacher(0.8), PHOTOS, 0)
    twice = exchange(exchange(predictions, 0, 9), 2, 4)
    assert sorted(map(sorted, exchanged_columns(labels, twice, 10))) == [[0, 9], [2, 4]]
    (cycle,) = exchanged_columns(labels, exchange(predictions, *range(10)), 10)
    assert len(cycle) == 10


def test_an_exchange_among_a_thousand_classes_is_found() -> None:
    labels, predictions = answers(teacher(0.9, 1000), [30] * 1000, 0)
    assert exchanged_columns(labels, predictions, 1000) == []
    assert exchanged_columns(labels, exchange(predictions, 3, 777), 1000) == [[3, 777]]


def test_a_chain_that_ends_in_a_column_nobody_takes_is_closed() -> None:
    # Class 2 is never recognised: its own photos say nothing about its column, those of class 1 do.
    rates = np.array([[0.05, 0.9, 0, 0.05], [0, 0.05, 0.9, 0.05], [0, 0, 0, 1], [0, 0, 0, 1]])
    labels, predictions = answers(rates, [40] * 4, 0)
    assert [sorted(cycle) for cycle in exchanged_columns(labels, predictions, 4)] == [[0, 1, 2]]


# Weak teachers whose columns are right, though some of their classes are answered by another one more often than not.
WEAK = {
    "guesses": np.full((10, 10), 0.1),
    "hardly better than guessing": teacher(0.15),
    "says one class to everything": np.tile(np.eye(10)[9], (10, 1)),
    "has a favourite": 0.7 * np.tile(np.eye(10)[9], (10, 1)) + 0.3 * np.eye(10),
    "has two favourites": 0.8 * np.tile([0.4, 0, 0, 0, 0, 0, 0, 0, 0, 0.6], (10, 1)) + 0.2 * np.eye(10),
    "cannot tell shirts apart": np.block(
        [
            [np.eye(5), np.zeros((5, 5))],
            [np.zeros((5, 5)), np.tile([0.5, 0, 0, 0, 0.5], (5, 1))],
        ]
    ),
    "calls most shirts t-shirts": np.eye(10) + 0.8 * (np.outer(np.eye(10)[5], np.eye(10)[9] - np.eye(10)[5])),
}


@pytest.mark.parametrize("rates", WEAK.values(), ids=list(WEAK))
def test_a_weak_teacher_whose_columns_are_right_is_never_refused(rates: np.ndarray) -> None:
    for photos in (PHOTOS, (1, 2, 3, 1, 2, 3, 1, 2, 3, 100), [300] * 10):
        for seed in range(10):
            assert exchanged_columns(*answers(rates, photos, seed), 10) == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    photos=st.lists(st.integers(0, 120), min_size=2, max_size=12).filter(any),
    knowledge=st.floats(0, 1),
    bias=st.floats(0.05, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_right_teacher_is_refused_whatever_it_prefers(
    photos: list[int], knowledge: float, bias: float, seed: int
) -> None:
    """A share of the photos is recognised, the others are answered by a taste that is the same for all."""
    classes = len(photos)
    taste = np.random.default_rng(seed).dirichlet(np.full(classes, bias))
    rates = knowledge * np.eye(classes) + (1 - knowledge) * taste
    assert exchanged_columns(*answers(rates, photos, seed), classes) == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    photos=st.lists(st.integers(40, 120), min_size=3, max_size=12),
    recall=st.floats(0.85, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_exchange_of_two_well_known_classes_is_refused(photos: list[int], recall: float, seed: int) -> None:
    classes = len(photos)
    labels, predictions = answers(teacher(recall, classes), photos, seed)
    pair = sorted(np.random.default_rng(seed).choice(classes, 2, replace=False).tolist())
    assert [sorted(cycle) for cycle in exchanged_columns(labels, exchange(predictions, *pair), classes)] == [pair]


@pytest.mark.parametrize("photos", [1, 2, 3])
def test_a_few_photos_prove_nothing(photos: int) -> None:
    labels = np.repeat(np.arange(10), photos)
    assert exchanged_columns(labels, exchange(labels, 0, 9), 10) == []


def test_photos_that_were_not_asked_about_do_not_count() -> None:
    labels, predictions = answers(teacher(1, 2), [30, 30], 0)
    wrong = exchange(predictions, 0, 1)
    assert exchanged_columns(labels, wrong, 2) == [[0, 1]]
    assert exchanged_columns(labels, np.where(np.arange(60) % 30 < 2, wrong, -1), 2) == []
    assert exchanged_columns(labels, np.full(60, -1), 2) == []


def test_the_refusal_names_the_classes_and_the_map_that_mends_it() -> None:
    labels, predictions = answers(teacher(1), PHOTOS, 0)
    with pytest.raises(InputError) as refusal:
        check_columns({"name": "it"}, CLASSES, labels, exchange(predictions, 1, 4))
    assert "'pants' answers 14 of 14 photos of 'hat', their own column 0" in str(refusal.value)
    assert "'hat' answers 49 of 49 photos of 'pants', their own column 0" in str(refusal.value)
    entries = re.search(r"\{.*\}", str(refusal.value))
    assert entries is not None
    assert json.loads(entries[0]) == {"hat": 4, "pants": 1}


@pytest.mark.parametrize(
    ("facts", "entry"),
    [
        ({"class_map": {"hat": [[7, None]], "pants": [[2, "n1"], [3, "n2"]]}}, '"hat": [2, 3], "pants": 7'),
        ({"members": [{}, {}]}, "for the member that is wrong"),
    ],
)
def test_the_map_names_the_columns_of_the_teachers_head(facts: dict, entry: str) -> None:
    labels, predictions = answers(teacher(1), PHOTOS, 0)
    with pytest.raises(InputError, match=re.escape(entry)):
        check_columns({"name": "it", **facts}, CLASSES, labels, exchange(predictions, 1, 4))


def test_a_refusal_of_many_classes_stays_short() -> None:
    labels, predictions = answers(teacher(1, 300), [20] * 300, 0)
    with pytest.raises(InputError, match="296 more") as refusal:
        check_columns({"name": "it"}, [f"c{n}" for n in range(300)], labels, (predictions + 1) % 300)
    assert len(str(refusal.value)) < 700
