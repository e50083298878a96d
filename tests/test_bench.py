"""The bench times every part in turns, each as it is labelled, and writes nothing but what it was asked for."""

from __future__ import annotations

import json
import platform
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.jobs.bench import Clock, as_timm_gives_it
from deit_kd.machine import cpu_kind
from deit_kd.runs.lesson import Lesson
from deit_kd.runs.run import prepare
from deit_kd.store import LabelStore
from tests.helpers import ONE_PROCESS, STUDENT, Finished, refused, tiny

QUICK = ["--rounds", "2", "--steps", "1", "--photos", "8"]
LOOPS = {"loop, no teacher", "loop, teacher online", "loop, label store"}
PARTS = {"student's step", "student's step as timm gives it", "loader"}


def benched(root: Path, place: Path, *more: str, **options: Any) -> Any:
    """Return the numbers of a bench of seconds."""
    arguments = [*tiny(root, place / "run", **options), *QUICK, *more, "--json", str(place / "numbers.json")]
    assert main(["bench", *arguments]) == 0
    return json.loads((place / "numbers.json").read_text())


def test_every_part_and_every_loop_is_timed_in_every_round(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"distill__kind": "soft", "train__accumulation_steps": 2, "data__workers": 1}
    found = benched(photos_root, tmp_path, **options)
    assert set(found["rates"]) == LOOPS | PARTS | {"teacher's answer"}
    assert all(len(rates) == 2 and min(rates) > 0 for rates in found["rates"].values())
    assert found["epoch_seconds"].keys() == LOOPS
    assert min(found["peak_memory"].values()) > 0
    said = capsys.readouterr().out
    assert "| loop, label store / loop, teacher online" in said
    assert "an epoch of 48 views" in said
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


def test_the_loop_with_a_store_reads_it_ahead_as_a_run_does(
    photos_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_where: list[str] = []
    find = LabelStore.find

    def noting(store: LabelStore, *asked: Any, **named: Any) -> Any:
        asked_where.append(threading.current_thread().name)
        return find(store, *asked, **named)

    monkeypatch.setattr(LabelStore, "find", noting)
    benched(photos_root, tmp_path, train__accumulation_steps=2)
    assert asked_where.count("MainThread") == 2  # each part runs once on batches in memory
    assert len(asked_where) > 8


def test_without_a_teacher_there_is_one_loop(photos_root: Path, tmp_path: Path) -> None:
    found = benched(photos_root, tmp_path, distill__kind="none")
    assert set(found["rates"]) == PARTS | {"loop, no teacher"}
    assert set(found["ratios"]) == {
        "loop, no teacher / student's step",
        "student's step / student's step as timm gives it",
    }


def test_the_first_line_names_the_networks_that_teach(
    finished: Finished, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"teacher__name": None, "teacher__random_weights": None, "teacher__checkpoint": finished.folder}
    guide = {"guide__name": "test_resnet", "guide__random_weights": True, "data__image_size": 32}
    for options, named in (
        (run, f"teacher {STUDENT}, "),
        ({**run, "teacher__name": "resnet50"}, f"teacher {STUDENT}, "),
        ({**guide, "distill__kind": "none", "distill__terms": [{"kind": "guide"}]}, "guide test_resnet, "),
    ):
        benched(photos_root, tmp_path, **{"teacher__min_top1": 0, **options})
        assert f"{STUDENT}, {options.get('data__image_size', 16)} px, {named}batch 8" in capsys.readouterr().out


def test_what_no_store_can_keep_is_timed_online_alone(photos_root: Path, tmp_path: Path) -> None:
    options = {"teacher__image_size": 64, "distill__terms": [{"kind": "dense", "mode": "soft"}]}
    found = benched(photos_root, tmp_path, **options)
    assert LOOPS & found["rates"].keys() == LOOPS - {"loop, label store"}


def test_a_store_that_the_recipe_names_is_left_alone(photos_root: Path, tmp_path: Path) -> None:
    options = {"teacher__store": str(tmp_path / "store"), "teacher__store_mode": "record"}
    assert benched(photos_root, tmp_path, **options)["rates"].keys() >= LOOPS
    assert not (tmp_path / "store").exists()


def test_a_share_is_the_rate_over_that_of_its_floors_parts_in_turn() -> None:
    clock = Clock(torch.device("cpu"))
    clock.rates = {"loop": [50.0, 40.0], "step": [100.0, 100.0], "answer": [100.0, 25.0]}
    found = clock.ratios([("loop", ("step", "answer")), ("loop", ("step", "loader"))])
    assert found == {"loop / step + answer": [pytest.approx(1.0), pytest.approx(2.0)]}


def test_timms_step_has_fused_attention_and_a_plain_optimiser(photos_root: Path, tmp_path: Path) -> None:
    config, _ = parse_config(tiny(photos_root, tmp_path / "run"))
    run = prepare(config, ONE_PROCESS)
    timms = as_timm_gives_it(run, Lesson())
    for trainer_model, optimizer, fused in (
        (timms.student.model, timms.student.optimizer, True),
        (run.student, run.optimizer, False),
        (prepare(config, ONE_PROCESS).student, None, False),  # the choice does not outlive it
    ):
        attention = [module.fused_attn for module in trainer_model.modules() if hasattr(module, "fused_attn")]
        assert attention
        assert set(attention) == {fused}
        assert optimizer is None or optimizer.defaults["fused"] is not fused


@pytest.mark.parametrize("option", [("--rounds", "0"), ("--steps", "0")])
def test_nothing_to_time_is_refused(
    photos_root: Path, tmp_path: Path, option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "must be above 0" in refused(["bench", *tiny(photos_root, tmp_path / "run"), *option], capsys)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", "AMD EPYC (AVX-512 bf16)"),
        ("model name\t: Intel(R) Xeon(R)\nflags\t\t: avx512f avx512_bf16 amx_bf16\n", "Intel(R) Xeon(R) (AMX)"),
        ("model name\t: old\nflags\t\t: sse2 avx2x\n", "old"),
        ("Hardware\t: BCM2835\n", platform.machine()),
    ],
)
def test_the_kind_of_a_cpu_is_its_model_and_its_fastest_unit_for_bf16(cpuinfo: str, expected: str) -> None:
    assert cpu_kind(cpuinfo) == expected
