"""Shards, indexes and manifests that are damaged, swapped or hostile: one line, and nothing is written."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as arrow
import pytest

from deit_kd.cli import main
from deit_kd.data.index import place_of_index, read_index, write_index
from deit_kd.interfaces import InputError
from deit_kd.tars import members, padded
from tests.helpers import draw, refused, write_photos
from tests.tiny_parts import folder_splits


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("shards")
    tree = write_photos(home / "photos", {"train": 6, "validation": 2})
    assert main(["data", "pack", str(tree), str(home / "packed"), "--shard-mb", "0.02"]) == 0
    return home / "packed"


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    shutil.copytree(shards, tmp_path / "packed", copy_function=shutil.copy2)
    return tmp_path / "packed"


def image() -> bytes:
    file = io.BytesIO()
    draw(0, 0).save(file, "PNG")
    return file.getvalue()


def tar_of(*files: tuple[str, bytes], **of_first: object) -> bytes:
    """Return a tar; the header of its first file has other attributes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, (name, content) in enumerate(files):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in (of_first if number == 0 else {}).items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


GOOD = (("0.png", image()), ("0.cls", b"1"))
SECOND = 512 + padded(len(image()))  # where the header of the second file begins


def with_size(tar: bytes, field: bytes) -> bytes:
    """Return a tar whose first header says another size, with the right sum."""
    header = bytearray(tar[:512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + tar[512:]


HOSTILE_TARS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is cut off at byte 0"),
    "no tar": (b"\x89PNG" * 400, "is not a tar, or is a compressed one"),
    "compressed": (gzip.compress(tar_of(*GOOD), mtime=0).ljust(512, b"\1"), "is not a tar, or is a compressed one"),
    "cut in a file": (tar_of(*GOOD)[:700], "is cut off in '0.png'"),
    "cut between files": (tar_of(*GOOD)[:SECOND], f"is cut off at byte {SECOND}"),
    "cut in a header": (tar_of(*GOOD)[: SECOND + 9], f"is cut off at byte {SECOND + 9}"),
    "damaged header": (tar_of(*GOOD)[:SECOND] + b"x" * 512 + bytes(1024), f"is damaged at byte {SECOND}"),
    "size below 0": (with_size(tar_of(*GOOD), b"\xff" * 11 + b"\x00"), "is cut off in '0.png'"),
    "size of an exabyte": (with_size(tar_of(*GOOD), b"\x80" + b"\x00" * 3 + b"\x0f" + b"\x00" * 7), "is cut off in"),
    "symbolic link": (tar_of(("0.png", b""), type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'0.png' is a link"),
    "hard link": (tar_of(("0.png", b""), type=tarfile.LNKTYPE, linkname="1.png"), "'0.png' is a link"),
    "device": (tar_of(("0.png", b""), type=tarfile.CHRTYPE), "'0.png' is a device"),
    "GNU sparse": (tar_of(("0.png", b"a"), type=tarfile.GNUTYPE_SPARSE), "'0.png' is a sparse file"),
    "pax sparse": (tar_of(("0.png", b"a"), pax_headers={"GNU.sparse.major": "1"}), "holds a sparse file"),
    "absolute": (tar_of(("/0.png", b"a")), "'/0.png' is not a name below its folder"),
    "above": (tar_of(("a/../../0.png", b"a")), "'a/../../0.png' is not a name below its folder"),
    "above, in pax": (tar_of(("0.png", b"a"), pax_headers={"path": "../0.png"}), "'../0.png' is not a name below"),
    "pax without end": (tar_of(("0.png", b"a"), pax_headers={"comment": "x" * 70_000}), "the header of a file takes"),
    "no label": (tar_of(("0.png", image())), "'0' has no label; add '0.cls'"),
    "label below 0": (tar_of(("0.png", image()), ("0.json", b'{"label": -3}')), "is of class -3"),
    "label of billions": (tar_of(("0.png", image()), ("0.json", b'{"label": 1e99}')), "'0' has no label"),
    "label that is a photo": (tar_of(("0.png", image()), ("0.cls", bytes(2**21))), "too many for a label"),
    "no JSON": (tar_of(("0.png", image()), ("0.json", b"[" * 100_000)), "is no JSON"),
    "name above in JSON": (
        tar_of(("0.png", image()), ("0.json", b'{"label": 0, "filename": "../x.png"}')),
        "'../x.png' is not a name below its folder",
    ),
    "two images": (tar_of(("0.png", b"a"), ("0.jpg", b"b"), ("0.cls", b"1")), "'0' has 2 images"),
    "a photo twice": (tar_of(*GOOD, ("1.png", b"a"), ("1.cls", b"1"), *GOOD), "is there twice"),
    "names and numbers": (
        tar_of(*GOOD, ("1.png", b"a"), ("1.cls", b"cat")),
        "labels are numbers, such as 1, and names",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE_TARS)
def test_a_tar_that_cannot_be_used_is_refused_in_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = HOSTILE_TARS[kind]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar").write_bytes(content)
    assert said in refused(["data", "index", str(tmp_path)], capsys)
    assert os.listdir(tmp_path / "train") == ["0.tar"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_read_as_tarfile_reads_it(form: int, tmp_path: Path) -> None:
    long = "f" * 90 + "/" + "n" * 90 + ".png"
    names = ["./a.png", long, "folder/", *([] if form == tarfile.USTAR_FORMAT else ["ö" * 150 + ".png"])]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = 0 if name.endswith("/") else 600 * number
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(tmp_path / "a.tar") as tar:
        theirs = [(one.name.removeprefix("./"), one.offset_data, one.size) for one in tar if one.isfile()]
    with open(tmp_path / "a.tar", "rb") as file:
        assert [tuple(one) for one in members(file, "a.tar")] == theirs


def remove_a_shard(copy: Path) -> None:
    (copy / "train" / "000001.tar").unlink()


def remove_the_split(copy: Path) -> None:
    shutil.rmtree(copy / "validation")


def remove_the_index(copy: Path) -> None:
    (copy / "train" / "index.arrow").unlink()


def touch_a_shard(copy: Path) -> None:
    os.utime(copy / "train" / "000001.tar")


def lengthen_a_shard(copy: Path) -> None:
    with open(copy / "train" / "000001.tar", "ab") as file:
        file.write(bytes(512))


def add_a_shard(copy: Path) -> None:
    shutil.copy(copy / "train" / "000001.tar", copy / "train" / "000009.tar")


def name_fewer_classes(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["classes"].pop()
    (copy / "manifest.json").write_text(json.dumps(manifest))


def name_a_class_twice(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["classes"][0] = manifest["classes"][1]
    (copy / "manifest.json").write_text(json.dumps(manifest))


def write_no_manifest(copy: Path) -> None:
    (copy / "manifest.json").write_text("{")


def write_no_index(copy: Path) -> None:
    (copy / "train" / "index.arrow").write_bytes(b"ARROW1")


def change_index(copy: Path, column: str, value: int) -> None:
    path = copy / "train" / "index.arrow"
    index = read_index(path)
    values = index.columns[column].copy()
    values[0] = value
    write_index(path, index.names, {**index.columns, column: values}, index.facts)


def lead_out_of_a_shard(copy: Path) -> None:
    change_index(copy, "offset", 2**40)


def wrap_around(copy: Path) -> None:
    change_index(copy, "size", 2**63 - 1)


def name_an_unlisted_shard(copy: Path) -> None:
    change_index(copy, "shard", 99)


def label_below_zero(copy: Path) -> None:
    change_index(copy, "label", -1)


def list_a_shard_elsewhere(copy: Path) -> None:
    path = copy / "train" / "index.arrow"
    index = read_index(path)
    index.facts["shards"][0]["name"] = "../validation/000000.tar"
    write_index(path, index.names, index.columns, index.facts)


def name_a_photo_elsewhere(copy: Path) -> None:
    path = copy / "train" / "index.arrow"
    index = read_index(path)
    names = arrow.array(["../../x.png", *index.names.to_pylist()[1:]], arrow.large_string())
    write_index(path, names, index.columns, index.facts)


def name_a_split_elsewhere(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["../elsewhere"] = manifest["splits"]["train"]
    (copy / "manifest.json").write_text(json.dumps(manifest))


def give_a_trees_index(copy: Path) -> None:
    path = copy / "train" / "index.arrow"
    index = read_index(path)
    write_index(path, index.names, index.columns, {**index.facts, "of": "tree"})


REFUSED_AT_START: list[tuple[Callable[[Path], None], str]] = [
    (remove_a_shard, r"train/000001.tar: is missing, though the manifest lists it; copy it again"),
    (remove_the_split, r"validation/000000.tar: is missing.*, though the manifest lists it"),
    (remove_the_index, r"has shards without an index; run deit-kd data index"),
    (
        touch_a_shard,
        r"older than its shards .000001.tar is new, gone or changed.; run deit-kd data index",
    ),
    (lengthen_a_shard, r"index.arrow: is older than its shards .000001.tar"),
    (add_a_shard, r"index.arrow: is older than its shards .000009.tar"),
    (name_fewer_classes, r"has photos of class 2, and .* lists 2 classes; copy both again"),
    (name_a_class_twice, r"manifest.json: names the class 'dots' twice"),
    (write_no_manifest, r"manifest.json: cannot be read"),
    (write_no_index, r"index.arrow: is no index of photos"),
    (lead_out_of_a_shard, r"index.arrow: is no index of shards .photos lie outside their shards."),
    (wrap_around, r"index.arrow: is no index of shards .photos lie outside their shards."),
    (name_an_unlisted_shard, r"index.arrow: is no index of shards .it names shards that it does not list."),
    (label_below_zero, r"index.arrow: is no index of shards"),
    (list_a_shard_elsewhere, r"index.arrow: is older than its shards"),
    (name_a_photo_elsewhere, r"index.arrow: is no index of photos .it names photos outside their folder."),
    (name_a_split_elsewhere, r"manifest.json: '../elsewhere' is not a name below its folder"),
    (give_a_trees_index, r"index.arrow: is no index of shards .not of shards."),
]


@pytest.mark.parametrize(("spoil", "said"), REFUSED_AT_START, ids=lambda value: getattr(value, "__name__", ""))
def test_a_spoiled_set_is_refused_at_start(spoil: Callable[[Path], None], said: str, copy: Path) -> None:
    place_of_index(copy / "train").unlink(missing_ok=True)
    spoil(copy)
    with pytest.raises(InputError, match=said):
        folder_splits(copy, name="shards")


def swap_shards(copy: Path) -> None:
    (copy / "train" / "000000.tar").replace(copy / "aside")
    (copy / "train" / "000001.tar").replace(copy / "train" / "000000.tar")
    (copy / "aside").replace(copy / "train" / "000001.tar")


def rename_a_class(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["classes"][0] = "cats"
    (copy / "manifest.json").write_text(json.dumps(manifest))


REFUSED_WHEN_INDEXED: list[tuple[Callable[[Path], None], str]] = [
    (remove_a_shard, "train/000001.tar: is missing"),
    (swap_shards, "000000.tar: is not the shard that"),
    (add_a_shard, "000009.tar: is not the shard that"),
    (name_fewer_classes, "as class 2 of 2 in"),
    (rename_a_class, "as class 0, which is 'cats' in"),
    (name_a_split_elsewhere, "'../elsewhere' is not a name below its folder"),
]


@pytest.mark.parametrize(("spoil", "said"), REFUSED_WHEN_INDEXED, ids=lambda value: getattr(value, "__name__", ""))
def test_shards_other_than_the_manifests_are_not_indexed(
    spoil: Callable[[Path], None], said: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "train" / "index.arrow").unlink()
    spoil(copy)
    assert said in refused(["data", "index", str(copy), "--workers", "1"], capsys)
    assert not (copy / "train" / "index.arrow").exists()


def test_shards_that_are_taken_for_a_tree_are_told_apart(copy: Path) -> None:
    with pytest.raises(InputError, match=r"train holds no class folders; set data.name shards"):
        folder_splits(copy)


def test_a_tree_has_no_shards_to_stage(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.stage: .*, but data.name folder has no shards to copy; unset it"):
        folder_splits(shards.parent / "photos", stage=str(tmp_path))


def test_an_older_index_is_made_again(copy: Path) -> None:
    digest = folder_splits(copy, name="shards").train.digest()
    touch_a_shard(copy)
    assert main(["data", "index", str(copy), "--workers", "1"]) == 0
    assert folder_splits(copy, name="shards").train.digest() == digest


@pytest.mark.parametrize(("act", "said"), [(touch_a_shard, "was changed while"), (remove_a_shard, "was removed while")])
def test_a_shard_that_changes_during_a_run_ends_it(act: Callable[[Path], None], said: str, copy: Path) -> None:
    photos = folder_splits(copy, name="shards").train
    act(copy)
    with pytest.raises(InputError, match=said):
        [photos.image(index) for index in range(len(photos))]


BAD_PACKS: list[tuple[list[str], str]] = [
    (["TREE", "PACKED", "--short-side", "8"], "holds shards of other photos, or made with other options"),
    (["OTHER", "PACKED"], "holds shards of other photos, or made with other options"),
    (["TREE", "TREE"], "is not empty; name another folder"),
    (["TREE", "TREE/train/packed"], "is inside the photos of"),
    (["TREE", "NEW", "--quality", "101"], "--quality: 101 is not a quality of JPEG"),
    (["TREE", "NEW", "--splits", "test"], "test is not there; use one of train, validation"),
    (["NOWHERE", "NEW"], "NOWHERE is not a folder"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD_PACKS)
def test_a_pack_that_cannot_be_is_refused(
    arguments: list[str], said: str, copy: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_photos(copy.parent / "other", {"train": 1, "validation": 1})
    places = {"TREE": shards.parent / "photos", "PACKED": copy, "OTHER": other, "NEW": copy.parent / "new"}
    given = [str(places.get(one.partition("/")[0], one)) + "".join(one.partition("/")[1:]) for one in arguments]
    assert said in refused(["data", "pack", *given], capsys)
    assert not (copy.parent / "new").exists()
