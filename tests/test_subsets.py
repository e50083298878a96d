"""Subsets: a part of a tree is what a copy of that part would be, for ever, and smaller parts lie within larger."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets.imagenette import Imagenette

from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.data.photos import Photos
from deit_kd.data.subsets import CLASS_LISTS, class_names, share_of, with_classes
from deit_kd.interfaces import InputError
from deit_kd.origins import imagenet_names
from deit_kd.runs.photos import build_splits
from deit_kd.teaching.store_identity import identity
from tests.helpers import FIVE_CLASSES, REPOSITORY, refused, tiny, write_photos
from tests.tiny_parts import folder_splits

CLOTHING = REPOSITORY.parent / "shared" / "data" / "clothing160"
law = settings(deadline=None, max_examples=100, derandomize=True)
WORDNET = ("n01440764", "n02012849", "n03126707", "n03000684")  # tench, crane, crane, chain saw


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes of six training and two validation photos."""
    return write_photos(tmp_path_factory.mktemp("tree"), {"train": 6, "validation": 2}, FIVE_CLASSES)


@pytest.fixture(scope="module")
def wordnet_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("wordnet"), {"train": 2, "validation": 1}, WORDNET)


def digests(root: Path, **options: Any) -> list[str]:
    return [photos.digest() for photos in folder_splits(root, **options)]


def named_photos(counts: dict[str, int], split: str = "") -> Photos:
    """Return photos in memory, of one pixel each, with names like those in a tree."""
    names = [f"{split}{name}/{index:04d}.jpg" for name, count in counts.items() for index in range(count)]
    labels = [label for label, count in enumerate(counts.values()) for _ in range(count)]
    return Photos.of_arrays(names, labels, tuple(counts), np.zeros((len(names), 1, 1, 3), np.uint8))


COUNTS = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 40), min_size=1, max_size=4)


# Classes


@pytest.mark.parametrize("splits", ["train and validation", "none"])
@pytest.mark.parametrize("taken", [("b", "d"), ("e", "a", "c"), FIVE_CLASSES])
def test_some_classes_of_a_tree_are_what_a_copy_of_their_folders_is(
    tree: Path, tmp_path: Path, taken: tuple[str, ...], splits: str
) -> None:
    whole = tree if splits != "none" else tree / "train"
    for name in taken:
        for folder in whole.glob("*/" * (splits != "none") + name):
            shutil.copytree(folder, tmp_path / folder.relative_to(whole))
    assert digests(whole, classes=list(taken)) == digests(tmp_path)


def test_classes_that_are_not_taken_may_differ_between_the_splits(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "validation" / "a")
    assert digests(tmp_path, classes=["b", "d"]) == digests(tree, classes=["b", "d"])
    with pytest.raises(InputError, match=r"only in train: a"):
        digests(tmp_path)
    with pytest.raises(InputError, match=rf"'a' is not among the 4 classes of {tmp_path / 'validation'}"):
        digests(tmp_path, classes=["a", "b"])


def test_labels_are_renumbered_in_the_order_of_the_tree(tree: Path) -> None:
    train, validation = folder_splits(tree, classes=["d", "b"])
    assert train.classes == validation.classes == ("b", "d")
    assert {name[0]: label for name, label in zip(train.names, train.labels, strict=True)} == {"b": 0, "d": 1}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("list.txt", "d\nb\n"),
        ("list.txt", "# two of five\n\n  b  \r\nd"),
        ("list.txt", "\ufeffb\nd\n"),
        ("list.csv", "b,the second\nd,the fourth\n"),
        ("list.csv", 'class,words\nd,"four, or so"\nb,two\n'),
        ("list.csv", "words,class\nfour,d\ntwo, b\n"),
    ],
)
def test_a_file_lists_classes(tree: Path, tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    assert digests(tree, classes=str(tmp_path / file)) == digests(tree, classes=["b", "d"])


@pytest.mark.parametrize(("name", "count"), [("imagenet100", 100), ("imagenette", 10), ("imagewoof", 10)])
def test_a_shipped_list_holds_classes_of_imagenet_and_says_its_source(name: str, count: int) -> None:
    names, _ = class_names(name)
    assert len(names) == len(set(names) & set(imagenet_names(1000) or ())) == count
    assert "Source: " in (CLASS_LISTS / f"{name}.txt").read_text().splitlines()[0]


def test_the_list_of_imagenette_is_torchvisions() -> None:
    assert set(class_names("imagenette")[0]) == set(Imagenette._WNID_TO_CLASS)


@pytest.mark.parametrize(
    ("classes", "found"),
    [
        (["tench", "Chain_Saw"], ("n01440764", "n03000684")),
        (["Tinca tinca", "chainsaw"], ("n01440764", "n03000684")),
        (["n02012849", "n03126707"], ("n02012849", "n03126707")),  # both are cranes
    ],
)
def test_words_name_wordnet_folders(wordnet_tree: Path, classes: list[str], found: tuple[str, ...]) -> None:
    assert folder_splits(wordnet_tree, classes=classes).train.classes == found


def test_wordnet_ids_name_folders_of_words() -> None:
    photos = named_photos({"tench": 1, "golf_ball": 2, "hat": 3})
    assert with_classes(photos, ["n03445777", "n01440764"]).classes == ("tench", "golf_ball")


def test_numbers_in_a_recipe_name_folders() -> None:
    config, _ = parse_config(["--data.name", "digits", "--data.classes", "[3, 1]"])
    assert config.data.classes == ["3", "1"]
    assert build_splits(config).train.classes == ("1", "3")


REFUSED_CLASSES = [
    (["a", "bb"], "data.classes: 'bb' is not among the 5 classes of "),
    (["a", "b", "a"], "data.classes: names class 'a' twice; name it once"),
    (["a", "A"], "data.classes: names class 'a' twice, as 'a' and 'A'; name it once"),
    (["a"], "data.classes: names one class, 'a'; name another"),
    ([], "data.classes: names no class; name two or more"),
    ("imagenet10", "data.classes: imagenet10 is neither a file nor one of imagenet100, imagenette, imagewoof (nearest"),
    ("a", "data.classes: a is neither a file nor one of"),
    ([["a"], "b"], "data.classes: "),
    ([True, "b"], "True is no name; put names such as yes, no, null and 1.0 in quotes"),
    (["a", None], "None is no name; put names"),
]


@pytest.mark.parametrize(("classes", "said"), REFUSED_CLASSES)
def test_classes_that_cannot_be_taken_are_one_line(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: Any, said: str
) -> None:
    line = refused(["train", *tiny(tree, tmp_path / "run", data__classes=classes)], capsys)
    assert said in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"apple\nbraed\n", "'braed' is not among the 3 classes of the photos (nearest: bread); correct it"),
        (b"apple\nbread\napple\n", "names class 'apple' twice; name it once"),
        (b"# nothing\n\n", "names no class"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_list_that_cannot_be_taken_names_its_file(tmp_path: Path, text: bytes, said: str) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(text)
    with pytest.raises(InputError) as caught:
        with_classes(named_photos({"apple": 2, "bread": 2, "cup": 2}), str(file))
    assert str(caught.value).startswith(f"data.classes: {file}")
    assert said in str(caught.value)


def test_a_word_for_two_classes_is_refused(wordnet_tree: Path) -> None:
    with pytest.raises(InputError, match="'crane' describes the classes n02012849 and n03126707; write which one"):
        folder_splits(wordnet_tree, classes=["tench", "crane"])


# A share of each class


@law
@given(COUNTS, st.floats(0.1, 1), st.floats(0.1, 1))
def test_a_smaller_share_lies_within_a_larger_one(counts: dict[str, int], first: float, second: float) -> None:
    photos = named_photos({name: count + 5 for name, count in counts.items()})
    small, large = (share_of(photos, share, None) for share in sorted((first, second)))
    assert set(small.names) <= set(large.names) <= set(photos.names)


@law
@given(COUNTS, st.integers(1, 50), st.integers(1, 50))
def test_fewer_a_class_lie_within_more(counts: dict[str, int], first: int, second: int) -> None:
    photos = named_photos(counts)
    small, large = (share_of(photos, None, count) for count in sorted((first, second)))
    assert set(small.names) <= set(large.names)
    assert Counter(small.labels) == {label: min(count, first, second) for label, count in enumerate(counts.values())}


@law
@given(COUNTS, st.floats(0.1, 1))
def test_each_class_gives_its_share(counts: dict[str, int], share: float) -> None:
    photos = named_photos({name: count + 5 for name, count in counts.items()})
    taken = Counter(share_of(photos, share, None).labels)
    for label, count in enumerate(counts.values()):
        assert abs(taken[label] - share * (count + 5)) <= 0.5


@law
@given(st.integers(2, 60), st.integers(1, 59))
def test_a_photo_that_is_added_moves_at_most_one_other(count: int, taken: int) -> None:
    photos = named_photos({"a": count})
    fewer = photos.subset([index for index in range(count) if index != count // 2])
    before, after = (set(share_of(some, None, taken).names) for some in (fewer, photos))
    assert len(before - after) <= 1


def test_a_share_stays_the_same_for_ever() -> None:
    taken = share_of(named_photos({"hat": 12}), 0.25, None)
    assert [name[4:8] for name in taken.names] == ["0000", "0007", "0011"]


def test_a_share_does_not_depend_on_the_folder_above_the_class_or_on_the_order() -> None:
    photos = named_photos({"a": 20, "b": 9})
    backwards = photos.subset(range(28, -1, -1))
    below = named_photos({"a": 20, "b": 9}, "train/")
    taken = set(share_of(photos, 0.3, None).names)
    assert set(share_of(backwards, 0.3, None).names) == taken
    assert {name.removeprefix("train/") for name in share_of(below, 0.3, None).names} == taken


def test_validation_keeps_all_its_photos(tree: Path) -> None:
    whole, part = folder_splits(tree), folder_splits(tree, fraction=0.5)
    assert part.validation.digest() == whole.validation.digest()
    assert Counter(part.train.labels) == dict.fromkeys(range(5), 3)
    assert list(part.train.names) == [name for name in whole.train.names if name in set(part.train.names)]


@pytest.mark.parametrize("option", [{"fraction": 0.5}, {"per_class": 3}])
def test_a_share_of_some_classes_is_the_same_without_the_others(tree: Path, option: dict[str, Any]) -> None:
    all_classes, two = (folder_splits(tree, classes=names, **option).train for names in (None, ["b", "d"]))
    assert list(two.names) == [name for name in all_classes.names if name[0] in "bd"]


def test_a_fold_is_held_out_before_a_share_is_taken(tree: Path) -> None:
    whole, part = (folder_splits(tree, folds=4, fold=1, fraction=share) for share in (None, 0.5))
    assert part.validation.digest() == whole.validation.digest()
    assert Counter(part.train.labels) == dict.fromkeys(range(5), 3)
    assert set(part.train.names) < set(whole.train.names)


def test_a_fold_of_some_classes_holds_their_photos_of_that_fold(tree: Path) -> None:
    whole, part = (folder_splits(tree, folds=4, fold=1, classes=names).validation for names in (None, ["b", "d"]))
    assert list(part.names) == [name for name in whole.names if name.split("/")[1] in "bd"]


def test_a_share_of_photos_without_labels_is_one_share(tree: Path, tmp_path: Path) -> None:
    unlabelled = write_photos(tmp_path, {"": 4}, FIVE_CLASSES)
    train, validation = folder_splits(tree, unlabelled=str(unlabelled), classes=["a", "b"], fraction=0.5)
    assert (len(train), len(validation), set(train.labels)) == (10, 4, {-1})


REFUSED_SHARES = [
    ({"fraction": 0}, "data.fraction: 0.0 must be above 0"),
    ({"fraction": 1.5}, "data.fraction: 1.5 must be at most 1"),
    ({"per_class": 0}, "data.per_class: 0 must be above 0"),
    ({"fraction": 0.5, "per_class": 3}, "data.fraction and data.per_class exclude each other; unset one"),
    (
        {"fraction": 0.08},
        "data.fraction: 0.08 of the 6 training photo(s) of class 'a' is none; set 0.0834 or more, or data.per_class",
    ),
]


@pytest.mark.parametrize(("options", "said"), REFUSED_SHARES)
def test_shares_that_cannot_be_are_one_line(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], said: str
) -> None:
    keys = {f"data__{key}": value for key, value in options.items()}
    assert said in refused(["data", "check", str(tree), *tiny(tree, tmp_path / "run", **keys)], capsys)


def test_the_least_fraction_that_is_named_is_enough(tree: Path) -> None:
    assert Counter(folder_splits(tree, fraction=0.0834).train.labels) == dict.fromkeys(range(5), 1)


# Whole commands


def test_data_check_tells_what_was_taken(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(tree), "--data.classes", '["a", "b"]', "--data.per_class", "4"]) in (0, 1)
    said = " ".join(capsys.readouterr().out.split())
    assert "taken: 2 of 5 classes, 8 of 30 training and 4 of 10 validation images" in said
    assert "(data.classes a, b, data.per_class 4)" in said


def test_a_run_goes_on_with_the_same_classes_only(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same classes by another list are the same run; other classes, or another share, are not."""
    options = {"distill__kind": "none", "data__per_class": 4, "train__batch_size": 6}
    run, listed = tmp_path / "run", tmp_path / "list.txt"
    listed.write_text("b\na\n")
    assert main(["train", *tiny(tree, run, **options, data__classes=["a", "b"], evaluate__report=True)]) == 0
    capsys.readouterr()
    again = tiny(tree, run, **options, resume="auto", data__classes=str(listed))
    assert main(["train", *again]) == 0
    for changed, said in (
        (tiny(tree, run, **options, resume="auto", data__classes=["a", "c"]), "data (train): other photos"),
        (tiny(tree, run, **{**options, "data__per_class": 3}, resume="auto", data__classes=["a", "b"]), "per_class: 4"),
    ):
        assert said in refused(["train", *changed], capsys)
    facts = json.loads((run / "run.json").read_text())
    assert (facts["classes"], facts["images"]) == (["a", "b"], {"train": 8, "validation": 4})
    page = (run / "report" / "report.html").read_text()
    assert "2 classes, 8 training images (data.classes a, b, data.per_class 4)" in " ".join(page.split())
    assert main(["eval", str(run), "--split", "train"]) == 0
    assert json.loads((run / "eval" / "train" / "heads.json").read_text())["n"] == 8


@pytest.mark.parametrize("key", ["classes", "fraction", "per_class"])
def test_a_store_of_other_photos_is_another(tree: Path, tmp_path: Path, key: str) -> None:
    other = {"classes": ["a", "b"], "fraction": 0.5, "per_class": 4}[key]
    found = []
    for value in (None, other):
        config, _ = parse_config(tiny(tree, tmp_path / "run", **{f"data__{key}": value}))
        found.append(identity(config, build_splits(config)))
    assert found[0]["train.photos"] != found[1]["train.photos"]


def test_real_photos_are_taken_by_class_and_share() -> None:
    if not CLOTHING.is_dir():
        pytest.skip("clothing160 is not there")
    five = ["dress", "hat", "pants", "shirt", "shoes"]
    whole, part = folder_splits(CLOTHING, classes=five), folder_splits(CLOTHING, classes=five, fraction=0.1)
    assert part.train.classes == tuple(five)
    assert part.validation.digest() == whole.validation.digest()
    assert abs(len(part.train) - len(whole.train) / 10) <= 2.5
