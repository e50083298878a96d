"""The memory format of a teacher: measured where nothing promises bits, recorded, and kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.run_folder import read_facts
from deit_kd.runs import memory_format
from deit_kd.runs.memory_format import is_measured, memory_format_lines, prefers_channels_last
from deit_kd.teachers import FrozenTeacher
from tests.helpers import records, tiny
from tests.tiny_parts import make_batch, tiny_teacher

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_another_format_changes_answers_by_rounding_and_back_not_at_all() -> None:
    teacher, batch = tiny_teacher(), make_batch(8)
    weight = next(parameter for parameter in teacher.network.parameters() if parameter.ndim == 4)
    before = teacher(batch).needed_logits()
    teacher.lay_out(False)
    assert weight.is_contiguous()
    torch.testing.assert_close(teacher(batch).needed_logits(), before)
    teacher.lay_out(True)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(teacher(batch).needed_logits(), before)


@pytest.mark.parametrize(
    ("seconds", "channels_last"),
    [
        ({"channels_last": 1.0, "contiguous": 0.9}, False),
        ({"channels_last": 1.0, "contiguous": 0.96}, True),
        ({"channels_last": 0.9, "contiguous": 1.0}, True),
        ({"channels_last": 1.0}, True),
        ({"contiguous": 1.0}, False),
        ({}, True),
    ],
)
def test_nchw_is_chosen_where_it_is_clearly_faster(seconds: dict[str, float], channels_last: bool) -> None:
    assert prefers_channels_last(seconds) is channels_last


@pytest.mark.parametrize(
    ("options", "device", "measured"),
    [
        ({}, CUDA, True),
        ({}, CPU, False),
        ({"train__deterministic": True}, CUDA, False),
        ({"teacher__compile": True}, CUDA, False),
        ({"teacher__channels_last": True}, CUDA, False),
        ({"teacher__channels_last": False}, CUDA, False),
    ],
)
def test_the_clock_decides_where_no_bits_are_promised_and_the_recipe_names_no_format(
    options: dict[str, Any], device: torch.device, measured: bool, tmp_path: Path
) -> None:
    assert is_measured(parse_config(tiny(tmp_path, tmp_path / "run", **options))[0], device) is measured


@pytest.fixture
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_format, "MEASURED_ON", ("cpu", "cuda"))


@pytest.fixture
def asked() -> Iterator[set[bool]]:
    """Whether the teachers that answered were NCHW."""
    found: set[bool] = set()

    def note(module: nn.Module, *_: Any) -> None:
        if isinstance(module, FrozenTeacher):
            found.add(next(p for p in module.network.parameters() if p.ndim == 4 and p.shape[1] > 1).is_contiguous())

    hook = register_module_forward_pre_hook(note)
    yield found
    hook.remove()


def prefer(monkeypatch: pytest.MonkeyPatch, channels_last: bool) -> None:
    monkeypatch.setattr(memory_format, "ENOUGH", 0.0 if channels_last else float("inf"))


@pytest.mark.usefixtures("on_any_device")
def test_a_run_measures_says_and_records_the_format_of_each_network(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [{"name": "test_resnet", "random_weights": True}] * 2
    options = {"teacher__name": None, "teacher__random_weights": None, "teacher__members": members}
    assert main(["train", *tiny(photos_root, tmp_path / "run", **options)]) == 0
    recorded = read_facts(tmp_path / "run")["memory_format"]
    assert recorded is not None
    assert recorded.keys() == {"teacher 1", "teacher 2"}
    assert all(facts["seconds"].keys() == {"channels_last", "contiguous"} for facts in recorded.values())
    said = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(line.split()) in said for line in memory_format_lines(recorded))


@pytest.mark.usefixtures("on_any_device")
def test_a_resumed_run_and_its_evaluation_keep_the_format_that_it_began_with(
    photos_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: set[bool]
) -> None:
    arguments = tiny(photos_root, tmp_path / "run", train__epochs=2, train__keep_checkpoints=9)
    prefer(monkeypatch, channels_last=False)
    assert main(["train", *arguments]) == 0
    recorded, unbroken = read_facts(tmp_path / "run")["memory_format"], records(tmp_path / "run")
    assert recorded is not None
    assert recorded["teacher"]["channels_last"] is False
    max((tmp_path / "run" / "checkpoints").glob("step-*")).unlink()
    prefer(monkeypatch, channels_last=True)
    asked.clear()
    assert main(["train", *arguments, "--resume", "auto"]) == 0
    assert read_facts(tmp_path / "run")["memory_format"] == recorded
    again = records(tmp_path / "run")
    assert [record.get("loss") for record in again] == [record.get("loss") for record in unbroken]
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert asked == {True}  # NCHW


@pytest.mark.usefixtures("on_any_device")
def test_a_run_that_began_in_channels_last_goes_on_without_a_measurement(photos_root: Path, tmp_path: Path) -> None:
    began = tiny(photos_root, tmp_path / "run", train__epochs=2, train__keep_checkpoints=9, teacher__channels_last=True)
    assert main(["train", *began]) == 0
    unbroken = records(tmp_path / "run")
    max((tmp_path / "run" / "checkpoints").glob("step-*")).unlink()
    assert main(["train", *began, "--teacher.channels_last", "null", "--resume", "auto"]) == 0
    assert read_facts(tmp_path / "run")["memory_format"] is None
    again = records(tmp_path / "run")
    assert [record.get("loss") for record in again] == [record.get("loss") for record in unbroken]


@pytest.mark.usefixtures("on_any_device")
def test_answers_that_are_kept_do_not_depend_on_the_clock(
    photos_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: set[bool]
) -> None:
    prefer(monkeypatch, channels_last=False)
    options = {"teacher__store": tmp_path / "store", "teacher__store_mode": "record"}
    assert main(["train", *tiny(photos_root, tmp_path / "run", **options)]) == 0
    assert read_facts(tmp_path / "run")["memory_format"] is None
    assert asked == {False}
