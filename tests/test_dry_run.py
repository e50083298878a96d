"""A dry run says what the run will need, is refused for what the run would be, and leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.jobs.dry_run import dry_run
from tests.helpers import FULL, Finished, as_arguments, refused, snapshot, tiny


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_says_memory_time_and_disk(photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *tiny(photos_root, tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for line in (r"memory: .+ [MG]B at the peak", r"time: about .+ per epoch \(6 steps", r"disk: .+ for checkpoints"):
        assert re.search(line, said), line


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distill__kind": "none"},
        {**FULL, "data__workers": 0},
        {"teacher__store": "store", "teacher__store_mode": "record"},
        {"train__epochs": 1, "train__batch_size": 48},
    ],
    ids=["online", "no teacher", "a teacher to fit", "recording", "one step"],
)
def test_it_leaves_nothing_behind(photos_root: Path, tmp_path: Path, options: dict[str, object]) -> None:
    assert main(["train", *tiny(photos_root, tmp_path / "run", **options), "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_must_be_fitted_first_is_said(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", *tiny(photos_root, tmp_path / "run", **FULL), "--dry-run"])
    assert "is not fitted yet; a fit of 2 epochs comes first" in capsys.readouterr().out


def test_a_teacher_that_is_fitted_is_used(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(finished.folder.parent)
    assert main(["train", *finished.arguments, "--output", "new", "--dry-run"]) == 0
    assert f"teacher: found {finished.teachers}" in capsys.readouterr().out
    assert snapshot(finished.folder.parent) == before


def test_the_checkpoint_is_as_large_as_said(finished: Finished) -> None:
    needs = dry_run(parse_config([*finished.arguments, "--output", "new"])[0])
    size = next((finished.folder / "checkpoints").iterdir()).stat().st_size
    assert 0.8 * size < needs.checkpoint < size


def test_the_store_is_as_large_as_said(photos_root: Path, tmp_path: Path) -> None:
    recording = {"teacher__store": str(tmp_path / "store"), "teacher__store_mode": "record", "distill__kind": "soft"}
    arguments = tiny(photos_root, tmp_path / "run", **recording)
    needs = dry_run(parse_config(arguments)[0])
    assert main(["train", *arguments]) == 0
    size = sum(file.stat().st_size for file in (tmp_path / "store").glob("*.safetensors"))
    assert size - 1000 < needs.store < size


@pytest.mark.parametrize(
    ("decay", "line"),
    [
        (0.75, "average: over 4 steps, 66.7 % of the run's 6"),
        (0.99, "warning: average: over 100 steps, 1666.7 % of the run's 6, so it is the plain mean of all"),
        ("null", "average: over 3 steps, 5.0 % of the run's 60"),
    ],
)
def test_it_says_the_span_of_the_average(
    decay: object, line: str, photos_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    epochs = 10 if decay == "null" else 1
    main(["train", *tiny(photos_root, Path("run"), train__ema_decay=decay, train__epochs=epochs), "--dry-run"])
    assert line in " ".join(capsys.readouterr().out.split())


def test_what_the_run_would_be_refused_for_is_refused(
    finished: Finished, photos_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "already holds a run" in refused(["train", *finished.arguments, "--dry-run"], capsys)
    options = as_arguments(teacher__random_weights=False)
    arguments = tiny(photos_root, Path("run"), teacher__random_weights=None)
    assert "has nothing to take its weights from" in refused(["train", *arguments, *options, "--dry-run"], capsys)
