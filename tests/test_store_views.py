"""What a label store needs of the loader: epochs of views that come again, and any view at any time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deit_kd.data import Photos, TrainingLoader
from deit_kd.data.order import TrainingBatchSampler
from deit_kd.interfaces import Batch
from deit_kd.views import training_transform
from tests.tiny_parts import training_loader

DEALT: dict[str, Any] = {
    "photos": 30,
    "repeats": 1,
    "seed": 1,
    "batch_size": 2,
    "accumulation_steps": 1,
    "rank": 0,
    "processes": 1,
    "pairs": True,
    "epochs": 6,
}


def photos(count: int) -> Photos:
    arrays = np.random.default_rng(0).integers(0, 255, (count, 12, 12, 3)).astype(np.uint8)
    return Photos.of_arrays([str(i) for i in range(count)], [i % 3 for i in range(count)], ("a", "b", "c"), arrays)


def loader(count: int = 23, **options: Any) -> TrainingLoader:
    transform = training_transform(
        image_size=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bilinear",
        auto_augment=None,
        color_jitter=0.2,
        horizontal_flip=0.5,
        scale=(0.3, 1.0),
        ratio=(0.75, 1.33),
        erasing=0.5,
    )
    return training_loader(photos(count), transform, **{"seed": 5, "batch_size": 6, "epochs": 5, **options})


def by_view(batches: Any) -> dict[tuple[int, ...], torch.Tensor]:
    return {
        tuple(view): image
        for batch in batches
        for view, image in zip(batch.view_ids.tolist(), batch.images, strict=True)
    }


def test_a_longer_run_deals_the_view_epochs_again_mixing_included() -> None:
    cycled = loader(epochs=5)
    cycled.cycle_views(2)
    batches: list[Batch] = list(cycled.batches(0))
    first: dict[tuple[int, ...], torch.Tensor] = {}
    for view, image in (item for batch in batches for item in by_view([batch]).items()):
        assert torch.equal(first.setdefault(view, image), image)
    assert {int(batch.view_ids[0, 0]) for batch in batches if batch.view_ids is not None} == {0, 1}
    assert len(first) == 2 * cycled.views_per_epoch


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(4, 60), st.integers(1, 3), st.integers(1, 5))
def test_view_epochs_that_come_again_show_every_view_equally_often(count: int, repeats: int, pairs: int) -> None:
    if count // repeats * repeats < 2 * pairs or count // repeats < 2:
        return
    batch_sampler = TrainingBatchSampler(
        **{**DEALT, "photos": count, "repeats": repeats, "batch_size": 2 * pairs, "epochs": 12 * repeats}
    )
    batch_sampler.view_epochs = repeats
    dealt = Counter((key.epoch, key.position) for batch in batch_sampler for key in batch)
    assert len(dealt) == repeats * batch_sampler.views_per_epoch
    assert max(dealt.values()) - min(dealt.values()) <= 1


def test_a_cycled_run_continues_in_the_middle_as_it_would_have_gone_on() -> None:
    whole, resumed = loader(epochs=4), loader(epochs=4)
    whole.cycle_views(3)
    resumed.cycle_views(3)
    expected = list(whole.batches(0))[7:]
    assert [batch.view_ids.tolist() for batch in resumed.batches(7)] == [batch.view_ids.tolist() for batch in expected]


@pytest.mark.parametrize("first_step", [0, 7])
@pytest.mark.parametrize("options", [{}, {"accumulation_steps": 3, "mixup": 0.0, "cutmix": 0.0}, {"repeats": 3}])
@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (1, 2)])
def test_the_views_of_coming_batches_are_known_before_they_are_made(
    first_step: int, options: dict[str, Any], rank: int, processes: int
) -> None:
    cycled = loader(40, batch_size=12, epochs=4, rank=rank, processes=processes, **options)
    cycled.cycle_views(2)
    made: list[Any] = [batch.view_ids for batch in cycled.batches(first_step)]
    told = list(cycled.view_ids(first_step))
    assert len(made) == len(told) > 0
    assert all(torch.equal(*pair) for pair in zip(made, told, strict=True))
    begun = dict.fromkeys((step // cycled.steps_per_epoch) for step in range(first_step, cycled.total_steps))
    assert cycled.view_epochs(first_step) == [epoch % 2 for epoch in begun]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(4, 40), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
def test_the_dealer_repeats_the_order_of_the_view_epoch(count: int, repeats: int, epochs: int, cycle: int) -> None:
    if count // repeats < 2:
        return
    batch_sampler = TrainingBatchSampler(**{**DEALT, "photos": count, "repeats": repeats, "epochs": epochs})
    plain = list(batch_sampler)
    batch_sampler.view_epochs = cycle
    # Batches of one pair: all views but an odd last one are dealt every time.
    if batch_sampler.views_per_epoch == batch_sampler.steps_per_epoch * 2:
        period = cycle * batch_sampler.steps_per_epoch
        assert list(batch_sampler) == [plain[step % period] for step in range(len(plain))]


@pytest.mark.parametrize("options", [{}, {"repeats": 3}, {"mixup": 0.0, "cutmix": 0.0}, {"workers": 2}])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_any_view_is_the_one_that_training_sees(options: dict[str, Any], batch_size: int) -> None:
    trained = by_view(loader(**{**options, "workers": 0}).batches(0))
    asked_loader = loader(**options)
    view_ids = np.array([[epoch, p] for epoch in (0, 3) for p in range(asked_loader.views_per_epoch)])
    asked = by_view(asked_loader.views(view_ids, batch_size))
    assert len(asked) == 2 * asked_loader.views_per_epoch
    for view in asked.keys() & trained.keys():
        assert torch.equal(asked[view], trained[view])
    assert {view for view in trained if view[0] in (0, 3)} <= asked.keys()


@pytest.mark.parametrize(
    ("options", "asked", "answered"),
    [
        ({}, [[1, 3]], [[1, 2], [1, 3]]),
        ({}, [[2, 0], [1, 5], [1, 4]], [[1, 4], [1, 5], [2, 0], [2, 1]]),
        ({"mixup": 0.0, "cutmix": 0.0}, [[1, 3]], [[1, 3]]),
    ],
)
def test_a_view_comes_with_the_partner_that_it_is_mixed_with(options: Any, asked: Any, answered: Any) -> None:
    batches = loader(**options).views(np.array(asked), 8)
    assert [view for batch in batches if batch.view_ids is not None for view in batch.view_ids.tolist()] == answered


@pytest.mark.parametrize(
    ("count", "options", "views"),
    [
        (23, {}, 22),  # the last has no partner, and no batch can ever hold it
        (23, {"mixup": 0.0, "cutmix": 0.0}, 23),
        (23, {"repeats": 3}, 20),
        (24, {}, 24),
    ],
)
def test_an_epoch_has_every_view_that_some_batch_size_deals(count: int, options: dict[str, Any], views: int) -> None:
    assert loader(count, **options).views_per_epoch == views


def test_view_ids_stay_in_host_memory() -> None:
    batch = next(iter(loader().batches(0)))
    moved = batch.to(torch.device("meta"))
    assert moved.images.is_meta
    assert moved.view_ids is batch.view_ids
