"""Cross-validation: every photo is held out once, by its name alone, and nothing learned of it is found again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.data import Splits
from deit_kd.data.folds import deal, one_fold
from deit_kd.data.photos import split_by_hash
from deit_kd.interfaces import InputError
from deit_kd.runs.photos import build_splits
from deit_kd.teaching.fit import teacher_folder
from deit_kd.teaching.store_identity import identity
from tests.helpers import REPOSITORY, refused, tiny, write_photos
from tests.tiny_parts import array_photos, folder_splits

CLOTHING = REPOSITORY.parent / "shared" / "data" / "clothing160"
NAMES = st.lists(st.text("abcdefgh0123456789/._-é", min_size=1, max_size=9), unique=True, min_size=1, max_size=60)
FOLDS = st.integers(2, 7)
law = settings(deadline=None, max_examples=200, derandomize=True)


@law
@given(NAMES, FOLDS)
def test_the_sizes_of_folds_differ_by_one_at_most(names: list[str], folds: int) -> None:
    sizes = Counter(deal(names, folds))
    assert sizes.keys() <= set(range(folds))
    assert max(sizes.values()) - min(sizes[fold] for fold in range(folds)) <= 1


@law
@given(NAMES, FOLDS, st.randoms(use_true_random=False))
def test_a_fold_does_not_depend_on_the_order_of_the_names(names: list[str], folds: int, random: Any) -> None:
    other_order = random.sample(names, len(names))
    before = dict(zip(names, deal(names, folds), strict=True))
    assert dict(zip(other_order, deal(other_order, folds), strict=True)) == before


@law
@given(NAMES, FOLDS)
def test_a_photo_that_is_added_moves_fewer_others_than_there_are_folds(names: list[str], folds: int) -> None:
    before, after = deal(names[:-1], folds), deal(names, folds)
    assert sum(old != new for old, new in zip(before, after, strict=False)) < folds


def test_folds_stay_the_same_for_ever() -> None:
    assert deal([f"hat/{index}.jpg" for index in range(12)], 5) == [0, 3, 4, 0, 3, 4, 2, 2, 1, 4, 0, 1]


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(15, 60), st.integers(2, 5))
def test_every_photo_is_held_out_once_and_every_class_in_every_fold(count: int, folds: int) -> None:
    photos = array_photos(count)
    held_out: list[str] = []
    for fold in range(folds):
        train, validation = one_fold(split_by_hash(photos, 0.2), folds, fold)
        assert sorted([*train.names, *validation.names]) == photos.names
        for index, name in enumerate(validation.names):
            assert (validation.array(index) == photos.array(int(name))).all()
        sizes = Counter(validation.labels)
        for label in range(3):
            assert 0 <= sizes[label] - photos.labels.tolist().count(label) // folds <= 1
        held_out += validation.names
    assert sorted(held_out) == photos.names


def names_by_fold(root: Path, folds: int = 3, **options: Any) -> list[set[str]]:
    """Return the names in each fold, without the split's."""
    parts = [folder_splits(root, folds=folds, fold=fold, **options).validation for fold in range(folds)]
    return [{"/".join(name.split("/")[-2:]) for name in photos.names} for photos in parts]


def test_both_splits_are_joined_and_read_where_they_lie(tmp_path: Path) -> None:
    root = write_photos(tmp_path, {"train": 4, "validation": 2})
    train, validation = folder_splits(root, folds=3, fold=1)
    assert (len(train), len(validation)) == (12, 6)
    files = {path.relative_to(root).as_posix() for path in root.rglob("*.png")}
    assert {*train.names, *validation.names} == files
    assert train.image(0).size == train.cached("memory", torch.device("cpu")).image(0).size
    (root / "train" / "dots" / "000.png").write_bytes(b"other")
    with pytest.raises(InputError, match="was changed"):
        [photos.image(index) for photos in (train, validation) for index in range(len(photos))]


@pytest.mark.parametrize("change", ["a photo to the other split", "no splits at all", "another class", "the root"])
def test_a_fold_stays_when_this_changes(tmp_path: Path, change: str) -> None:
    root = write_photos(tmp_path / "photos", {"train": 6, "validation": 3})
    for file in root.glob("validation/*/*.png"):
        file.rename(file.with_name(f"v{file.name}"))
    before = names_by_fold(root)
    if change == "a photo to the other split":
        (root / "train" / "dots" / "001.png").rename(root / "validation" / "dots" / "001.png")
    if change == "no splits at all":
        for split in ("train", "validation"):
            shutil.copytree(root / split, tmp_path / "flat", dirs_exist_ok=True)
        root = tmp_path / "flat"
    if change == "another class":
        shutil.copytree(root / "train" / "dots", root / "train" / "lines")
        shutil.copytree(root / "validation" / "dots", root / "validation" / "lines")
    if change == "the root":
        root = root.rename(tmp_path / "elsewhere")
    after = [{name for name in names if not name.startswith("lines/")} for names in names_by_fold(root)]
    assert after == before


def test_sets_in_memory_have_folds_too() -> None:
    parts = [folder_splits(None, name="digits", folds=5, fold=fold).validation for fold in range(5)]
    assert sum(map(len, parts)) == 1797
    assert len({image for part in parts for image in part.names}) == 1797


def test_the_fraction_that_is_held_out_otherwise_does_not_matter(tmp_path: Path) -> None:
    root = write_photos(tmp_path, {"": 8})
    some, more = (folder_splits(root, folds=3, fold=0, validation_fraction=share) for share in (0.2, 0.5))
    assert (some.train.digest(), some.validation.digest()) == (more.train.digest(), more.validation.digest())


def test_real_photos_are_held_out_once() -> None:
    if not CLOTHING.is_dir():
        pytest.skip("clothing160 is not there")
    folds = names_by_fold(CLOTHING, 5)
    assert [len(names) for names in folds] == [682, 681, 683, 682, 681]
    assert len(set.union(*folds)) == 3409


REFUSED = [
    ({"folds": 1, "fold": 0}, "data.folds: 1 must be at least 2"),
    ({"folds": 0, "fold": 0}, "data.folds: 0 must be at least 2"),
    ({"fold": 0}, "data.fold: 0 is set, but data.folds is not; set both"),
    ({"folds": 5}, "data.folds: 5 is set, but data.fold is not; set 0 to 4"),
    ({"folds": 5, "fold": 5}, "data.fold: 5 is none of 5 folds; set 0 to 4"),
    ({"folds": 5, "fold": -1}, "data.fold: -1 must be at least 0"),
    ({"folds": "five", "fold": 0}, "data.folds: 'five' does not fit; use a whole number or null"),
    ({"folds": 24, "fold": 0}, "data.folds: 24 is more than the 23 photo(s) of class 'bars'; use fewer folds"),
    (
        {"folds": 2, "fold": 0, "validation_split": "train"},
        "data.validation_split: holds 'bars/000.png', which is also in",
    ),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
@pytest.mark.parametrize("verb", ["train", "data"])
def test_folds_that_cannot_be_are_one_line(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], said: str, verb: str
) -> None:
    keys = {f"data__{key}": value for key, value in options.items()}
    arguments = tiny(photos_root, tmp_path / "run", **keys)
    called = ["train"] if verb == "train" else ["data", "check", str(photos_root)]
    assert said in refused([*called, *arguments], capsys)
    assert not (tmp_path / "run").exists()


def splits_of(arguments: list[str]) -> tuple[Any, Splits]:
    config = parse_config(arguments)[0]
    return config, build_splits(config)


def test_a_teacher_and_a_store_of_one_fold_are_not_found_for_another(photos_root: Path, tmp_path: Path) -> None:
    fit = {"teacher__random_weights": None, "teacher__fit__epochs": 1, "data__folds": 3}
    of_folds = [splits_of(tiny(photos_root, tmp_path / "run", **fit, data__fold=fold)) for fold in (0, 1)]
    assert len({teacher_folder(*parts) for parts in of_folds}) == 2
    first, second = (identity(*parts) for parts in of_folds)
    assert {key for key in first if first[key] != second[key]} >= {"train.photos", "validation.photos"}


def test_a_run_of_one_fold_does_not_go_on_with_another(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"data__folds": 3, "distill__kind": "none"}
    assert main(["train", *tiny(photos_root, tmp_path / "run", **options, data__fold=0)]) == 0
    capsys.readouterr()
    other = tiny(photos_root, tmp_path / "run", **options, data__fold=1, resume="auto")
    assert "data.fold: 0 in the run, 1 here; data (train): other photos" in refused(["train", *other], capsys)


def test_data_check_counts_a_fold(photos_root: Path, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    main(["data", "check", str(photos_root), "--data.folds", "5", "--data.fold", "0", "--json", str(found)])
    counts = json.loads(found.read_text())["counts"]
    assert {split: set(by_class.values()) for split, by_class in counts.items()} == {
        "train": {18, 19},
        "validation": {4, 5},
    }


def test_too_few_photos_are_refused_by_class() -> None:
    with pytest.raises(InputError, match=r"data\.folds: 6 is more than the 5 photo\(s\) of class 'class0'"):
        one_fold(split_by_hash(array_photos(15), 0.2), 6, 0)
