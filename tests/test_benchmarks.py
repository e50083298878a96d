"""The programs behind the figures of docs/, each on a recipe of seconds: what measures must still run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from deit_kd.cli import main
from tests.conftest import REPOSITORY, STUDENT, as_arguments, tiny

Program = Callable[..., str]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Run a benchmark with arguments; return what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        import_module(name).main()
        return capsys.readouterr().out

    return run


def test_growth_prints_four_tables(photos_root: Path, tmp_path: Path, program: Program) -> None:
    found = tmp_path / "growth.json"
    options = [
        "--rounds",
        "1",
        "--sizes",
        "16",
        "32",
        "--models",
        STUDENT,
        "--classes",
        "3",
        "20",
        "--json",
        str(found),
    ]
    printed = program("growth", *tiny(photos_root, tmp_path / "run", distill__kind="soft"), *options)
    assert printed.count("| ms an image |") == 3
    assert "| epochs stored" in printed
    assert json.loads(found.read_text())["image, ms an image"].keys() == {"16 px", "32 px"}


def test_against_timm_times_both_sides(photos_root: Path, tmp_path: Path, program: Program) -> None:
    found = tmp_path / "against.json"
    options = ["--rounds", "1", "--steps", "2", "--json", str(found)]
    recipe = {"augment__mixup": 0, "augment__cutmix": 0, "data__workers": 1}
    program("against_timm", *tiny(photos_root, tmp_path / "run", **recipe), *options)
    measured = json.loads(found.read_text())
    assert len(measured["rates"]) == 5
    assert all(rate > 0 for rates in measured["rates"].values() for rate in rates)
    assert len(measured["ratios"]) == 3


def test_records_of_all_logits_lose_less_than_those_of_one(photos_root: Path, tmp_path: Path, program: Program) -> None:
    printed = program("store_divergence", *tiny(photos_root, tmp_path / "run"))
    rows = {cells[1].strip(): float(cells[3]) for cells in (line.split("|") for line in printed.splitlines()[3:])}
    assert rows.keys() == {"1", "all"}
    assert rows["all"] < 1e-4 < rows["1"]


def test_spans_of_an_average_are_compared_in_one_run(photos_root: Path, tmp_path: Path, program: Program) -> None:
    printed = program("average_span", *tiny(photos_root, tmp_path / "run"), "--shares", "0.5")
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in printed.splitlines() if "%" in line]
    assert [row[:3] for row in rows[-2:]] == [["0 %", "0", "none"], ["50 %", "3", "0.66667"]]
    assert not (tmp_path / "run").exists()


def test_heads_are_compared_over_seeds(runs: Path, tmp_path: Path, program: Program) -> None:
    for run, name in (("plain", "none-0"), ("distilled", "hard-0")):
        shutil.copytree(runs / run, tmp_path / name)
        assert main(["eval", str(tmp_path / name)]) == 0
    printed = program("compare_heads", str(tmp_path), "--variants", "hard", "--seeds", "0")
    rows = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines() if "│ hard" in line]
    heads = json.loads((tmp_path / "hard-0" / "heads.json").read_text())["heads"]
    assert len(rows) == 4
    for name in ("cls", "dist"):
        assert [row[3] for row in rows if row[2] == name] == [f"{heads[name]['top1']:.1f}"]


def test_fine_tuning_is_compared_with_scratch(runs: Path, tmp_path: Path, program: Program) -> None:
    options = as_arguments(
        data__image_size=16,
        data__workers=0,
        augment__auto_augment="null",
        student__args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
        teacher__name="test_resnet",
        teacher__min_top1=0,
        train__batch_size=4,
        teacher__fit__batch_size=4,
        evaluate__report=False,
    )
    printed = program(
        "finetune", "--root", str(runs / "photos"), "--output", str(tmp_path / "out"),
        *("--epochs", "2", "--teacher-epochs", "1", "--seeds", "0"), *options,
    )  # fmt: skip
    assert "graft: total variation" in printed
    assert len([line for line in printed.splitlines() if line.endswith("% top-1")]) == 5
