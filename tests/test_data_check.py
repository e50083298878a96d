"""`deit-kd data check` says what training would stumble over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deit_kd.cli import main
from tests.helpers import refused


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two splits of two classes, every photo another."""
    noise = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                Image.fromarray(noise.integers(0, 255, (8 + index, 12, 3), dtype=np.uint8)).save(
                    folder / f"{index}.png"
                )
    return tmp_path / "photos"


def check(tree: Path) -> tuple[int, dict[str, object]]:
    findings = tree.parent / "findings.json"
    code = main(["data", "check", str(tree), "--json", str(findings)])
    return code, json.loads(findings.read_text())


def test_a_sound_tree_is_counted_and_passes(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, findings = check(tree)
    assert code == 0
    assert findings["counts"] == {split: {"cat": 3, "dog": 3} for split in ("train", "validation")}
    assert "12 to 12 pixels wide, 8 to 10 high" in capsys.readouterr().out


def test_an_unreadable_photo_is_listed_and_fails(tree: Path) -> None:
    (tree / "train" / "cat" / "0.png").write_bytes(b"no image")
    code, findings = check(tree)
    assert code == 1
    assert [entry["name"] for entry in findings["unreadable"]] == ["cat/0.png"]  # type: ignore[attr-defined]


def test_files_with_other_extensions_are_counted(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train/cat/a.gif", "train/dog/b.GIF", "validation/cat/c.heic", "validation/cat/README", "notes.txt"):
        (tree / name).write_bytes(b"photo")
    code, findings = check(tree)
    assert code == 0
    assert findings["not_taken"] == {".gif": 2, ".heic": 1, "": 1}
    said = capsys.readouterr().out
    assert "not taken: 4 files with another extension (1 without one, 2 .gif, 1 .heic); taken: .jpg .jpeg .png" in said


def test_a_tree_of_photos_alone_has_nothing_that_is_not_taken(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tree)[1]["not_taken"] == {}
    assert "not taken" not in capsys.readouterr().out


@pytest.mark.parametrize(("split", "kind", "code"), [("train", "within", 0), ("validation", "across", 1)])
def test_the_same_file_twice_is_found(tree: Path, split: str, kind: str, code: int) -> None:
    shutil.copy(tree / "train" / "cat" / "0.png", tree / split / "dog" / "copy.png")
    found, findings = check(tree)
    assert found == code
    assert findings["duplicates"][kind] == [["train/cat/0.png", f"{split}/dog/copy.png"]]


def test_a_missing_tree_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["data", "check", str(tmp_path / "nowhere")], capsys).startswith("error: data.root: ")


@pytest.mark.parametrize(
    ("recipe", "percent", "held_out"), [("seed: 0", 20, None), ("data: {validation_fraction: 0.5}", 50, 6)]
)
def test_the_recipe_says_how_many_are_held_out(
    tree: Path, capsys: pytest.CaptureFixture[str], recipe: str, percent: int, held_out: int | None
) -> None:
    for photo in tree.glob("validation/*/*.png"):
        photo.rename(tree / "train" / photo.parent.name / f"more-{photo.name}")
    shutil.rmtree(tree / "validation")
    file, findings = tree.parent / "recipe.yaml", tree.parent / "findings.json"
    file.write_text(recipe)
    assert main(["data", "check", str(tree), "--config", str(file), "--json", str(findings)]) == 0
    counts = json.loads(findings.read_text())["counts"]
    assert held_out in (None, sum(counts["validation"].values()))
    assert f"validation: {percent} % of each class (data.validation_fraction" in capsys.readouterr().out


def test_a_set_that_the_recipe_names_is_not_looked_for_in_a_tree(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("check", "index"):
        assert main(["data", verb, str(tree), "--data.name", "cifar10"]) == 2
    missing, indexed = capsys.readouterr().err.splitlines()
    assert missing.startswith(f"error: data.root: {tree}: Dataset not found or corrupted; set --data.download true")
    assert indexed == "error: data index: cifar10 needs no index; name a tree or shards"


def test_handwritten_digits_are_checked_without_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "--data.name", "digits"]) == 0
    assert "1438 training and 359 validation images" in capsys.readouterr().out


def test_the_recipe_may_name_the_photos(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "--data.root", str(tree)]) == 0
    assert "6 training and 6 validation images" in capsys.readouterr().out
    assert "data.root: is not set" in refused(["data", "check"], capsys)
