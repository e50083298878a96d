"""Mixup and CutMix: whole pairs, shares that match the pixels, and the same result whatever the batch is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deit_kd import InputError
from deit_kd.data.mixing import Example, Mixing

lawful = settings(deadline=None, max_examples=40, derandomize=True)
seeds = st.integers(0, 10_000)


def mixing(**options: Any) -> Mixing:
    return Mixing(**{"classes": 4, "seed": 0, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, **options})


def examples(count: int = 8, first: int = 0, epoch: int = 0) -> list[Example]:
    """Views of one constant colour each: position p is p + 1 everywhere, and of class p mod 4."""
    return [Example(torch.full((3, 9, 11), p + 1.0), p % 4, epoch, p) for p in range(first, first + count)]


def pair(**options: Any) -> tuple[Tensor, Tensor]:
    """Return images and targets of one mixed pair, of constant images 0 and 1 and classes 0 and 1."""
    views = [Example(torch.zeros(3, 32, 32), 0, 0, 0), Example(torch.ones(3, 32, 32), 1, 0, 1)]
    batch = mixing(label_smoothing=0.0, **options)(views)
    return batch.images, batch.targets


@lawful
@given(seeds, st.floats(0, 0.9), st.booleans(), st.booleans())
def test_rows_of_targets_sum_to_one(seed: int, smoothing: float, mixup: bool, cutmix: bool) -> None:
    mix = mixing(seed=seed, label_smoothing=smoothing, mixup=0.8 * mixup, cutmix=1.0 * cutmix)
    torch.testing.assert_close(mix(examples()).targets.sum(-1), torch.ones(8))


@lawful
@given(seeds)
def test_mixup_is_the_convex_combination_that_the_targets_say(seed: int) -> None:
    images, targets = pair(seed=seed, cutmix=0.0)
    share = targets[0, 1]  # of the partner, which is 1 everywhere
    torch.testing.assert_close(images[0], share.expand(3, 32, 32))
    torch.testing.assert_close(images[1], (1 - share).expand(3, 32, 32))


@lawful
@given(seeds)
def test_cutmix_share_is_the_area_of_its_box(seed: int) -> None:
    images, targets = pair(seed=seed, mixup=0.0)
    assert set(images.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(images[0].mean(), targets[0, 1])
    torch.testing.assert_close(images[1].mean(), targets[1, 1])


@lawful
@given(seeds)
def test_cutmix_exchanges_one_rectangle(seed: int) -> None:
    images, _ = pair(seed=seed, mixup=0.0)
    rows, columns = images[0, 0].amax(1).sum(), images[0, 0].amax(0).sum()
    assert images[0, 0].sum() == rows * columns
    torch.testing.assert_close(images[1], 1 - images[0])


@lawful
@given(seeds, st.sampled_from([2, 4]))
def test_the_batch_that_a_pair_is_in_does_not_matter(seed: int, size: int) -> None:
    whole = mixing(seed=seed)(examples(8))
    parts = [mixing(seed=seed)(examples(size, first)) for first in range(0, 8, size)]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))


def test_partners_are_mixed_with_each_other_alone() -> None:
    before, after = torch.stack([example[0] for example in examples()]), mixing()(examples()).images
    assert not torch.equal(before, after)
    for first in range(0, 8, 2):
        low, high = first + 1, first + 2
        assert after[first : first + 2].min() >= low
        assert after[first : first + 2].max() <= high


@pytest.mark.parametrize(("option", "value"), [("seed", 1), ("epoch", 1)])
def test_another_seed_or_epoch_mixes_otherwise(option: str, value: int) -> None:
    here = mixing()(examples())
    there = mixing(seed=1)(examples()) if option == "seed" else mixing()(examples(epoch=value))
    assert not torch.equal(here.targets, there.targets)


def test_labels_and_view_ids_are_those_before_mixing() -> None:
    batch = mixing()(examples(4, first=6, epoch=2))
    assert batch.labels.tolist() == [2, 3, 0, 1]
    assert batch.view_ids is not None
    assert batch.view_ids.tolist() == [[2, 6], [2, 7], [2, 8], [2, 9]]


@pytest.mark.parametrize("options", [{"mixup": 0.0, "cutmix": 0.0}, {"probability": 0.0}])
def test_without_mixing_images_stay_and_targets_are_smoothed_labels(options: dict[str, float]) -> None:
    batch = mixing(**options)(examples(3))
    assert torch.equal(batch.images, torch.stack([example[0] for example in examples(3)]))
    assert batch.targets[1].tolist() == pytest.approx([0.025, 0.925, 0.025, 0.025])


def test_probability_is_the_share_of_mixed_pairs() -> None:
    batch = mixing(probability=0.3, cutmix=0.0, label_smoothing=0.0)(examples(2000))
    mixed = (batch.targets.amax(-1) < 1).float().mean().item()
    assert mixed == pytest.approx(0.3, abs=0.05)


def test_switch_probability_is_the_share_of_cutmix() -> None:
    images = mixing(switch_probability=0.7)(examples(2000)).images
    blended = (images != images.round()).flatten(1).any(1).float().mean().item()
    assert blended == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(("first", "count"), [(1, 4), (0, 3)])
def test_a_torn_pair_is_refused(first: int, count: int) -> None:
    with pytest.raises(InputError, match="has lost its partner"):
        mixing()(examples(count, first))
