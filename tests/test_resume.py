"""A run killed at any step and resumed ends, bit for bit, as the run that was never broken off."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deit_kd.checkpoint import BEST, load_checkpoint
from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.runs.run import execute, prepare
from tests.forked import begun, one, wait_for
from tests.helpers import (
    ONE_PROCESS,
    Finished,
    as_arguments,
    assert_same_end,
    before_steps,
    copied,
    elsewhere,
    heads_in,
    newest_two,
    records,
    refused,
    signal_in_step,
    tiny,
)
from tests.started import kill

FIT_STEPS = 8  # optimiser steps of the teacher's fit; the student's 12 come after them


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([6], id="in the teacher's fit"),
        pytest.param([FIT_STEPS + 4], id="between two checkpoints"),
        pytest.param([1, 5, 3 + 9], id="three times: before the first step, in the fit, in the last epoch"),
    ],
)
def test_a_killed_run_ends_as_the_unbroken_one(kills: list[int], finished: Finished, tmp_path: Path) -> None:
    arguments = [*elsewhere(finished, tmp_path), "--resume", "auto"]
    for before_step in kills:
        kill(arguments, before_step, tmp_path / "said.txt")
    assert not (tmp_path / "run" / "heads.json").exists()
    assert main(["train", *arguments]) == 0
    assert_same_end(finished, tmp_path)


def killed_in_a_write(arguments: list[str]) -> int:
    """Train, and be killed when the second checkpoint is written whole and about to get its name."""
    writes = itertools.count(1)

    def watch(event: str, given: Any) -> None:
        if event == "os.rename" and ".step-" in str(given[0]) and next(writes) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return main(["train", *arguments])


def test_a_run_killed_inside_a_checkpoints_write_ends_as_the_unbroken_one(finished: Finished, tmp_path: Path) -> None:
    arguments = copied(finished, tmp_path)
    run = tmp_path / "run"
    (run / "heads.json").unlink()
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.unlink()
    assert one(lambda: killed_in_a_write(arguments), tmp_path / "said.txt") == -signal.SIGKILL
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [".step-000000004.safetensors.partial", "step-000000002.safetensors"]
    assert main(["train", *arguments]) == 0
    assert_same_end(finished, tmp_path)


def test_a_finished_run_that_is_resumed_keeps_its_numbers(finished: Finished, tmp_path: Path) -> None:
    assert main(["train", *copied(finished, tmp_path)]) == 0
    assert_same_end(finished, tmp_path)


def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = copied(finished, tmp_path)
    older, newest = newest_two(tmp_path / "run")
    newest.write_bytes(newest.read_bytes()[:-99])
    (tmp_path / "run" / "heads.json").unlink()
    assert main(["train", *arguments]) == 0
    assert f"continued from step {int(older.stem.removeprefix('step-'))}" in capsys.readouterr().out
    assert_same_end(finished, tmp_path)


def test_workers_and_records_may_change_on_resume(finished: Finished, tmp_path: Path) -> None:
    arguments = copied(finished, tmp_path)
    newest = newest_two(tmp_path / "run")[1]
    newest.unlink()
    assert main(["train", *arguments, "--data.workers", "0", "--train.checkpoint_every_steps", "100"]) == 0
    assert_same_end(finished, tmp_path)


def test_a_run_from_before_photos_had_a_cache_is_resumed(finished: Finished, tmp_path: Path) -> None:
    arguments = copied(finished, tmp_path)
    recipe = tmp_path / "run" / "config.yaml"
    old = recipe.read_text().replace("  cache: none\n", "  in_memory: true\n").replace("  cache_size: null\n", "")
    assert "in_memory" in old
    assert "cache" not in old
    recipe.write_text(old)
    newest_two(tmp_path / "run")[1].unlink()
    assert main(["train", *arguments]) == 0
    assert_same_end(finished, tmp_path)
    assert "cache: none" in recipe.read_text()


def test_the_checkpoint_that_a_run_goes_on_from_does_not_stay_in_memory(photos_root: Path, tmp_path: Path) -> None:
    arguments = [*tiny(photos_root, tmp_path / "run", distill__kind="none", train__epochs=2), "--resume", "auto"]
    assert main(["train", *arguments]) == 0
    newest_two(tmp_path / "run")[1].unlink()
    run = prepare(parse_config(arguments)[0], ONE_PROCESS)
    loaded = [weakref.ref(tensor) for tensor in run.checkpoint["trainer"]["student"].values()]
    alive: list[int] = []
    execute(run, after_epoch=lambda epoch, advance: alive.append(sum(tensor() is not None for tensor in loaded)))
    assert alive == [0]


@pytest.mark.parametrize("left", [["run.json"], [".run.json.partial"], ["run.json", ".config.yaml.partial"], []])
def test_a_run_killed_before_its_first_step_starts_anew(left: list[str], photos_root: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).write_text("{")
    assert main(["train", *tiny(photos_root, tmp_path / "run", distill__kind="none"), "--resume", "auto"]) == 0


def test_records_after_the_checkpoint_are_cut_away(finished: Finished, tmp_path: Path) -> None:
    arguments = copied(finished, tmp_path)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "step", "step": 13, "loss": 0.0}) + '\n{"kind": "st')
    assert main(["train", *arguments]) == 0
    assert_same_end(finished, tmp_path)


def test_a_run_of_other_views_is_not_resumed(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = copied(finished, tmp_path)
    facts = tmp_path / "run" / "run.json"
    facts.write_text(facts.read_text().replace('"views": 2', '"views": 1'))
    said = refused(["train", *arguments], capsys)
    assert "was started with another recipe (views: version 1 in the run, 2 here)" in said


DRAWS, LAST_BLOCK = "drop-path: this run began with another version of its draws", "last block: this run began with an"


@pytest.mark.parametrize(
    ("here", "before", "said"),
    [
        ('"paths": 2', '"paths": 1', DRAWS),
        ('"paths": 2', '"of": 0', DRAWS),
        ('"last_block": 2', '"of": 0', LAST_BLOCK),
    ],
    ids=["older draws", "from before draws had a version", "from before the last block had a version"],
)
def test_a_run_that_an_older_version_began_goes_on_and_says_once_what_differs(
    here: str, before: str, said: str, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = copied(finished, tmp_path)
    facts = tmp_path / "run" / "run.json"
    facts.write_text(facts.read_text().replace(here, before))
    for lines in (1, 0):
        newest_two(tmp_path / "run")[1].unlink()
        assert main(["train", *arguments]) == 0
        assert capsys.readouterr().out.count(said) == lines


def test_other_weights_of_the_teacher_are_not_resumed(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = copied(finished, tmp_path)
    weights = next((tmp_path / "teachers").glob("*/student/model.safetensors"))
    state = load_file(weights)
    state["fc.bias"] += 1e-3
    save_file(state, weights)
    assert "was started with other weights for the teacher" in refused(["train", *arguments], capsys)


def test_resume_auto_without_an_output_goes_on_with_the_newest_run(
    photos_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*tiny(photos_root, Path("x"))[:-2], "--recipe", "mine", "--distill.kind", "none"]
    assert main(["train", *arguments]) == 0
    assert main(["train", *arguments]) == 0
    assert main(["train", *arguments, "--resume", "auto"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mine-1", "mine-2"]
    assert "continued from step 6; writes runs/mine-2" in capsys.readouterr().out


def test_what_a_run_writes_is_its_own_from_the_teachers_fit_on(finished: Finished, tmp_path: Path) -> None:
    arguments, said = elsewhere(finished, tmp_path), tmp_path / "said.txt"
    refused: list[int] = []

    def another(step: int) -> None:
        if not refused:  # while the teacher is being fitted
            refused.append(one(lambda: main(["train", *arguments, "--resume", "auto"]), said))

    with before_steps(another):
        assert main(["train", *arguments]) == 0
    assert refused == [2]
    errors = [line for line in said.read_text().splitlines() if not line.startswith("workers: ")]
    assert len(errors) == 1
    assert "is being written by another run" in errors[0]
    assert_same_end(finished, tmp_path)


def test_a_run_waits_for_the_teacher_that_another_one_fits(finished: Finished, tmp_path: Path) -> None:
    arguments, said, fitting = elsewhere(finished, tmp_path), tmp_path / "said.txt", tmp_path / "fitting"

    def other() -> int:
        wait_for(fitting.exists)
        return main(["train", *arguments, "--output", str(tmp_path / "other")])

    def let_it_come(step: int) -> None:
        fitting.touch()
        wait_for(lambda: "waiting until it is done" in said.read_text())

    another = begun(other, said)  # before the fit: a child shares the locks that its parent holds
    with before_steps(let_it_come):
        assert main(["train", *arguments]) == 0
    assert another.wait() == 0, said.read_text()
    (teacher,) = (tmp_path / "teachers").iterdir()
    assert said.read_text().count(f"teacher: another run is fitting {teacher}; waiting until it is done") == 1
    assert f"teacher: found {teacher}" in said.read_text()
    assert_same_end(finished, tmp_path)
    assert (tmp_path / "other/heads.json").read_bytes() == (tmp_path / "run/heads.json").read_bytes()


def test_a_fit_goes_on_whatever_changes_that_its_name_does_not_stand_for(finished: Finished, tmp_path: Path) -> None:
    arguments = [*elsewhere(finished, tmp_path), "--resume", "auto"]
    with signal_in_step(signal.SIGTERM, 3):
        assert main(["train", *arguments]) == 143
    changed = as_arguments(evaluate__batch_size=5, evaluate__fusion="logits", data__validation_fraction=0.3)
    assert main(["train", *arguments, "--output", str(tmp_path / "other"), *changed]) == 0
    (teacher,) = (tmp_path / "teachers").iterdir()
    expected = next(finished.teachers.iterdir())
    weights = "student/model.safetensors"
    assert (teacher / weights).read_bytes() == (expected / weights).read_bytes()


def test_starting_from_weights_is_not_resuming(finished: Finished, photos_root: Path, tmp_path: Path) -> None:
    options = as_arguments(student__checkpoint=str(finished.folder))
    assert main(["train", *tiny(photos_root, tmp_path / "run"), *options]) == 0
    steps = [record["step"] for record in records(tmp_path / "run") if record["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert torch.isfinite(torch.tensor(records(tmp_path / "run")[0]["loss"]))


def test_epochs_that_are_not_scored_leave_the_same_student(photos_root: Path, tmp_path: Path) -> None:
    ends = []
    for every, scored in ((1, [0, 1, 2]), (2, [1, 2]), (9, [2])):
        output = tmp_path / str(every)
        options = {"train__epochs": 3, "evaluate__every_epochs": every, "distill__kind": "soft"}
        assert main(["train", *tiny(photos_root, output, **options)]) == 0
        ends.append((load_file(output / "student/model.safetensors"), heads_in(output)))
        kinds = [(record["kind"], record["epoch"]) for record in records(output)]
        assert [epoch for kind, epoch in kinds if kind == "epoch"] == scored
        assert (output / "checkpoints/best.safetensors").is_file()
    (weights, heads), *others = ends
    for own_weights, own_heads in others:
        assert all(torch.equal(own_weights[name], tensor) for name, tensor in weights.items())
        assert own_heads == heads


def test_the_best_epoch_can_be_scored_and_started_from(finished: Finished, tmp_path: Path) -> None:
    best = finished.folder / "checkpoints" / BEST
    epochs = [record for record in records(finished.folder) if record["kind"] == "epoch"]
    tops = [record["ema"]["heads"]["fused"]["top1"] for record in epochs]
    assert load_checkpoint(best)["progress"]["step"] == epochs[tops.index(max(tops))]["step"]
    assert main(["eval", str(best), "--to", str(tmp_path / "eval")]) == 0
    scored = heads_in(tmp_path / "eval")
    assert scored["heads"]["fused"]["top1"] == pytest.approx(max(tops))
