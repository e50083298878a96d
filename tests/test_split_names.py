"""Splits by other names than train and validation are never taken for classes, in a tree or in shards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from deit_kd import InputError
from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.runs.photos import agreed_splits
from tests.helpers import CLASSES, ONE_PROCESS, as_arguments, draw, write_photos
from tests.tiny_parts import folder_splits

PAIRS = [
    ("Train", "Val"),
    ("training", "test"),
    ("Training", "Testing"),
    ("training_set", "test_set"),
    ("seg_train", "seg_test"),
    ("val", "test"),
    ("Train", "unlabelled"),
]
AS_CLASSES = ("test tube", "test strip", "latest", "trainer", "trainee", "value", "evaluate")


def as_tree(place: Path, pair: tuple[str, ...]) -> dict[str, Any]:
    return {"root": write_photos(place / "photos", dict.fromkeys(pair, 4))}


def as_shards(place: Path, pair: tuple[str, ...]) -> dict[str, Any]:
    """Shards side by side, whose names say their split."""
    root = place / "shards"
    root.mkdir()
    for split in pair:
        tree = write_photos(place / f"tree of {split}", {"": 4})
        assert main(["data", "pack", str(tree), str(place / split)]) == 0
        for number, shard in enumerate(sorted((place / split).glob("*.tar"))):
            shutil.move(shard, root / f"{split}-{number}.tar")
    assert main(["data", "index", str(root), "--data.name", "shards"]) == 0
    return {"root": root, "name": "shards"}


def as_hub(place: Path, pair: tuple[str, ...]) -> dict[str, Any]:
    """A saved Hugging Face data set with these splits."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    images = {"image": [draw(label % 3, label) for label in range(12)], "label": [label % 3 for label in range(12)]}
    part = datasets.Dataset.from_dict(images, features=features)
    datasets.DatasetDict(dict.fromkeys(pair, part)).save_to_disk(str(place / "hub"))
    return {"root": place / "hub", "name": "hf"}


FORMS = [as_tree, as_shards]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pair", PAIRS)
def test_splits_by_other_names_are_refused_unless_they_are_named(
    form: Any, pair: tuple[str, str], tmp_path: Path
) -> None:
    place = form(tmp_path, pair)
    if form is as_shards and "train" in pair[0].split("_"):  # a word of their names is their split
        assert len(folder_splits(**place).train) == 9
        return
    with pytest.raises(InputError, match=r"look like splits \(.*; set data.train_split"):
        folder_splits(**place)
    if form is as_tree:
        named = folder_splits(**place, train_split=pair[0], validation_split=pair[1])
        assert [len(photos) for photos in named] == [12, 12]
        assert named.train.classes == CLASSES


@pytest.mark.parametrize("form", FORMS)
def test_a_training_split_that_was_named_must_be_there(form: Any, tmp_path: Path) -> None:
    place = form(tmp_path, ("first", "second"))
    with pytest.raises(InputError, match=r"data.train_split: .* has no 'frist'; use one of .*first.*, or \. for"):
        folder_splits(**place, train_split="frist")
    assert folder_splits(**place, train_split=".").train.classes == folder_splits(**place).train.classes


def test_folders_that_look_like_splits_are_classes_where_the_recipe_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = as_tree(tmp_path, ("Train", "Val"))["root"]
    config, _ = parse_config(as_arguments(data__root=root, data__train_split="."))
    assert agreed_splits(config, ONE_PROCESS).train.classes == ("Train", "Val")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("pair", [("train", "validation"), ("Train", "Test")])
def test_data_sets_side_by_side_and_splits_below_classes_are_no_classes(pair: tuple[str, str], tmp_path: Path) -> None:
    for name in ("clothes", "flowers"):
        write_photos(tmp_path / "sets" / name, dict.fromkeys(pair, 2))
    with pytest.raises(InputError, match=r"clothes holds what look like splits \(.*\); name that folder, or move"):
        folder_splits(tmp_path / "sets")
    assert folder_splits(tmp_path / "sets", train_split=".").train.classes == ("clothes", "flowers")
    assert folder_splits(tmp_path / "sets" / "flowers", train_split=pair[0], validation_split=pair[1])


def test_a_tree_one_level_too_high_is_told_the_folder(tmp_path: Path) -> None:
    inner = write_photos(tmp_path / "photos" / "clothes", {"": 4})
    with pytest.raises(InputError, match=f"has one class, 'clothes'; name {inner} if its folders are the classes"):
        folder_splits(tmp_path / "photos")
    assert folder_splits(inner).train.classes == CLASSES


@pytest.mark.parametrize(("form", "unread"), [(as_tree, "val"), (as_shards, "val-0.tar"), (as_hub, "val")])
def test_what_lies_beside_a_training_split_without_validation_is_named(
    form: Any, unread: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {f"data__{key}": value for key, value in form(tmp_path, ("train", "val")).items()}
    capsys.readouterr()
    agreed_splits(parse_config(as_arguments(**place))[0], ONE_PROCESS)
    line = "has no split 'validation', so photos of 'train' are held out; not read: "
    assert f"{line}{unread}" in " ".join(capsys.readouterr().out.split())
    agreed_splits(parse_config(as_arguments(**place, data__validation_split="val"))[0], ONE_PROCESS)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("names", "above"), [(AS_CLASSES, "2026/May"), (("test", "valid", "training"), "")])
def test_classes_that_only_resemble_splits_or_hold_images_are_classes(
    names: tuple[str, ...], above: str, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path / "drawn", {"": 3}) / CLASSES[0]
    for name in names:
        shutil.copytree(photos, tmp_path / "photos" / name / above)
    assert set(folder_splits(tmp_path / "photos").train.classes) == set(names)
