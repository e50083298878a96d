"""What processes ask of their store grows with their number, and whoever looks for all can be replaced."""

from __future__ import annotations

import time
from typing import Any

import pytest
from torch.distributed import HashStore

from benchmarks.signals import simulate
from deit_kd.signs import Signs

REQUESTS_OF_A_LOOK = 4  # a beat, a signal, a process that is gone, and the one that looks for all


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> HashStore:
    monkeypatch.setattr("deit_kd.signs.SECONDS_OF_SILENCE", 0.3)
    return HashStore()


def lookouts(store: HashStore, count: int) -> list[Any]:
    return [Signs(store, rank).lookout("stalled") for rank in range(count)]


@pytest.mark.parametrize("count", [3, 24])
def test_what_a_process_asks_for_does_not_depend_on_how_many_there_are(count: int) -> None:
    asked = simulate(count, 1.2)
    looks = asked.looks_per_second * count
    assert asked.requests_per_second < (REQUESTS_OF_A_LOOK + 1) * looks + 8
    assert asked.requests_to_meet < 40 * count


def test_one_looks_for_all_and_tells_what_it_has_seen(store: HashStore) -> None:
    first, *others = lookouts(store, 4)
    for _ in range(3):
        assert [one.is_mine() for one in (first, *others)] == [True, False, False, False]
    first.tell(2)
    assert not any(one.is_mine() for one in others)
    assert [one.late for one in (first, *others)] == [2] * 4


def test_another_takes_the_place_of_one_that_falls_silent_and_keeps_it(store: HashStore) -> None:
    first, *others = lookouts(store, 4)
    assert [one.is_mine() for one in (first, *others)] == [True, False, False, False]
    assert not any(one.is_mine() for one in others)
    time.sleep(0.35)
    assert [one.is_mine() for one in others] == [True, False, False]
    assert not first.is_mine(), "it comes back too late"
    assert [one.is_mine() for one in others] == [True, False, False]


def test_a_place_that_was_taken_and_never_filled_is_taken_again(store: HashStore) -> None:
    store.add("stalled/0", 1)  # killed before it could say anything
    one, other = lookouts(store, 2)
    assert not one.is_mine()
    assert not other.is_mine()
    time.sleep(0.35)
    assert [one.is_mine(), other.is_mine()] == [True, False]


def test_a_meeting_is_complete_when_all_have_come_to_it(store: HashStore) -> None:
    signs = [Signs(store, rank) for rank in range(3)]
    for each in signs:
        each.begin()
    for meeting in (1, 2):
        for each in signs:
            assert not each.all_have_arrived(meeting, 3)
            each.arrive(meeting)
        assert all(each.all_have_arrived(meeting, 3) for each in signs)


def test_nothing_is_read_of_processes_that_have_not_begun(store: HashStore) -> None:
    signs = [Signs(store, rank) for rank in range(2)]
    signs[0].begin()
    assert signs[0].of_all(2) is None
    signs[1].begin()
    signs[1].work_on("loads the teacher")
    signs[1].beat(7)
    assert signs[0].of_all(2) == ([0, 0], ["", "loads the teacher"], [0, 7])
