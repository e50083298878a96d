"""Rows of parameters: a function of seed, epoch and position alone, with the distributions of timm's transform."""

from __future__ import annotations

import hashlib
import random
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp, kstest
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from deit_kd import InputError
from deit_kd.data.mixing import Example, Mixing
from deit_kd.randomness import seed_view
from deit_kd.views import Operation, Rows, draw
from tests.executed import drawing, view_ids

PHOTO = (60, 80)  # height and width


def rows(count: int, seed: int = 0, photo: tuple[int, int] = PHOTO, **options: Any) -> Rows:
    return draw(drawing(**options), seed, view_ids(count), np.tile(photo, (count, 1)))


def assert_same(these: Rows, those: Rows) -> None:
    for field in fields(Rows):
        np.testing.assert_array_equal(getattr(these, field.name), getattr(those, field.name), field.name)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9-n3-tweights", "3a", "original-mstd0.5", None])
def test_a_row_does_not_depend_on_the_batch_it_is_drawn_in(policy: str | None) -> None:
    every = rows(64, auto_augment=policy)
    order = np.random.default_rng(0).permutation(64)
    sizes = np.tile(PHOTO, (64, 1))
    assert_same(draw(drawing(auto_augment=policy), 0, view_ids(64)[order], sizes), every.at(order))
    for row in range(0, 64, 7):
        alone = draw(drawing(auto_augment=policy), 0, view_ids(64)[row : row + 1], sizes[:1])
        assert_same(alone, every.at(slice(row, row + 1)))


def test_rows_differ_between_seeds_epochs_and_positions() -> None:
    sizes = np.tile(PHOTO, (3, 1))
    ids = np.array([(0, 0), (0, 1), (1, 0)])
    keys = {tuple(key) for seed in (0, 1) for key in draw(drawing(), seed, ids, sizes).noise_key.tolist()}
    assert len(keys) == 6


def test_rows_stay_what_they_are_in_this_version_of_the_executor() -> None:
    """If this fails on purpose, EXECUTOR_VERSION must rise: stored answers belong to other views."""
    drawn = rows(256)
    digest = hashlib.sha256()
    for field in fields(Rows):
        digest.update(np.ascontiguousarray(np.round(getattr(drawn, field.name).astype(np.float64), 6)).tobytes())
    assert digest.hexdigest()[:16] == "9466ada690515f12"


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000))
def test_every_box_is_within_its_image(height: int, width: int, seed: int) -> None:
    drawn = rows(8, seed, (height, width), erasing=1.0)
    for boxes, size in ((drawn.crop, (height, width)), (drawn.erasing, (24, 24)), (drawn.mixing_box, (24, 24))):
        assert (boxes >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= size).all()
    assert (drawn.crop[:, 2:] > 0).all()


@pytest.mark.parametrize("photo", [PHOTO, (50, 51), (20, 200), (300, 40)])
def test_crops_have_the_distribution_of_timms(photo: tuple[int, int]) -> None:
    theirs = []
    image = Image.new("RGB", photo[::-1])
    for position in range(2000):
        seed_view(0, 0, position)
        theirs.append(RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)))
    ours = rows(2000, photo=photo).crop
    for column in range(4):
        assert ks_2samp(ours[:, column], np.array(theirs)[:, column]).pvalue > 1e-3
    assert ks_2samp(ours[:, 2:].prod(1), np.array(theirs)[:, 2:].prod(1)).pvalue > 1e-3


def test_erased_boxes_have_the_distribution_of_timms() -> None:
    erase = RandomErasing(0.5, mode="const", max_count=1, device="cpu")
    theirs = []
    for position in range(2000):
        seed_view(0, 0, position)
        erased = (erase(torch.ones(1, 24, 24))[0] == 0).nonzero()
        theirs.append((*erased[0].tolist(), *(erased[-1] - erased[0] + 1).tolist()) if len(erased) else (0, 0, 0, 0))
    ours = rows(2000, erasing=0.5).erasing
    assert abs((ours[:, 2] > 0).mean() - 0.5) < 0.04
    for column in range(4):
        assert ks_2samp(ours[:, column], np.array(theirs)[:, column]).pvalue > 1e-3


POLICIES = [
    "rand-m9-mstd0.5-inc1",
    "rand-m5-n3-p0.7-mstd101",
    "rand-m12-mmax15-mstd2-inc1-t3a",
    "rand-m8-n2-mstd1-tweights",
    "rand-t3aw-inc1",
    "original-mstd0.5",
    "v0r",
]


@pytest.mark.parametrize("policy", POLICIES)
def test_operations_and_arguments_have_the_distribution_of_timms(policy: str) -> None:
    theirs = timms(policy, 1500)
    drawn = rows(1500, auto_augment=policy, color_jitter=0.0)
    counted = np.bincount(drawn.operations.ravel(), minlength=17)
    assert {Operation(code) for code in np.flatnonzero(counted[1:]) + 1} == set(theirs)
    for operation, arguments in theirs.items():
        expected = len(arguments)
        assert abs(counted[operation] - expected) < 5 * np.sqrt(2 * expected), operation.name
        ours = drawn.arguments[drawn.operations == operation]
        assert ks_2samp(ours.round(3), np.round(arguments, 3)).pvalue > 1e-4, operation.name


def timms(policy: str, count: int) -> dict[Operation, list[float]]:
    """Return the arguments that timm's own transform gives its operations in `count` images of 24 px."""
    given: dict[Operation, list[float]] = {}
    parameters = {"translate_const": int(24 * 0.45), "img_mean": (1, 2, 3)}
    make = rand_augment_transform if policy.startswith("rand") else auto_augment_transform
    stage = make(policy, parameters)
    operations = stage.ops if policy.startswith("rand") else [each for chain in stage.policy for each in chain]
    for operation in operations:
        operation.aug_fn = partial(record, given, operation.name)
    for position in range(count):
        seed_view(0, 0, position)
        stage(None)
    return given


def record(given: dict[Operation, list[float]], name: str, image: None, argument: float = 0.0, **_: Any) -> None:
    """Note one call of timm's operation `name` in Pillow's terms."""
    if name in ("TranslateXRel", "TranslateYRel"):
        argument *= 24
    elif name == "Desaturate":
        name, argument = "Color", 1 - argument
    elif name.startswith("Posterize"):
        argument = max(1, argument)  # as our own transform does
    for ending in ("Increasing", "Original", "Rel"):
        name = name.removesuffix(ending)
    name = {"AutoContrast": "auto_contrast", "GaussianBlur": "blur", "SolarizeAdd": "solarize_add"}.get(name, name)
    name = name.replace("ShearX", "shear_x").replace("ShearY", "shear_y").replace("Translate", "translate_")
    given.setdefault(Operation[name.upper()], []).append(argument)


def test_blur_of_three_augment_has_any_radius_up_to_two() -> None:
    drawn = rows(3000, auto_augment="3a", color_jitter=0.0)
    codes, counts = np.unique(drawn.operations, return_counts=True)
    assert codes.tolist() == [Operation.SOLARIZE, Operation.COLOR, Operation.BLUR]
    assert (abs(counts - 1000) < 150).all()
    assert kstest(drawn.arguments[drawn.operations == Operation.BLUR], "uniform", (0.1, 1.9)).pvalue > 1e-3
    assert set(drawn.arguments[drawn.operations == Operation.COLOR]) == {0.0}  # grey


def test_a_weighted_policy_chooses_no_operation_twice() -> None:
    drawn = rows(2000, auto_augment="rand-n4-p1.0-tweights", color_jitter=0.0)
    assert all(len(set(operations)) == 4 for operations in drawn.operations.tolist())


def test_jitter_changes_three_factors_in_any_order() -> None:
    drawn = rows(1200, auto_augment=None, color_jitter=0.4)
    orders, counts = np.unique(drawn.operations, axis=0, return_counts=True)
    assert len(orders) == 6
    assert (counts > 130).all()
    for operation in (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR):
        assert kstest(drawn.arguments[drawn.operations == operation], "uniform", (0.6, 0.8)).pvalue > 1e-3


def test_jitter_is_left_out_where_timm_leaves_it_out() -> None:
    assert rows(8, auto_augment="rand-m9-n2", color_jitter=0.4).operations.shape == (8, 2)
    assert rows(8, auto_augment=None, color_jitter=0.0).operations.shape == (8, 0)


def test_flips_and_filters_are_as_often_as_they_should() -> None:
    drawn = rows(4000, horizontal_flip=0.3)
    assert abs(drawn.flip.mean() - 0.3) < 0.03
    assert abs(drawn.resize_bicubic.mean() - 0.5) < 0.03
    assert abs(drawn.operation_bicubic.mean() - 0.5) < 0.03
    assert rows(8, interpolation="bicubic").resize_bicubic.all()
    assert not rows(8, interpolation="bilinear").operation_bicubic.any()


def test_both_partners_of_a_pair_have_one_share_and_one_box() -> None:
    drawn = rows(400)
    np.testing.assert_array_equal(drawn.share[::2], drawn.share[1::2])
    np.testing.assert_array_equal(drawn.mixing_box[::2], drawn.mixing_box[1::2])
    assert len(set(drawn.share.tolist())) > 150


@pytest.mark.parametrize("options", [{}, {"cutmix": 0.0}, {"mixup": 0.0}, {"mix_probability": 0.6}])
def test_shares_have_the_distribution_of_mixing(options: dict[str, float]) -> None:
    names = {"mix_probability": "probability"}
    mixing = Mixing(
        classes=2, seed=0, **{"mixup": 0.8, "cutmix": 1.0, **{names.get(key, key): x for key, x in options.items()}}
    )
    theirs = []
    for first in range(0, 1600, 2):
        blank = torch.zeros(3, 24, 24)
        theirs.append(mixing([Example(blank, 0, 0, first), Example(blank, 1, 0, first + 1)]).targets[0, 0].item())
    drawn = rows(1600, **options)
    assert ks_2samp(drawn.share[::2], theirs).pvalue > 1e-3
    cut = drawn.mixing_box[:, 2] > 0
    np.testing.assert_allclose(drawn.share[cut], 1 - drawn.mixing_box[cut, 2:].prod(1) / 24**2)


def test_without_mixing_every_view_keeps_all_of_itself() -> None:
    assert set(rows(64, mixup=0.0, cutmix=0.0).share) == set(rows(64, mix_probability=0.0).share) == {1.0}


def test_partners_are_found_in_any_order_and_a_lonely_view_is_its_own() -> None:
    ids = np.array([(0, 4), (1, 5), (0, 7), (0, 5), (0, 9), (0, 6)])
    drawn = draw(drawing(), 0, ids, np.tile(PHOTO, (6, 1)))
    assert drawn.partners().tolist() == [3, 1, 5, 0, 4, 2]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("augmix-m5", "'augmix-m5' mixes several chains, .*; use data.executor: pillow"),
        ("rand-n9-t3aw-inc1-n15", "chooses 15 of 14 operations; lower n"),
        ("banana", "'banana' is not a timm policy; use"),
    ],
)
def test_policies_that_cannot_be_drawn_are_refused(policy: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        rows(2, auto_augment=policy)


def test_drawing_leaves_pythons_own_random_numbers_alone() -> None:
    random.seed(5)
    first = random.random()
    random.seed(5)
    rows(2, auto_augment="rand-m9-mstd0.1-inc1")
    assert random.random() == first
