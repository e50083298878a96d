"""Columns of photos and their index: the same photos with and without one, and never other ones."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from deit_kd import InputError
from deit_kd.cli import main
from deit_kd.data import Photos, Splits
from deit_kd.data.folder import index_tree
from deit_kd.data.index import place_of_index, read_index, write_index
from deit_kd.data.names import AT_ONCE, TEXT, Names
from tests.helpers import refused, tiny, write_photos
from tests.tiny_parts import folder_splits

LONG_AGO = 1_700_000_000


def settle(root: Path) -> None:
    """Let every folder have been changed long ago, or an index would not trust it."""
    for place, _, _ in os.walk(root):
        os.utime(place, (LONG_AGO, LONG_AGO))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEIT_KD_CACHE", str(tmp_path / "cache"))
    root = write_photos(tmp_path / "photos", {"train": 4, "validation": 2})
    settle(root)
    return root


def write(root: Path) -> None:
    index_tree(root=str(root), train_split="train", validation_split="validation")


def is_indexed(root: Path) -> list[bool]:
    return [photos.source._is_indexed for photos in folder_splits(root)]  # type: ignore[attr-defined]


def seen(splits: Splits) -> list[tuple[list[str], list[int], tuple[str, ...], str]]:
    return [(list(photos.names), photos.labels.tolist(), photos.classes, photos.digest()) for photos in splits]


NAMES = st.lists(st.text(max_size=5), max_size=12)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(NAMES, st.data())
def test_names_are_a_sequence_like_any_other(names: list[str], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, max(0, len(names) - 1)), max_size=8)) if names else []
    pairs = (Names(names), names), (Names(names).take(np.array(rows, int)), [names[row] for row in rows])
    for ours, plain in pairs:
        assert (list(ours), len(ours)) == (plain, len(plain))
        assert ours == plain == list(pickle.loads(pickle.dumps(ours)))
        assert [ours[index] for index in range(-len(plain), len(plain))] == plain + plain
        first, last, step = (data.draw(st.none() | st.integers(-4, 4).filter(bool)) for _ in range(3))
        assert list(ours[first:last:step]) == plain[first:last:step]
        assert list(ours.below("a/b")) == [f"a/b/{name}" for name in plain]
        with pytest.raises(IndexError):
            ours[len(plain)]


def test_the_digest_is_that_of_the_lines_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AT_ONCE > 7
    monkeypatch.setattr("deit_kd.data.photos.AT_ONCE", 7)
    arrays = np.zeros((20, 2, 3, 3), np.uint8)
    photos = Photos.of_arrays([f"é{i}" for i in range(20)], [i % 3 for i in range(20)], ("a", "b", "c"), arrays)
    chosen = photos.subset(np.arange(20)[::-2])
    for some, order in ((photos, range(20)), (chosen, range(19, -1, -2))):
        text = "a\nb\nc" + "".join(f"\né{i}\t18\t{i % 3}" for i in order)
        whole = hashlib.blake2b(text.encode() + bytes(18 * len(order)), digest_size=16)
        assert some.digest() == whole.hexdigest()
        assert some.lines() == [f"é{i}\t18\t{i % 3}" for i in order]


def test_a_tree_is_listed_as_torchvision_lists_it(tree: Path) -> None:
    train = tree / "train"
    for name in ("dots/B/2.JPG", "dots/a/9.png", "dots/b.Jpeg", "bars/notes.txt", "bars/.hidden.png", "rings/é.png"):
        (train / name).parent.mkdir(exist_ok=True)
        shutil.copy(train / "dots" / "000.png", train / name)
    (train / "bars" / "elsewhere").symlink_to(train / "dots" / "B")
    expected = ImageFolder(train).samples
    photos = folder_splits(tree).train
    assert [(str(train / name), label) for name, label in zip(photos.names, photos.labels, strict=True)] == expected


def test_photos_are_the_same_with_an_index_which_looks_at_no_file(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = seen(folder_splits(tree))
    write(tree)
    monkeypatch.setattr("deit_kd.data.listing.list_images", None)
    assert seen(folder_splits(tree)) == before
    assert is_indexed(tree) == [True, True]


def test_a_tree_of_many_photos_is_indexed_without_being_asked_for(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deit_kd.data.listing.LARGE", 12)
    assert is_indexed(tree) == [True, False]  # 12 photos, and 6
    monkeypatch.setenv("DEIT_KD_CACHE", "/proc/no-folder")
    assert is_indexed(tree) == [False, False]


def add(train: Path) -> None:
    shutil.copy(train / "dots" / "000.png", train / "dots" / "new.png")


def add_class(train: Path) -> None:
    for split in ("train", "validation"):
        shutil.copytree(train / "dots", train.parent / split / "again")


def add_below(train: Path) -> None:
    (train / "dots" / "deep").mkdir()
    shutil.copy(train / "dots" / "000.png", train / "dots" / "deep" / "new.png")


def remove_class(train: Path) -> None:
    for split in ("train", "validation"):
        shutil.rmtree(train.parent / split / "bars")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a photo more": add,
    "a photo less": lambda train: (train / "dots" / "000.png").unlink(),
    "another name": lambda train: (train / "dots" / "000.png").rename(train / "dots" / "999.png"),
    "a photo in a new folder": add_below,
    "a class more": add_class,
    "a class less": remove_class,
    "a class with another name": lambda train: [
        (train.parent / split / "dots").rename(train.parent / split / "zebras") for split in ("train", "validation")
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_knows_that_a_folder_has_changed(change: str, tree: Path) -> None:
    write(tree)
    CHANGES[change](tree / "train")
    found = seen(folder_splits(tree))
    shutil.rmtree(os.environ["DEIT_KD_CACHE"])
    assert found == seen(folder_splits(tree))
    assert found[0][3] != seen(folder_splits(write_photos(tree.parent / "same", {"train": 4, "validation": 2})))[0][3]


def test_a_folder_that_changed_just_now_is_listed_again(tree: Path) -> None:
    write(tree)
    add(tree / "train")
    write(tree)
    os.utime(tree / "train" / "dots")  # as if another photo came within the clock's step
    assert is_indexed(tree) == [True, True]  # written again, after the folder was listed again
    (tree / "train" / "dots" / "new.png").unlink()
    assert "dots/new.png" not in folder_splits(tree).train.names


@pytest.mark.parametrize("act", ["changed", "removed"])
def test_a_file_that_is_other_than_its_index_says_ends_with_one_line(
    act: str, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tree)
    photo = tree / "train" / "dots" / "000.png"
    if act == "changed":
        photo.write_bytes(photo.read_bytes() + b"more")
    else:
        photo.unlink()
        os.utime(photo.parent, (LONG_AGO, LONG_AGO))
    line = refused(["data", "check", str(tree)], capsys)
    cure = "restore it, or run deit-kd data index on the photos again"
    assert line == f"error: {photo}: was {act} after its folder was indexed; {cure}"
    write(tree)
    assert main(["data", "check", str(tree)]) == 0


def other_facts(path: Path) -> None:
    index = read_index(path)
    write_index(path, index.names, index.columns, {**index.facts, "counts": [1, 1, 1]})


def outside(path: Path) -> None:
    index = read_index(path)
    names = ["../../secret.png", *index.names.to_pylist()[1:]]
    write_index(path, arrow.array(names, TEXT), index.columns, index.facts)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "other bytes": lambda path: path.write_bytes(b"no index" * 100),
    "counts of other photos": other_facts,
    "names outside": outside,
    "other columns": lambda path: write_index(path, arrow.array(["a"], TEXT), {"size": np.ones(1, int)}, {}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_not_used_and_written_again(damage: str, tree: Path) -> None:
    before = seen(folder_splits(tree))
    write(tree)
    DAMAGES[damage](place_of_index(tree / "train"))
    assert seen(folder_splits(tree)) == before
    write(tree)
    assert is_indexed(tree) == [True, True]


@pytest.mark.parametrize("names", [["/etc/a.png"], ["a/../../b.png"], ["a\x00.png"], [None]])
def test_an_index_does_not_name_what_is_outside(names: Sequence[str | None], tmp_path: Path) -> None:
    write_index(tmp_path / "i.arrow", arrow.array(names, TEXT), {}, {})
    with pytest.raises(InputError, match="is no index of photos"):
        read_index(tmp_path / "i.arrow")


def test_names_with_dots_are_not_outside(tmp_path: Path) -> None:
    names = ["a..b/c...png", "..a/b.png", "a../b"]
    write_index(tmp_path / "i.arrow", arrow.array(names, TEXT), {"size": np.arange(3)}, {"of": "x"})
    index = read_index(tmp_path / "i.arrow")
    assert (index.names.to_pylist(), index.columns["size"].tolist(), index.facts["of"]) == (names, [0, 1, 2], "x")


def test_an_index_stays_mapped(tmp_path: Path) -> None:
    write_index(tmp_path / "i.arrow", arrow.array(["a"] * 1000, TEXT), {"size": np.arange(1000)}, {})
    index = read_index(tmp_path / "i.arrow")
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "i.arrow") in mapped
    assert not index.columns["size"].flags.owndata


def test_a_run_goes_on_from_an_index(tree: Path, tmp_path: Path) -> None:
    arguments = tiny(tree, tmp_path / "run")
    assert main(["train", *arguments]) == 0
    write(tree)
    assert main(["train", *arguments, "--resume", "auto"]) == 0
