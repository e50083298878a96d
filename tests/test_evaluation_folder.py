"""An evaluation keeps what it measured: its folder says what was evaluated, and nothing else is written over it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deit_kd.cli import main
from tests.helpers import SEVEN_CLASSES, evaluated, heads_in, short, snapshot, write_photos

INPUT = ["--data.workers", "0", "--train.precision", "off", "--train.device", "cpu"]


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of a run that was evaluated once, as it was trained."""
    folder = shutil.copytree(runs / "distilled", tmp_path / "run")
    shutil.rmtree(folder / "eval", ignore_errors=True)
    assert main(["eval", str(folder)]) == 0
    return folder


def folders(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


@pytest.fixture
def other_photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "elsewhere", {"train": 4, "validation": 3}, SEVEN_CLASSES)


def test_heads_json_says_what_was_evaluated(runs: Path, run: Path) -> None:
    heads = evaluated(run)
    what = heads["evaluated"]
    assert (what["root"], what["split"]) == (str(runs / "photos"), "validation")
    assert what["photos"] == json.loads((run / "run.json").read_text())["data"]["validation"]
    assert what["seen"]["crop_mode"] == "center"
    assert what["teacher"]["name"] == "test_resnet"
    assert (heads["weights"], heads["fusion"]) == ("model", "softmax")


@pytest.mark.parametrize(
    "options",
    [
        ["--data.root", "OTHER"],
        ["--teacher.name", "test_vit"],
        ["--evaluate.fusion", "logits"],
        ["--data.crop_mode", "squash"],
    ],
    ids=lambda options: options[0],
)
def test_what_else_is_evaluated_leaves_the_runs_own_evaluation_alone(
    options: list[str], run: Path, other_photos: Path
) -> None:
    before = snapshot(run / "eval" / "validation")
    given = [option.replace("OTHER", str(other_photos)) for option in options]
    assert main(["eval", str(run), *given]) == 0
    assert snapshot(run / "eval" / "validation") == before
    (other,) = folders(run / "eval") - {"validation"}
    root = given[1] if "--data.root" in given else heads_in(run / "eval" / other)["evaluated"]["root"]
    assert other.startswith(f"validation-{Path(root).name}-")
    assert heads_in(run / "eval" / other)["evaluated"]["root"] == root
    assert main(["eval", str(run), *given]) == 0  # the same again has the same folder
    assert folders(run / "eval") == {"validation", other}


def test_photos_that_were_moved_are_the_runs_own(runs: Path, run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(runs / "photos", tmp_path / "moved")
    assert main(["eval", str(run), "--data.root", str(moved)]) == 0
    assert folders(run / "eval") == {"validation"}
    assert evaluated(run)["evaluated"]["root"] == str(moved)


def test_photos_that_were_added_to_the_split_are_others(runs: Path, run: Path, tmp_path: Path) -> None:
    more = shutil.copytree(runs / "photos", tmp_path / "more")
    photo = next(more.glob("validation/*/*.png"))
    shutil.copy(photo, photo.with_name("again.png"))
    assert main(["eval", str(run), "--data.root", str(more)]) == 0
    assert evaluated(run)["n"] == 35
    (other,) = folders(run / "eval") - {"validation"}
    assert heads_in(run / "eval" / other)["n"] == 36


def test_a_student_without_a_run_keeps_what_was_evaluated_first(
    runs: Path, other_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    student = shutil.copytree(runs / "distilled" / "student", tmp_path / "mine")
    for root in (runs / "photos", other_photos, runs / "photos"):
        assert main(["eval", str(student), "--data.root", str(root), *INPUT]) == 0
    first, second = sorted(folders(tmp_path / "runs" / "eval"), key=len)
    assert first == "mine-validation"
    assert [heads_in(tmp_path / "runs" / "eval" / name)["n"] for name in (first, second)] == [35, 21]
    weights = load_file(student / "model.safetensors")
    save_file({name: tensor + 1 if torch.is_floating_point(tensor) else tensor for name, tensor in weights.items()},
              student / "model.safetensors", {"format": "pt"})  # fmt: skip
    assert main(["eval", str(student), "--data.root", str(runs / "photos"), *INPUT]) == 0
    assert len(folders(tmp_path / "runs" / "eval")) == 3


def test_pictures_of_an_earlier_evaluation_go_and_a_persons_own_stay(run: Path) -> None:
    folder = run / "eval" / "validation"
    assert main(["eval", str(run), "--diagnose", "true"]) == 0
    assert (folder / "diagnosis.json").is_file()
    assert list((folder / "attention").glob("gallery-*.png"))
    (folder / "attention" / "mine.png").write_bytes(b"precious")
    assert main(["eval", str(run)]) == 0
    assert not (folder / "diagnosis.json").exists()
    assert folders(folder / "attention") == {"mine.png"}
    (folder / "attention" / "mine.png").unlink()
    assert main(["eval", str(run)]) == 0
    assert folders(folder) == {"heads.json", "predictions.parquet"}


def test_fewer_pictures_than_before_leave_none_of_before(run: Path) -> None:
    folder = run / "eval" / "validation"
    assert main(["eval", str(run), "--diagnose", "true"]) == 0
    names = [row["path"] for row in json.loads((folder / "diagnosis.json").read_text())["gallery"]]
    assert len(names) > 1
    assert main(["eval", str(run), "--diagnose", "true", "--images", json.dumps(names[:1])]) == 0
    assert [path.name for path in (folder / "attention").glob("gallery-*")] == ["gallery-1.png"]


def test_a_report_that_fails_leaves_a_whole_run_and_one_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_fonts(*_: Any, **__: Any) -> None:
        raise RuntimeError("no font\nwas found")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", without_fonts)
    run = tmp_path / "run"
    options = {"evaluate__report": True, "train__epochs": 1, "distill__kind": "none", "teacher__random_weights": None}
    assert main(["train", *short(runs / "photos", run, **options)]) == 0
    assert heads_in(run)["n"] == 35
    assert (run / "student" / "model.safetensors").is_file()
    said = capsys.readouterr()
    assert said.err == ""
    assert f"its report failed (RuntimeError: no font was found); try again with deit-kd report {run}" in " ".join(
        said.out.split()
    )
    assert not (run / "report" / "report.html").exists()
    monkeypatch.undo()
    assert main(["report", str(run)]) == 0
