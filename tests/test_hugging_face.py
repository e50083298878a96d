"""A Hugging Face data set is a data set like any other: the same photos, labels and views, whatever holds them."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from deit_kd.cli import main
from deit_kd.data import Photos, Splits, UnreadableImage
from deit_kd.interfaces import InputError
from tests.helpers import CLASSES, Finished, assert_same_end, copied, draw, evaluated, newest_two, refused, tiny
from tests.tiny_parts import folder_splits

WORDS = ("zebra", "ant", "mole")  # the order of a ClassLabel, not of the alphabet


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The library, whose cache is a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        datasets = pytest.importorskip("datasets")
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        datasets.disable_progress_bars()
        yield datasets


def splits_of(root: Any, **options: Any) -> Splits:
    return folder_splits(Path(root), name="hf", **options)


def pixels(photos: Photos) -> list[bytes]:
    return [photos.image(index).tobytes() for index in range(len(photos))]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of odd kinds, with one that cannot be read, under names that are their own in both splits."""
    root = tmp_path_factory.mktemp("hf") / "tree"
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for split, count in (("train", 6), ("validation", 3)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                draw(label, index + 500 * (split == "validation")).save(root / split / name / f"{index:03d}.png")
    draw(0, 50).save(root / "train" / "bars" / "turned.jpg", exif=turned)
    draw(1, 51).convert("CMYK").save(root / "train" / "dots" / "ink.jpg")
    Image.fromarray(np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)).save(root / "train/dots/deep.png")
    (root / "train" / "rings" / "broken.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def saved(hf: Any, tree: Path) -> Path:
    """The tree as ``save_to_disk`` keeps it: bytes in Arrow files."""
    hf.load_dataset(str(tree)).save_to_disk(tree.parent / "saved")
    return tree.parent / "saved"


@pytest.fixture(scope="module")
def parquet(hf: Any, saved: Path) -> Path:
    """The tree as the hub keeps it."""
    for split, part in hf.load_from_disk(saved).items():
        part.to_parquet(saved.parent / "parquet" / "data" / f"{split}-00000-of-00001.parquet")
    return saved.parent / "parquet"


@pytest.mark.parametrize("kept", ["tree", "saved", "parquet"])
@pytest.mark.parametrize("split", Splits._fields)
def test_it_is_the_tree_that_it_was_made_of(split: str, kept: str, tree: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("hf")
    expected = getattr(folder_splits(tree), split)
    found = getattr(splits_of(request.getfixturevalue(kept)), split)
    assert found.digest() == expected.digest()
    every = range(len(expected))
    assert [*map(found.content, every)] == [*map(expected.content, every)]
    whole = [index for index in every if "broken" not in expected.names[index]]
    assert pixels(found.subset(whole)) == pixels(expected.subset(whole))


def test_a_photo_that_cannot_be_read_is_named(saved: Path) -> None:
    photos = splits_of(saved).train
    with pytest.raises(UnreadableImage, match=r"^rings/broken\.jpg: cannot be read as an image \(unknown format\)"):
        photos.image(list(photos.names).index("rings/broken.jpg"))


@pytest.mark.parametrize(
    "options",
    [{"folds": 3, "fold": 1}, {"fraction": 0.5}, {"classes": ["bars", "rings"]}, {"validation_split": "none"}],
    ids=str,
)
def test_parts_of_it_are_those_of_the_tree(options: dict[str, Any], saved: Path, tree: Path) -> None:
    expected, found = folder_splits(tree, **options), splits_of(saved, **options)
    assert [photos.digest() for photos in found] == [photos.digest() for photos in expected]


def test_a_run_that_began_on_the_tree_goes_on_from_it(
    finished: Finished, photos_root: Path, hf: Any, tmp_path: Path
) -> None:
    hf.load_dataset(str(photos_root)).save_to_disk(tmp_path / "saved")
    arguments = copied(finished, tmp_path)
    newest_two(tmp_path / "run")[1].unlink()
    (tmp_path / "run" / "heads.json").unlink()
    assert main(["train", *arguments, "--data.name", "hf", "--data.root", str(tmp_path / "saved")]) == 0
    assert_same_end(finished, tmp_path)


def test_a_forked_process_reads_what_was_opened_before(saved: Path) -> None:
    photos = splits_of(saved).validation
    every = range(len(photos))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        assert [*pool.map(photos.content, every)] == [*map(photos.content, every)]


def test_its_photos_do_not_travel_with_it(saved: Path) -> None:
    photos = splits_of(saved).train
    assert len(pickle.dumps(photos.source)) < 10_000 + 16 * len(photos)


def test_a_cache_holds_the_same_pixels(parquet: Path) -> None:
    photos = splits_of(parquet).validation
    assert pixels(photos.cached("memory", torch.device("cpu"))) == pixels(photos)


def columns(hf: Any, **given: Any) -> Any:
    """Return a data set of six images with these columns and their types."""
    kinds = {name: kind for name, (_, kind) in given.items()}
    return hf.Dataset.from_dict({name: values for name, (values, _) in given.items()}, features=hf.Features(kinds))


def images(hf: Any) -> tuple[list[Image.Image], Any]:
    return [draw(index % 3, index) for index in range(6)], hf.Image()


def of_classes(hf: Any, names: tuple[str, ...] = WORDS) -> tuple[list[int], Any]:
    return [0, 1, 2] * 2, hf.ClassLabel(names=list(names))


def test_class_names_and_their_order_are_the_columns(hf: Any, tmp_path: Path) -> None:
    columns(hf, photo=images(hf), what=of_classes(hf)).save_to_disk(tmp_path / "one")
    train, validation = splits_of(tmp_path / "one", validation_fraction=0.5)
    assert train.classes == WORDS
    assert sorted(train.labels) == sorted(validation.labels) == [0, 1, 2]


@pytest.mark.parametrize(
    ("values", "kind", "classes"),
    [
        (["pear", "fig", "pear", "fig", "date", "date"], "string", ("date", "fig", "pear")),
        ([10, 9, 10, 9, 2, 2], "int64", ("2", "9", "10")),
        ([True, False] * 3, "bool", ("False", "True")),
    ],
)
def test_without_class_names_values_are_sorted(
    values: list[Any], kind: str, classes: tuple[str, ...], hf: Any, tmp_path: Path
) -> None:
    columns(hf, image=images(hf), label=(values, hf.Value(kind))).save_to_disk(tmp_path / "one")
    train, _ = splits_of(tmp_path / "one", validation_fraction=0.5)
    assert train.classes == classes


def test_files_without_names_of_their_own_are_named_by_position(hf: Any, tmp_path: Path) -> None:
    columns(hf, image=images(hf), label=of_classes(hf)).save_to_disk(tmp_path / "one")
    train, validation = splits_of(tmp_path / "one", validation_fraction=0.5)
    assert sorted([*train.names, *validation.names]) == [f"{index:08d}" for index in range(6)]
    both = hf.load_from_disk(tmp_path / "one")
    hf.DatasetDict({"train": both, "validation": both}).save_to_disk(tmp_path / "two")
    assert sum(map(len, splits_of(tmp_path / "two", folds=2, fold=0))) == 12


def test_files_that_share_a_name_are_named_by_position(hf: Any, tmp_path: Path) -> None:
    for label, name in enumerate(("a/x", "a/y", "b/x", "b/y")):
        (tmp_path / name).mkdir(parents=True)
        draw(label % 2, label).save(tmp_path / name / "0.png")
    files = [{"bytes": None, "path": str(path)} for path in sorted(tmp_path.rglob("*.png"))]
    labels = ([0, 0, 1, 1], hf.ClassLabel(names=["a", "b"]))
    columns(hf, image=(files, hf.Image()), label=labels).save_to_disk(tmp_path / "one")
    train, validation = splits_of(tmp_path / "one", validation_fraction=0.5)
    assert sorted([*train.names, *validation.names]) == [f"{index:08d}" for index in range(4)]


def test_classes_without_photos_are_left_out(hf: Any, tmp_path: Path) -> None:
    every = of_classes(hf, ("none", *WORDS))
    columns(hf, image=images(hf), label=([1, 2, 3] * 2, every[1])).save_to_disk(tmp_path / "one")
    train, _ = splits_of(tmp_path / "one", validation_fraction=0.5)
    assert train.classes == WORDS
    assert sorted(train.labels) == [0, 1, 2]


def test_columns_of_bytes_can_be_named(hf: Any, tmp_path: Path, tree: Path) -> None:
    file = (tree / "train" / "bars" / "000.png").read_bytes()
    labels = ([0, 1] * 3, hf.ClassLabel(names=["a", "b"]))
    columns(hf, file=([file] * 6, hf.Value("binary")), fine=labels, coarse=labels).save_to_disk(tmp_path / "one")
    train, _ = splits_of(tmp_path / "one", image_column="file", label_column="coarse")
    assert train.content(0) == file


IMAGE, NOT_SET = {"image_column": "image"}, "is not set, and the data set has the columns"
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"image_column": "imgae"}, "data.image_column: 'imgae' is no column; name one of image, depth, "),
    ({"image_column": "fine"}, "data.image_column: 'fine' holds no images (ClassLabel"),
    (IMAGE, f"data.label_column: {NOT_SET} fine, coarse of labels; name one of fine, coarse"),
    ({**IMAGE, "label_column": "score"}, "data.label_column: 'score' holds no labels (Value"),
    ({"label_column": "fine"}, f"data.image_column: {NOT_SET} image, depth of images; name one of image, depth"),
    (
        {"train_split": "trian"},
        "data.train_split: the data set has no split 'trian'; name one of train, test (",
    ),
    ({"train_split": "test", "validation_split": "test"}, "data.validation_split: 'test' is the training split, too"),
    (
        {**IMAGE, "label_column": "coarse", "validation_split": "test"},
        "data.label_column: a label in split 'test' is -1, which is none of the 3 classes",
    ),
    ({**IMAGE, "label_column": "word"}, "data.label_column: row 4 of split 'train' has no label"),
]


@pytest.fixture(scope="module")
def odd(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with several columns of each kind, and a test split without labels."""
    root = tmp_path_factory.mktemp("odd") / "odd"
    shared = {
        "image": images(hf),
        "depth": images(hf),
        "fine": of_classes(hf),
        "score": ([0.5] * 6, hf.Value("float32")),
    }
    word = (["a", "b", "a", "b", None, "a"], hf.Value("string"))
    train = columns(hf, **shared, coarse=of_classes(hf), word=word)
    test = columns(hf, **shared, coarse=([-1] * 6, of_classes(hf)[1]), word=word)
    hf.DatasetDict({"train": train, "test": test}).save_to_disk(root)
    return root


@pytest.mark.parametrize(("options", "said"), MISTAKES, ids=lambda value: str(value)[:40])
def test_what_is_not_clear_is_asked(options: dict[str, Any], said: str, odd: Path) -> None:
    with pytest.raises(InputError) as refusal:
        splits_of(odd, **options)
    assert str(refusal.value).startswith(said)


def test_other_classes_in_validation_are_refused(hf: Any, tmp_path: Path) -> None:
    parts = {
        split: columns(hf, image=images(hf), label=(values, hf.Value("string")))
        for split, values in (("train", ["a", "b"] * 3), ("validation", ["a", "c"] * 3))
    }
    hf.DatasetDict(parts).save_to_disk(tmp_path / "two")
    with pytest.raises(InputError, match=r"only in train: b; only in validation: c"):
        splits_of(tmp_path / "two")


@pytest.mark.parametrize("root", ["nobody/nothing-here", "nobody/nothing-here:small", "."])
def test_what_cannot_be_loaded_is_said_in_one_line(
    root: str, hf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(["train", *tiny(Path(root), tmp_path / "run", data__name="hf")], capsys)
    assert said.startswith(f"error: data.root: {root} cannot be loaded as a Hugging Face data set (")
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_not_installed_is_named_with_the_pip_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for verb in (["train"], ["data", "check"]):
        said = refused([*verb, *tiny(tmp_path, tmp_path / "run", data__name="hf")], capsys)
        assert said.startswith("error: data.name: hf needs datasets (")
        assert said.endswith('; pip install "deit-kd[hf]"')


def test_it_is_checked_trained_on_and_any_split_is_scored(
    hf: Any, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = hf.load_dataset(str(photos_root))
    hf.DatasetDict({**parts, "other": parts["train"].select(range(0, 48, 2))}).save_to_disk(tmp_path / "saved")
    where = {"data__name": "hf", "data__workers": 2}
    assert main(["data", "check", str(tmp_path / "saved"), "--data.name", "hf"]) == 0
    assert "48 training and 21 validation images" in capsys.readouterr().out
    assert main(["train", *tiny(tmp_path / "saved", tmp_path / "run", **where)]) == 0
    assert main(["eval", str(tmp_path / "run"), "--split", "other"]) == 0
    assert evaluated(tmp_path / "run", "other")["n"] == 24
    said = refused(["data", "index", str(tmp_path / "saved"), "--data.name", "hf"], capsys)
    assert said == "error: data index: hf needs no index; name a tree or shards"
