"""While training: what is told, and where the records go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deit_kd.cli import main
from tests.helpers import refused, short


def test_plain_lines_tell_both_terms_the_rate_and_the_time_left(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *short(runs / "photos", tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 4
    for word in ("loss", "(cls", "dist", "lr", "images/s", "left"):
        assert word in steps[0]
    assert steps[-1].endswith("0:00:00 left")
    epochs = [line for line in lines if line.startswith("epoch ")]
    for word in ("cls", "dist", "fused", "teacher"):
        assert word in epochs[0]


def test_tensorboard_gets_every_number_of_the_records(runs: Path) -> None:
    board = EventAccumulator(str(runs / "distilled/tensorboard")).Reload()
    records = [json.loads(line) for line in (runs / "distilled/metrics.jsonl").read_text().splitlines()]
    losses = [(record["step"], record["loss"]) for record in records if record["kind"] == "step"]
    assert [(event.step, event.value) for event in board.Scalars("step/loss")] == [
        (step, pytest.approx(loss)) for step, loss in losses
    ]
    assert "epoch/model/heads/dist/top1" in board.Tags()["scalars"]


def test_weights_and_biases_gets_the_same_numbers(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, str, float]] = []
    begun: list[dict[str, Any]] = []
    finished: list[bool] = []

    def init(**options: Any) -> Any:
        begun.append(options)
        return SimpleNamespace(
            log=lambda numbers, step: logged.extend((step, name, value) for name, value in numbers.items()),
            finish=lambda: finished.append(True),
        )

    wandb: Any = ModuleType("wandb")
    wandb.init, wandb.__spec__ = init, SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = tmp_path / "run"
    options = {"tracking__wandb": True, "tracking__project": "mine"}
    assert main(["train", *short(runs / "photos", run, **options)]) == 0
    assert (begun[0]["project"], begun[0]["name"], begun[0]["config"]["seed"]) == ("mine", "run", 0)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(record["step"], "step/loss", record["loss"]) for record in records if record["kind"] == "step"]
    assert [entry for entry in logged if entry[1] == "step/loss"] == losses
    assert finished == [True]


def test_weights_and_biases_is_refused_where_it_is_not_installed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = tmp_path / "run"
    arguments = ["train", "--config", str(runs / "distilled/config.yaml"), "--output", str(folder)]
    assert "pip install wandb" in refused([*arguments, "--tracking.wandb", "true"], capsys)
    assert not folder.exists()
