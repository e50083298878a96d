"""Datasets: any image folder, the digits, splitting by hash, and what identifies a set."""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import Imagenette

from deit_kd import InputError
from deit_kd.config import parse_config
from deit_kd.data import Photos, Splits, load_image
from deit_kd.data.names import Names
from deit_kd.data.photos import split_by_hash
from deit_kd.runs.photos import agreed_splits
from tests.helpers import CLASSES, ONE_PROCESS, REPOSITORY, as_arguments, write_photos
from tests.tiny_parts import array_photos, folder_splits

CPU = torch.device("cpu")
CLOTHING = REPOSITORY.parent / "shared" / "data" / "clothing160"


def splits(root: Path | None, **options: Any) -> Splits:
    return folder_splits(root, **{"validation_fraction": 0.25, **options})


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(6, 80), st.floats(0.01, 0.99))
def test_a_split_is_disjoint_covers_and_is_stratified(count: int, fraction: float) -> None:
    photos = array_photos(count)
    train, validation = split_by_hash(photos, fraction)
    assert sorted([*train.names, *validation.names]) == photos.names
    for label in range(3):
        members = list(photos.labels).count(label)
        held_out = list(validation.labels).count(label)
        assert 1 <= held_out <= members - 1
        assert abs(held_out - members * fraction) <= 1


def test_a_split_stays_the_same_for_ever() -> None:
    assert list(split_by_hash(array_photos(30), 0.2).validation.names) == [
        "0010",
        "0018",
        "0019",
        "0021",
        "0023",
        "0026",
    ]


def test_a_split_does_not_depend_on_the_order_of_the_photos() -> None:
    photos = array_photos(30)
    backwards = photos.subset(range(29, -1, -1))
    assert set(split_by_hash(photos, 0.2).validation.names) == set(split_by_hash(backwards, 0.2).validation.names)


def test_a_split_and_the_digest_stay_when_the_root_moves(tmp_path: Path) -> None:
    before = splits(write_photos(tmp_path / "here", {"": 8}))
    (tmp_path / "here").rename(tmp_path / "there")
    after = splits(tmp_path / "there")
    assert list(before.validation.names) == list(after.validation.names)
    assert np.array_equal(before.validation.labels, after.validation.labels)
    assert after.train.digest() == splits(tmp_path / "there").train.digest()


def test_images_follow_their_names_into_a_split() -> None:
    photos = array_photos(30)
    validation = split_by_hash(photos, 0.2).validation
    for index, name in enumerate(validation.names):
        assert np.array_equal(validation.image(index), photos.image(int(name)))
        assert validation.labels[index] == photos.labels[int(name)]


@pytest.mark.parametrize(
    ("tree", "options", "sizes"),
    [
        ({"train": 4, "validation": 2}, {}, (12, 6)),
        ({"learn": 4, "check": 2}, {"train_split": "learn", "validation_split": "check"}, (12, 6)),
        ({"train": 4}, {}, (9, 3)),
        ({"": 4}, {}, (9, 3)),
    ],
)
def test_image_folder_trees(tmp_path: Path, tree: dict[str, int], options: dict[str, Any], sizes: Any) -> None:
    train, validation = splits(write_photos(tmp_path / "photos", tree), **options)
    assert (len(train), len(validation)) == sizes
    assert train.classes == validation.classes == CLASSES
    assert set(train.labels) == set(validation.labels) == {0, 1, 2}


@pytest.mark.parametrize(
    ("folders", "named", "line"),
    [
        (
            ("train", "val", "test"),
            {},
            "photos of 'train' are held out; not read: test, val",
        ),
        (("train", "val"), {"data__validation_split": "val"}, None),
        (("train", ".cache"), {}, None),
        (("",), {}, None),
    ],
)
def test_a_validation_folder_of_another_name_is_not_passed_over_silently(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    folders: tuple[str, ...],
    named: dict[str, Any],
    line: str | None,
) -> None:
    write_photos(tmp_path, dict.fromkeys(folders, 2))
    agreed_splits(parse_config(as_arguments(data__root=tmp_path, **named))[0], ONE_PROCESS)
    said = capsys.readouterr().out
    assert line in " ".join(said.split()) if line else not said


def test_the_digits_come_with_scikit_learn() -> None:
    train, validation = splits(None, name="digits", validation_fraction=0.2)
    assert len(train) + len(validation) == 1797
    assert len(validation) == 359  # a fifth of each class, rounded
    assert train.classes == tuple("0123456789")
    assert train.image(0).size == (8, 8)


def test_real_photos_have_the_counts_that_their_readme_says() -> None:
    if not CLOTHING.is_dir():
        pytest.skip("clothing160 is not there")
    train, validation = splits(CLOTHING)
    assert (len(train), len(validation), len(train.classes)) == (3068, 341, 10)
    assert min(train.image(0).size) == 160


def changed(photos: Photos, **fields: Any) -> Photos:
    return dataclasses.replace(photos, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"names": Names(["other", *array_photos(5).names[1:]])},
        {"labels": np.array([2, *array_photos(5).labels[1:]])},
        {"classes": ("class0", "class1", "other")},
        {"rows": np.arange(5)[::-1]},
    ],
)
def test_the_digest_knows_names_labels_classes_and_pixels(fields: dict[str, Any]) -> None:
    assert changed(array_photos(5), **fields).digest() != array_photos(5).digest()


def test_the_digest_knows_the_size_of_files(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", {"train": 2, "validation": 2})
    before = splits(root).train.digest()
    Image.new("RGB", (99, 99)).save(root / "train" / "dots" / "000.png")
    assert splits(root).train.digest() != before


def test_photos_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (30, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (10, 30)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_photo_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (5, 5)).save(path)
    assert load_image(path).mode == "RGB"


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_a_corrupt_photo_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.png: cannot be read as an image"):
        load_image(tmp_path / "broken.png")


def test_a_truncated_photo_is_refused_by_name(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    with pytest.raises(InputError, match=r"cut\.jpg: cannot be read as an image"):
        load_image(tmp_path / "cut.jpg")


@pytest.mark.parametrize("name", ["imagenette", "cifar10", "cifar100"])
def test_a_set_that_is_not_there_asks_for_the_download(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"data\.root: .*--data\.download true"):
        splits(tmp_path, name=name)
    with pytest.raises(InputError, match=r"data\.root: is not set"):
        splits(None, name=name)


def test_imagenette_is_read_from_torchvisions_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    classes = tuple(sorted(Imagenette._WNID_TO_CLASS))
    for split, wordnet_id, index in product(("train", "val"), classes, range(2)):
        if split == "train" or index == 0:
            folder = tmp_path / "imagenette2" / split / wordnet_id
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(folder / f"{index}.JPEG")
    train, validation = splits(Path("~", tmp_path.name), name="imagenette")
    assert (len(train), len(validation), train.classes) == (20, 10, classes)


def test_photos_in_memory_are_the_files(photos_root: Path) -> None:
    photos = splits(photos_root).train
    kept = photos.cached("memory", CPU)
    assert kept.digest() == photos.digest()
    for index in range(len(photos)):
        assert kept.image(index).tobytes() == photos.image(index).tobytes()


def test_photos_in_memory_need_no_file(tmp_path: Path) -> None:
    kept = splits(write_photos(tmp_path, {"train": 3, "validation": 3})).train.cached("memory", CPU)
    for file in tmp_path.rglob("*.*"):
        file.unlink()
    assert kept.subset([1]).image(0).size == kept.image(1).size
