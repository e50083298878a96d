"""A tree packed into shards is the same dataset: the same photos, views, folds, runs and stores."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from deit_kd.cli import main
from deit_kd.data import Photos, Splits, UnreadableImage
from deit_kd.data.shards import OPEN_AT_ONCE
from deit_kd.interfaces import InputError
from tests.helpers import Finished, assert_same_end, copied, draw, newest_two, refused, tiny, write_photos
from tests.tiny_parts import folder_splits

ODD_NAMES = ("a.b.jpg", "a_b.jpg", "a_b.png", "x.JPEG", ".hidden.png", "deep/er/y.webp", "deep-er.png", "ö ß.png")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of three classes, with odd names, a turned photo and one that cannot be read."""
    root = write_photos(tmp_path_factory.mktemp("tree") / "photos", {"train": 5, "validation": 3})
    for number, name in enumerate(ODD_NAMES):
        path = root / "train" / "dots" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(1, 100 + number).save(path)
    turned = Image.Exif()
    turned[0x0112] = 6
    draw(2, 7).save(root / "train" / "rings" / "turned.jpg", exif=turned)
    (root / "train" / "bars" / "broken.jpg").write_bytes(b"no image")
    return root


def packed(tree: Path, out: Path, *options: str) -> Path:
    assert main(["data", "pack", str(tree), str(out), "--shard-mb", "0.03", *options]) == 0
    return out


@pytest.fixture(scope="module")
def shards(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tree, tmp_path_factory.mktemp("shards") / "packed")


def of_shards(root: Path, **options: Any) -> Splits:
    return folder_splits(root, name="shards", **options)


def pixels(photos: Photos) -> Iterator[tuple[str, Any]]:
    for index, name in enumerate(photos.names):
        try:
            yield name, photos.array(index).tolist()
        except UnreadableImage:
            yield name, None


def test_shards_hold_the_photos_of_the_tree_in_its_order(tree: Path, shards: Path) -> None:
    assert len(list(shards.glob("train/*.tar"))) > 2
    for ours, theirs in zip(of_shards(shards), folder_splits(tree), strict=True):
        assert ours.lines() == theirs.lines()
        assert ours.digest() == theirs.digest()
        assert list(pixels(ours)) == list(pixels(theirs))


@pytest.mark.parametrize("options", [{"folds": 3, "fold": 1}, {"classes": ["dots", "rings"]}, {"per_class": 2}])
def test_folds_and_subsets_of_shards_are_those_of_the_tree(tree: Path, shards: Path, options: dict[str, Any]) -> None:
    for ours, theirs in zip(of_shards(shards, **options), folder_splits(tree, **options), strict=True):
        assert ours.digest() == theirs.digest()
        last = len(ours) - 1
        assert list(pixels(ours.subset([0, last]))) == list(pixels(theirs.subset([0, last])))


@pytest.mark.parametrize("counts", [{"": 6}, {"train": 6}])
def test_a_tree_without_validation_is_divided_alike(counts: dict[str, int], tmp_path: Path) -> None:
    tree = write_photos(tmp_path / "photos", counts)
    out = packed(tree, tmp_path / "packed")
    digests = [[part.digest() for part in splits] for splits in (of_shards(out), folder_splits(tree))]
    assert digests[0] == digests[1]


def test_photos_of_shards_are_decoded_in_advance_alike(tree: Path, shards: Path) -> None:
    ours, theirs = (
        splits.validation.cached("memory", torch.device("cpu")) for splits in (of_shards(shards), folder_splits(tree))
    )
    assert list(pixels(ours)) == list(pixels(theirs))


def test_any_webdataset_reader_finds_image_and_label_by_key(shards: Path, tree: Path) -> None:
    classes = json.loads((shards / "manifest.json").read_text())["classes"]
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(shards.glob("train/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                folder, _, last = member.name.rpartition("/")
                key, _, extension = last.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                found.setdefault(f"{folder}/{key}", {})[extension] = content.read()
    assert len(found) == len(folder_splits(tree).train)
    for sample in found.values():
        (image,) = (value for extension, value in sample.items() if extension not in ("cls", "json"))
        name = json.loads(sample["json"])["filename"]
        assert image == (tree / "train" / name).read_bytes()
        assert classes[int(sample["cls"])] == name.partition("/")[0]


def test_the_same_tree_gives_the_same_shards(tree: Path, shards: Path, tmp_path: Path) -> None:
    again = packed(tree, tmp_path / "again", "--workers", "1")
    for path in shards.glob("*/*.tar"):
        assert (again / path.relative_to(shards)).read_bytes() == path.read_bytes()


def test_packing_goes_on_after_the_last_whole_shard(tree: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    shutil.copytree(shards, out)
    *kept, last = sorted((out / "train").glob("*.tar"))
    (out / "train" / f".{last.name}.partial").write_bytes(last.read_bytes()[:700])  # a kill in its write
    for file in (last, out / "manifest.json", out / "train" / "index.arrow"):
        file.unlink()
    before = {path: path.stat().st_ino for path in kept}
    packed(tree, out)
    assert {path: path.stat().st_ino for path in kept} == before
    assert last.read_bytes() == (shards / "train" / last.name).read_bytes()
    assert of_shards(out).train.digest() == folder_splits(tree).train.digest()
    assert not list(out.glob("*/.*.partial"))


def test_small_photos_are_upright_jpegs_of_full_chroma(tree: Path, tmp_path: Path) -> None:
    out = packed(tree, tmp_path / "small", "--short-side", "16", "--data.on_error", "skip")
    photos = of_shards(out).train
    assert min(min(photos.image(index).size) for index in range(len(photos))) == 16
    index = list(photos.names).index("rings/turned.jpg")
    with Image.open(photos.source.open(index, "")) as image:
        assert isinstance(image, JpegImageFile)
        assert image.format == "JPEG"
        assert not image.info.get("progressive")
        assert [component[1:3] for component in image.layer] == [(1, 1)] * 3
    upright = folder_splits(tree).train
    there = upright.image(list(upright.names).index("rings/turned.jpg")).resize(image.size, Image.Resampling.BICUBIC)
    assert np.abs(photos.array(index).astype(int) - np.asarray(there)).mean() < 12


def test_what_cannot_be_packed_ends_packing_or_is_left_out_and_listed(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "pack", str(tree), str(tmp_path / "small"), "--quality", "90"]
    assert "broken.jpg: cannot be read as an image" in refused(arguments, capsys)
    assert main([*arguments, "--data.on_error", "skip"]) == 0
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert manifest["left_out"] == {"train": ["bars/broken.jpg"]}


def test_a_part_of_a_tree_is_packed_as_a_run_would_take_it(tree: Path, tmp_path: Path) -> None:
    out = packed(tree, tmp_path / "part", "--data.classes", '["bars", "dots"]', "--data.per_class", "3")
    theirs = folder_splits(tree, classes=["bars", "dots"], per_class=3)
    assert [part.digest() for part in of_shards(out)] == [part.digest() for part in theirs]


def test_the_manifest_names_classes_and_the_digest_that_runs_record(tree: Path, shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["classes"] == list(folder_splits(tree).train.classes)
    assert manifest["splits"]["train"]["digest"] == folder_splits(tree).train.digest()


def test_a_run_begun_on_the_tree_goes_on_from_its_shards(finished: Finished, photos_root: Path, tmp_path: Path) -> None:
    arguments = copied(finished, tmp_path)
    for left in (newest_two(tmp_path / "run")[1], tmp_path / "run" / "heads.json"):
        left.unlink()
    out = packed(photos_root, tmp_path / "packed")
    stage = ["--data.stage", str(tmp_path / "local")]
    assert main(["train", *arguments, "--data.name", "shards", "--data.root", str(out), *stage]) == 0
    assert_same_end(finished, tmp_path)
    assert len(list((tmp_path / "local").glob("*/*.tar"))) == len(list(out.glob("*/*.tar")))


def test_a_label_store_of_the_tree_teaches_from_its_shards(tmp_path: Path) -> None:
    tree = write_photos(tmp_path / "photos", {"train": 4, "validation": 2})
    out, store = packed(tree, tmp_path / "packed"), str(tmp_path / "store")
    assert main(["store", "build", *tiny(tree, None, distill__kind="soft"), "--store", store]) == 0
    arguments = tiny(out, None, distill__kind="soft", data__name="shards")
    assert main(["store", "check", store, *arguments]) == 0


def test_a_run_is_evaluated_on_shards_as_on_its_tree(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "run")
    out = packed(runs / "photos", tmp_path / "packed", "--splits", "train", "validation")
    found = []
    for name, root in (("folder", runs / "photos"), ("shards", out)):
        to = tmp_path / name
        assert (
            main(["eval", str(tmp_path / "run"), "--data.name", name, "--data.root", str(root), "--to", str(to)]) == 0
        )
        found.append(parquet.read_table(to / "predictions.parquet").to_pylist())
    assert found[0] == found[1]


def test_a_damaged_photo_cannot_be_read_and_no_other_takes_its_place(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    shutil.copytree(shards, out, copy_function=shutil.copy2)
    photos = of_shards(out).validation
    row = 3
    path = Path(photos.source.files[photos.source.shard[row]].path)  # type: ignore[attr-defined]
    spoil(path, int(photos.source.offset[row]) + 9)  # type: ignore[attr-defined]
    with pytest.raises(UnreadableImage, match=f"{photos.names[row]}: cannot be read as an image .its bytes in"):
        photos.image(row)
    whole = dict(pixels(of_shards(shards).validation))
    assert all(value == whole[name] for name, value in pixels(photos) if name != photos.names[row])
    assert main(["data", "check", str(out)]) == 1
    assert "unreadable: 2" in capsys.readouterr().out  # with the one that the tree cannot read


def spoil(path: Path, byte: int) -> None:
    """Change one byte of a file and nothing else that can be seen of it."""
    found = path.stat()
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 255]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_a_thousand_shards_keep_a_bounded_number_of_files_open(tmp_path: Path) -> None:
    tree = write_photos(tmp_path / "photos", {"": (OPEN_AT_ONCE + 30) // 3})
    out = tmp_path / "packed"
    assert main(["data", "pack", str(tree), str(out), "--shard-mb", "0.000001"]) == 0
    photos = of_shards(out).train
    assert len(photos.source.files) > OPEN_AT_ONCE  # type: ignore[attr-defined]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for index in range(len(photos)):
            photos.image(index)
    assert len(os.listdir("/proc/self/fd")) <= before + OPEN_AT_ONCE


def test_an_index_is_kept_in_the_cache_where_the_folder_cannot_be_written(
    tree: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    shutil.copytree(shards, out)
    for path in out.glob("*/index.arrow"):
        path.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)  # as on a read-only mount; tests may run as root
    assert main(["data", "index", str(out)]) == 0
    assert not list(out.glob("*/index.arrow"))
    assert of_shards(out).train.digest() == folder_splits(tree).train.digest()


def test_an_index_made_again_is_the_one_that_packing_made(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    shutil.copytree(shards, out, copy_function=shutil.copy2)
    before = (out / "train" / "index.arrow").read_bytes()
    assert main(["data", "index", str(out), "--workers", "1"]) == 0
    assert (out / "train" / "index.arrow").read_bytes() == before


def test_the_same_verb_indexes_a_tree(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "index", str(tree)]) == 0
    assert f"{tree / 'train'}: 25 photos" in capsys.readouterr().out


# What others have packed


def foreign(path: Path, samples: list[dict[str, bytes]], keys: list[str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                info = tarfile.TarInfo(f"{keys[number] if keys else f'{number:05d}'}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def jpeg(label: int, number: int) -> bytes:
    file = io.BytesIO()
    draw(label, number).save(file, "JPEG")
    return file.getvalue()


def labelled(kind: str, label: int, number: int) -> dict[str, bytes]:
    name = ("n01", "n02", "n03")[label]
    about = {
        "cls": {"cls": str(label).encode()},
        "name": {"cls": name.encode()},
        "json": {"json": json.dumps({"label": label}).encode()},
        "class": {"json": json.dumps({"class": name, "width": 3}).encode()},
        "hub": {"cls": str(label).encode(), "json": json.dumps({"filename": f"{name}/{number}.JPEG"}).encode()},
    }[kind]
    return {"jpg": jpeg(label, number), **about}


@pytest.mark.parametrize(
    ("kind", "classes"),
    [
        ("cls", ("0", "1", "2")),
        ("json", ("0", "1", "2")),
        ("name", ("n01", "n02", "n03")),
        ("class", ("n01", "n02", "n03")),
        ("hub", ("n01", "n02", "n03")),
    ],
)
def test_shards_of_others_are_read_in_one_folder(kind: str, classes: tuple[str, ...], tmp_path: Path) -> None:
    for part, first in (("train-0000", 0), ("train-0001", 6), ("validation-00", 12)):
        samples = [labelled(kind, number % 3, first + number) for number in range(6)]
        foreign(tmp_path / f"set-{part}.tar", samples)
    assert main(["data", "index", str(tmp_path)]) == 0
    splits = of_shards(tmp_path)
    assert splits.train.classes == splits.validation.classes == classes
    assert [len(part) for part in splits] == [12, 6]
    for index in range(12):
        label, name = int(splits.train.labels[index]), splits.train.names[index]
        number = int(Path(name).stem) + (6 if "train-0001" in name else 0)
        assert splits.train.content(index) == jpeg(label, number)


def test_splits_that_number_their_classes_differently_are_refused(tmp_path: Path) -> None:
    foreign(tmp_path / "train" / "0.tar", [labelled("hub", number % 3, number) for number in range(6)])
    swapped = [labelled("hub", number % 3, number) for number in range(6)]
    for number, sample in enumerate(swapped):
        sample["cls"] = str((number + 1) % 3).encode()
    foreign(tmp_path / "validation" / "0.tar", swapped)
    assert main(["data", "index", str(tmp_path)]) == 0
    with pytest.raises(InputError, match=r"is 'n0.' in the shards of 'validation', and 'n0.' in those of 'train'"):
        of_shards(tmp_path)


@pytest.mark.parametrize(("train", "validation"), [("hub", "name"), ("name", "hub")])
def test_splits_with_numbers_and_with_names_have_one_order(train: str, validation: str, tmp_path: Path) -> None:
    for part, kind in (("train", train), ("validation", validation)):
        samples = [labelled(kind, number % 3, number) for number in range(6)]
        for number, sample in enumerate(samples):
            if kind == "hub":
                sample["cls"] = str(2 - number % 3).encode()  # against the order of the names
        foreign(tmp_path / part / "0.tar", samples)
    assert main(["data", "index", str(tmp_path)]) == 0
    splits = of_shards(tmp_path)
    assert splits.train.classes == splits.validation.classes == ("n03", "n02", "n01")
    for photos in splits:
        for index in range(6):
            assert photos.content(index) in [jpeg(2 - int(photos.labels[index]), number) for number in range(6)]


def test_a_list_of_classes_beside_shards_names_them(tmp_path: Path) -> None:
    for part in ("train", "test"):
        foreign(tmp_path / part / "0.tar", [labelled("cls", number % 3, number) for number in range(6)])
    (tmp_path / "classnames.txt").write_text("bars\ndots\nrings\n")
    assert main(["data", "index", str(tmp_path), "--data.validation_split", "test"]) == 0
    assert of_shards(tmp_path, validation_split="test").train.classes == ("bars", "dots", "rings")


# Copies on a local disk


def test_staged_shards_give_the_same_photos_and_are_copied_once(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = of_shards(shards, stage=str(tmp_path)).train
    assert "copying" in capsys.readouterr().out
    again = of_shards(shards, stage=str(tmp_path)).train
    assert "copying" not in capsys.readouterr().out
    assert all(Path(file.path).is_relative_to(tmp_path) for file in again.source.files)  # type: ignore[attr-defined]
    assert list(pixels(again)) == list(pixels(first)) == list(pixels(of_shards(shards).train))


def staged_names(root: Path, stage: Path) -> list[str]:
    return [file.path for file in of_shards(root, stage=str(stage)).train.source.files]  # type: ignore[attr-defined]


def test_processes_of_a_machine_copy_shards_once(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ProcessPoolExecutor(3) as pool:
        found = list(pool.map(staged_names, [shards] * 3, [tmp_path] * 3))
    assert found[0] == found[1] == found[2]
    assert capfd.readouterr().out.count("copying") == 2  # each split


def test_a_photo_that_is_damaged_in_the_shards_does_not_stop_staging(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "packed", copy_function=shutil.copy2)
    photos = of_shards(tmp_path / "packed").train
    spoil(Path(photos.source.files[photos.source.shard[0]].path), int(photos.source.offset[0]))  # type: ignore[attr-defined]
    staged = of_shards(tmp_path / "packed", stage=str(tmp_path / "local")).train
    unreadable = {name for name, value in pixels(staged) if value is None}
    assert unreadable == {"bars/broken.jpg", photos.names[0]}


@pytest.mark.parametrize("leaves", ["nothing", "a part of a shard", "other bytes"])
def test_an_unfinished_copy_is_finished(leaves: str, shards: Path, tmp_path: Path) -> None:
    of_shards(shards, stage=str(tmp_path))
    (copy,) = tmp_path.glob("train-*/000001.tar")
    if leaves == "nothing":
        copy.unlink()
    elif leaves == "a part of a shard":
        copy.write_bytes(copy.read_bytes()[:99])
    else:
        copy.write_bytes(bytes(len(copy.read_bytes())))
    photos = of_shards(shards, stage=str(tmp_path)).train
    assert copy.read_bytes() == (shards / "train" / "000001.tar").read_bytes()
    assert list(pixels(photos)) == list(pixels(of_shards(shards).train))


class Disk(NamedTuple):
    """What ``shutil.disk_usage`` says of one."""

    total: int
    used: int
    free: int


def test_a_disk_with_too_little_room_is_refused_before_copying(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10, 9, 1))
    with pytest.raises(InputError, match=r"data.stage: .* needs .* more, and 1 bytes are free"):
        of_shards(shards, stage=str(tmp_path / "local"))
    assert not list(tmp_path.glob("**/*.tar"))
