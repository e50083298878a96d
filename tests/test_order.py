"""The order of an epoch and its dealing: derived from seed and epoch, in whole pairs, to any number of processes."""

from __future__ import annotations

from collections import Counter
from statistics import mean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deit_kd import InputError
from deit_kd.data.order import BLOCK_PHOTOS, TrainingBatchSampler, ViewKey, epoch_order
from deit_kd.randomness import VIEWS_VERSION

lawful = settings(deadline=None, max_examples=60, derandomize=True)
photos = st.integers(2, 300)
repeats = st.integers(2, 5)
epochs = st.integers(0, 12)


def deal(**options: Any) -> list[list[ViewKey]]:
    base: dict[str, Any] = {
        "photos": 50,
        "repeats": 1,
        "seed": 3,
        "batch_size": 8,
        "accumulation_steps": 1,
        "rank": 0,
        "processes": 1,
        "pairs": True,
        "epochs": 2,
    }
    return list(TrainingBatchSampler(**{**base, **options}))


@lawful
@given(st.integers(1, 200), st.integers(0, 5), epochs)
def test_without_repeats_an_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(count, 1, seed, epoch)) == list(range(count))


@lawful
@given(photos, st.integers(1, 4), st.integers(0, 5), epochs)
def test_the_order_is_a_pure_function_of_seed_and_epoch(count: int, copies: int, seed: int, epoch: int) -> None:
    if count // copies >= 2:
        first = epoch_order(count, copies, seed, epoch).tolist()
        epoch_order(count, copies, seed + 1, epoch + 1)
        assert first == epoch_order(count, copies, seed, epoch).tolist()


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0)])
def test_another_epoch_or_seed_is_another_order(copies: int, seed: int, epoch: int) -> None:
    assert epoch_order(100, copies, 0, 0).tolist() != epoch_order(100, copies, seed, epoch).tolist()


@lawful
@given(photos, repeats, epochs)
def test_an_epoch_keeps_the_sets_length_and_shows_each_photo_r_times(count: int, copies: int, epoch: int) -> None:
    if count // copies >= 2:
        views = Counter(epoch_order(count, copies, 0, epoch).tolist())
        assert len(views) == count // copies
        assert set(views.values()) == {copies}


@lawful
@given(photos, repeats, epochs)
def test_views_of_a_photo_lie_in_one_block(count: int, copies: int, epoch: int) -> None:
    taken = count // copies
    if taken < 2:
        return
    size, last = BLOCK_PHOTOS * copies, (taken - 1) // BLOCK_PHOTOS
    if taken % BLOCK_PHOTOS == 1 and taken > 1:
        last = max(0, last - 1)  # a last block of one photo joins the block before
    blocks: dict[int, set[int]] = {}
    for position, photo in enumerate(epoch_order(count, copies, 0, epoch).tolist()):
        blocks.setdefault(photo, set()).add(min(position // size, last))
    assert all(len(where) == 1 for where in blocks.values())


@settings(lawful, max_examples=300)
@given(photos, repeats, epochs)
def test_no_pair_holds_one_photo_twice(count: int, copies: int, epoch: int) -> None:
    if count // copies >= 2:
        order = epoch_order(count, copies, 0, epoch).tolist()
        assert all(a != b for a, b in zip(order[::2], order[1::2], strict=False))


def partners(count: int, copies: int, version: int) -> list[int]:
    """Return how many others each photo of an epoch is mixed with."""
    order = epoch_order(count, copies, 0, 0, version).tolist()
    met: dict[int, set[int]] = {}
    for a, b in zip(order[::2], order[1::2], strict=True):
        met.setdefault(a, set()).add(b)
        met.setdefault(b, set()).add(a)
    return [len(others) for others in met.values()]


@pytest.mark.parametrize("copies", [3, 5])
def test_a_photo_meets_another_partner_in_nearly_every_repeat(copies: int) -> None:
    assert mean(partners(320 * copies, copies, VIEWS_VERSION)) > 0.85 * copies


def test_old_stores_keep_their_two_partners() -> None:
    assert set(partners(960, 3, 1)) == {2}


@pytest.mark.parametrize("copies", [2, 3])
def test_every_epoch_takes_another_part_of_the_set(copies: int) -> None:
    parts = [set(epoch_order(60, copies, 0, epoch).tolist()) for epoch in range(copies)]
    assert set.union(*parts) == set(range(60))
    assert sum(map(len, parts)) == 60


def test_repeats_work_on_100_images_and_one_process() -> None:
    keys = [key for batch in deal(photos=100, repeats=3, batch_size=32, epochs=1) for key in batch]
    assert len(keys) == 96  # 33 photos, 3 views each, in whole batches of 32


def test_repeats_that_leave_one_photo_an_epoch_are_refused() -> None:
    with pytest.raises(InputError, match=r"augment\.repeats: 3 is too many for 5 photos; use 2 or less"):
        epoch_order(5, 3, 0, 0)


@lawful
@given(
    st.sampled_from([(1, 2), (2, 1), (2, 2), (4, 1), (1, 4)]),
    st.integers(1, 3),
    st.integers(16, 90),
    st.integers(1, 2),
)
def test_processes_and_micro_steps_share_out_the_batch_of_one_process(
    split: tuple[int, int], copies: int, count: int, factor: int
) -> None:
    processes, accumulation = split
    size = 8 * factor
    if count // copies * copies < size:
        return
    options = {"photos": count, "repeats": copies, "batch_size": size}
    shares = [
        deal(**options, rank=rank, processes=processes, accumulation_steps=accumulation) for rank in range(processes)
    ]
    for step, whole in enumerate(deal(**options)):
        micro = slice(step * accumulation, (step + 1) * accumulation)
        joined = [
            key for part in zip(*(share[micro] for share in shares), strict=True) for keys in part for key in keys
        ]
        assert joined == whole


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (2, 2)])
def test_no_pair_is_torn(processes: int, accumulation: int) -> None:
    for rank in range(processes):
        for block in deal(batch_size=16, rank=rank, processes=processes, accumulation_steps=accumulation):
            positions = [key.position for key in block]
            assert positions == list(range(positions[0], positions[0] + len(block)))
            assert positions[0] % 2 == 0
            assert len(block) % 2 == 0


def test_the_last_incomplete_batch_is_dropped() -> None:
    batches = deal(photos=50, batch_size=8, epochs=2)
    assert [len(batch) for batch in batches] == [8] * 12
    assert {key.position for batch in batches for key in batch} == set(range(48))


def test_dealing_goes_on_from_any_step() -> None:
    batch_sampler = TrainingBatchSampler(
        photos=50, repeats=2, seed=0, batch_size=8, accumulation_steps=2, rank=1, processes=2, pairs=True, epochs=3
    )
    whole = list(batch_sampler)
    batch_sampler.first_step = 7
    assert list(batch_sampler) == whole[14:]
    assert len(batch_sampler) == len(whole) - 14


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 9}, "9 is not a multiple of 2 .* use 8"),
        ({"batch_size": 6, "processes": 2}, "6 is not a multiple of 4 .* use 4"),
        ({"batch_size": 20, "processes": 2, "accumulation_steps": 4}, "20 is not a multiple of 16 .* use 16"),
        ({"batch_size": 1, "accumulation_steps": 2, "pairs": False}, "1 is not a multiple of 2 .* use 2"),
        ({"batch_size": 52}, "52 is more than the 50 views of an epoch; use 50 or less"),
        ({"batch_size": 50, "repeats": 3}, "50 is more than the 48 views of an epoch; use 48 or less"),
    ],
)
def test_a_batch_that_cannot_be_dealt_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=rf"train\.batch_size: {reason}"):
        deal(**options)


@pytest.mark.parametrize("options", [{"batch_size": 9, "pairs": False}, {"batch_size": 50}])
def test_a_batch_that_can_just_be_dealt_is_taken(options: dict[str, Any]) -> None:
    assert len(deal(**options)[0]) == options["batch_size"]
