"""Every view is a pure function of seed, epoch and position: workers and batches do not matter."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import ColorJitter, Normalize

from deit_kd import InputError
from deit_kd.data import build_evaluation_loader
from deit_kd.data.loader import Views
from deit_kd.data.order import ViewKey
from deit_kd.data.sharing import SharedBuffers
from deit_kd.randomness import seed_view
from tests.helpers import MEAN, STD
from tests.tiny_parts import array_photos, training_loader, transform

PHOTOS = array_photos(24)


def epoch_views(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, targets and view ids of a whole run, in the order of one process."""
    loader = training_loader(PHOTOS, transform(), **{"repeats": 2, "epochs": 2, **options})
    batches = list(loader.batches(0))
    ids = torch.cat([batch.view_ids for batch in batches if batch.view_ids is not None])
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.targets for batch in batches]), ids


def view(seed: int = 0, epoch: int = 0, position: int = 0, photo: int = 0, **options: Any) -> Tensor:
    return Views(PHOTOS, transform(**options), seed)[ViewKey(epoch, position, photo)][0]


@pytest.mark.parametrize(
    "options",
    [{"workers": 2}, {"workers": 1}, {"batch_size": 4}, {"accumulation_steps": 2}, {"batch_size": 24, "workers": 1}],
)
def test_views_do_not_depend_on_workers_or_batches(options: dict[str, int]) -> None:
    for here, there in zip(epoch_views(), epoch_views(**options), strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_lent_batches_are_whole_until_the_next_is_asked_for(workers: int) -> None:
    loader = training_loader(PHOTOS, transform(), batch_size=4, epochs=3, workers=workers)
    images = []
    for batch in loader.batches(0, lent=True):
        time.sleep(0.05)  # the workers go on as far as they may
        images.append(batch.images.clone())
    expected = training_loader(PHOTOS, transform(), batch_size=4, epochs=3).batches(0)
    assert torch.equal(torch.cat(images), torch.cat([batch.images for batch in expected]))


def test_views_do_not_depend_on_the_number_of_processes() -> None:
    whole = epoch_views(epochs=1)
    shares = [epoch_views(epochs=1, rank=rank, processes=2) for rank in range(2)]
    for index in range(3):
        parts = [share[index].unflatten(0, (-1, 4)) for share in shares]
        assert torch.equal(whole[index], torch.stack(parts, 1).flatten(0, 2))


@pytest.mark.parametrize("key", [{"seed": 1}, {"epoch": 1}, {"position": 1}])
def test_another_seed_epoch_or_position_is_another_view(key: dict[str, int]) -> None:
    assert not torch.equal(view(), view(**key))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "3a", "augmix-m5-w3", "original-mstd0.5", None])
@pytest.mark.parametrize("erasing", [0.0, 1.0])
def test_a_view_is_the_same_again_whatever_was_drawn_before(policy: str | None, erasing: float) -> None:
    first = view(position=5, auto_augment=policy, erasing=erasing)
    np.random.seed(1)
    torch.rand(17)
    view(position=6, auto_augment=policy, erasing=erasing)
    assert torch.equal(first, view(position=5, auto_augment=policy, erasing=erasing))


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_a_workers_memory_is_filled_again_but_never_a_batch_that_was_handed_out(ahead: int) -> None:
    stack = SharedBuffers(ahead).stack
    numbers: Any = torch.arange(12.0).view(12, 1)
    loader = DataLoader(numbers, batch_size=2, collate_fn=stack, num_workers=1, prefetch_factor=ahead)
    copied, kept = zip(*((batch.clone(), batch) for batch in loader), strict=True)
    assert torch.equal(torch.cat(copied), numbers)
    assert torch.equal(kept[0], copied[5 - 5 % (ahead + 1)])
    assert not stack([torch.zeros(3)]).is_shared()


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "3a", None])
@pytest.mark.parametrize("jitter", [0.0, 0.4, (0.4, 0.3, 0.2, 0.1)])
def test_fewer_passes_make_the_views_of_timms_own_stages(policy: str | None, jitter: Any) -> None:
    options = {"auto_augment": policy, "color_jitter": jitter, "interpolation": "bicubic"}
    timms = transforms_imagenet_train(16, scale=(0.3, 1.0), mean=MEAN, std=STD, re_prob=0.5, re_mode="pixel", **options)
    ours = transform(**options)
    assert not any(isinstance(stage, ColorJitter | Normalize) for stage in ours.transforms)  # type: ignore[attr-defined]
    for position in range(40):
        image = PHOTOS.image(position % len(PHOTOS))
        seed_view(0, 0, position)
        expected = timms(image)
        seed_view(0, 0, position)
        assert torch.equal(ours(image), expected)


def test_repeated_views_of_a_photo_differ() -> None:
    images, _, _ = epoch_views(mixup=0.0, cutmix=0.0, epochs=1)
    assert len(images.flatten(1).unique(dim=0)) == len(images)


@pytest.mark.parametrize("policy", ["rand-m10-mstd9-inc1", "rand-m10-inc1", "v0r-mstd9", "augmix-m10-mstd9"])
def test_posterise_never_asks_for_0_bits(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def only_posterise(self: AugmentOp, image: Image.Image) -> Image.Image:
        if self.name.startswith("Posterize"):
            asked.extend(self.level_fn(level, self.hparams)[0] for level in (0.0, 5.0, 9.6, 10.0))
        return image

    monkeypatch.setattr(AugmentOp, "__call__", only_posterise)
    for position in range(150):
        view(position=position, auto_augment=policy)
    assert asked
    assert min(asked) == 1


def test_three_augment_is_grey_solarised_or_blurred() -> None:
    coloured = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8))
    make = transform(
        auto_augment="3a", mean=(0.0,) * 3, std=(1.0,) * 3, erasing=0.0, color_jitter=0.0, scale=(1.0, 1.0)
    )
    grey = 0
    for seed in range(60):
        torch.manual_seed(seed)
        image = make(coloured)
        assert image.shape == (3, 16, 16)
        grey += bool(torch.equal(image[0], image[1]) and torch.equal(image[1], image[2]))
    assert 8 <= grey <= 35


@pytest.mark.parametrize("policy", ["banana", "rand-m9-foo1", "rand-m9-w7", "augmix-q3", "v0-foo1", "originals"])
def test_a_policy_that_timm_does_not_know_is_one_line(policy: str) -> None:
    with pytest.raises(InputError, match=rf"^augment\.auto_augment: '{policy}' is not a timm policy") as caught:
        transform(auto_augment=policy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("count", "processes", "workers"), [(24, 1, 0), (24, 1, 2), (23, 2, 0), (24, 5, 0)])
def test_evaluation_deals_every_photo_exactly_once(count: int, processes: int, workers: int) -> None:
    labels: list[int] = []
    for rank in range(processes):
        loader = build_evaluation_loader(
            PHOTOS.subset(range(count)),
            transform(),
            batch_size=5,
            rank=rank,
            processes=processes,
            workers=workers,
            pin_memory=False,
        )
        labels += [int(label) for batch in loader for label in batch.labels]
    assert sorted(labels) == sorted(PHOTOS.labels[:count])
