"""Pillow's views of a fixed seed are those that they have always been, or their version says otherwise."""

from __future__ import annotations

import hashlib
from importlib.metadata import version

import pytest
import torch

from deit_kd.randomness import VIEWS_VERSION
from tests.helpers import MEAN, STD
from tests.tiny_parts import array_photos, training_loader, transform

MADE_WITH = {"pillow": "13.0.0", "timm": "1.0.31", "torchvision": "0.29.2"}  # other versions may make other views
HERE = {name: version(name).split("+")[0] for name in MADE_WITH}
OTHERS = [f"{name} {HERE[name]} is not {made}" for name, made in MADE_WITH.items() if HERE[name] != made]
made_here = pytest.mark.skipif(bool(OTHERS), reason=f"golden views: {', '.join(OTHERS)}")


def views(**options: object) -> list[torch.Tensor]:
    """Return images [24, 3, 16, 16] and targets [24, 3] of an epoch with repeats."""
    own = {"erasing": 0.0, **options}
    mixing = {name: own.pop(name, 0.0) for name in ("mixup", "cutmix")}
    loader = training_loader(array_photos(24, 40), transform(**own), seed=11, repeats=2, **mixing)
    batches = list(loader.batches(0))
    return [torch.cat([batch.images for batch in batches]), torch.cat([batch.targets for batch in batches])]


def levels(images: torch.Tensor) -> torch.Tensor:
    """Return the 8-bit pixels of views that are neither erased nor mixed, whatever a CPU's arithmetic rounds."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((images * std + mean) * 255).round().to(torch.uint8)


@made_here
@pytest.mark.parametrize(
    ("options", "golden"),
    [
        ({}, "7bd876d902ae7a4ff0bdf82f059ccd6c"),
        ({"auto_augment": "3a"}, "26a3e77e5dadff142bcbcfab9697981b"),
        ({"auto_augment": None, "interpolation": "bicubic", "scale": (0.08, 1.0)}, "90694afa0228579fb5574491f51719b2"),
    ],
    ids=["RandAugment", "three-augment", "colour jitter"],
)
def test_pixels_are_those_of_version_2(options: dict[str, object], golden: str) -> None:
    assert VIEWS_VERSION == 2
    images, _ = views(**options)
    assert hashlib.blake2b(levels(images).numpy().tobytes(), digest_size=16).hexdigest() == golden


@made_here
def test_erasing_and_mixing_are_those_of_version_2() -> None:
    images, targets = views(auto_augment=None, erasing=0.5, mixup=0.8, cutmix=1.0)
    assert images.mean((1, 2, 3))[:6].tolist() == pytest.approx(
        [0.887007, 0.242014, -0.061727, -0.087687, 0.069509, -0.053849], abs=1e-5
    )
    assert targets[:6].amax(1).tolist() == pytest.approx(
        [0.919271, 0.919271, 0.933333, 0.933333, 0.933333, 0.933333], abs=1e-5
    )
