"""Signals, stalls, lost processes and steps without a finite gradient: a run stops in order, and goes on as it was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from deit_kd.cli import main
from deit_kd.interfaces import TeacherOutput
from deit_kd.students import TimmStudent
from deit_kd.teachers import FrozenTeacher
from tests.forked import one
from tests.helpers import (
    FIT_STEPS,
    Finished,
    assert_same_end,
    elsewhere,
    newest_two,
    records,
    refused,
    signal_in_step,
    tiny,
)
from tests.started import stopped_job

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}


@contextmanager
def signal_in_evaluation(number: int) -> Iterator[None]:
    """Send a signal to this process when a student is asked about a batch for the first time in eval."""
    sent = False

    def look(module: nn.Module, inputs: Any) -> None:
        nonlocal sent
        evaluating = isinstance(module, TimmStudent) and not module.training and bool(inputs[0].any())
        if evaluating and not sent:  # and not built, when a blank image is shown
            sent = True
            os.kill(os.getpid(), number)

    hook = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def last_step(folder: Path) -> int:
    return int(newest_two(folder)[-1].stem.removeprefix("step-"))


@pytest.mark.parametrize("number", CODES, ids=lambda number: signal.Signals(number).name)
def test_a_signal_ends_the_step_and_writes_a_checkpoint(
    number: signal.Signals, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, handler = [*elsewhere(finished, tmp_path), "--resume", "auto"], signal.getsignal(number)
    with signal_in_step(number, FIT_STEPS + 3):
        assert main(["train", *arguments]) == CODES[number]
    assert last_step(tmp_path / "run") == 3  # checkpoints are due at steps 2 and 4
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"stopped by {number.name}; the checkpoint of step 3 is in ")
    assert not (tmp_path / "run" / "heads.json").exists()
    assert signal.getsignal(number) == handler
    assert main(["train", *arguments]) == 0
    assert_same_end(finished, tmp_path)


def test_a_signal_in_the_teachers_fit_is_heard_too(finished: Finished, tmp_path: Path) -> None:
    arguments = [*elsewhere(finished, tmp_path), "--resume", "auto"]
    with signal_in_step(signal.SIGTERM, 3):
        assert main(["train", *arguments]) == 143
    assert last_step(next((tmp_path / "teachers").iterdir())) == 3
    assert main(["train", *arguments]) == 0
    assert_same_end(finished, tmp_path)


def test_a_signal_in_an_evaluation_ends_it_and_the_epoch_is_scored_on_resume(
    finished: Finished, tmp_path: Path
) -> None:
    arguments = [*elsewhere(finished, tmp_path), "--resume", "auto", "--evaluate.batch_size", "4"]
    with signal_in_evaluation(signal.SIGTERM):
        assert main(["train", *arguments]) == 143
    fit = next((tmp_path / "teachers").iterdir())
    assert [record for record in records(fit) if record["kind"] == "epoch"] == []
    assert main(["train", *arguments]) == 0
    kinds = [(record["kind"], record["step"]) for record in records(fit)]
    assert kinds == [(record["kind"], record["step"]) for record in records(next(finished.teachers.iterdir()))]


def test_a_signal_while_a_finished_run_is_scored_again_changes_no_score(finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    before = (folder / "heads.json").read_text()
    arguments = [*finished.arguments, "--output", str(folder), "--resume", "auto"]
    with signal_in_evaluation(signal.SIGTERM):
        assert main(["train", *arguments]) == 143
    assert (folder / "heads.json").read_text() == before


def test_a_second_interrupt_ends_at_once(photos_root: Path, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        print("still here")

    def act() -> int:
        register_optimizer_step_pre_hook(interrupt)
        return main(["train", *tiny(photos_root, tmp_path / "run", distill__kind="none")])

    assert one(act, tmp_path / "said.txt") == 130
    assert "still here" not in (tmp_path / "said.txt").read_text()


def test_an_interrupt_before_training_is_one_line(photos_root: Path, tmp_path: Path) -> None:
    interrupted = "import os, signal, sys; from deit_kd.cli import VERBS, main; VERBS['plot'] = ('', lambda _: os.kill("
    interrupted += "os.getpid(), signal.SIGINT)); sys.exit(main(['plot']))"
    done = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (130, "stopped by SIGINT; what was finished is kept\n")


ENDING = """
import atexit, os, signal, sys
from deit_kd import cli
def stop():
    os.kill(os.getpid(), signal.SIGTERM)
def verb(_):
    try:
        stop()
    finally:
        stop()
cli.VERBS["plot"] = ("", verb)
atexit.register(stop)
sys.exit(cli.main(["plot"]))
"""


def test_a_second_sigterm_while_the_first_ends_the_program_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM; what was finished is kept\n")


@contextmanager
def poison(steps: set[int]) -> Iterator[None]:
    """Let the student's third view of these steps (from 1) be not a number."""
    step = 0

    def spoil(module: nn.Module, inputs: Any) -> Any:
        nonlocal step
        if isinstance(module, TimmStudent) and module.training:
            step += 1
            if step in steps:
                images = inputs[0].clone()
                images[2] = torch.nan
                return (images,)
        return None

    hook = register_module_forward_pre_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


def test_bad_steps_are_left_out_counted_and_named(photos_root: Path, tmp_path: Path) -> None:
    arguments = tiny(photos_root, tmp_path / "run", distill__kind="soft", train__log_every_steps=3)
    with poison({2, 3, 5}):
        assert main(["train", *arguments]) == 0
    steps = [record for record in records(tmp_path / "run") if record["kind"] == "step"]
    assert [(record["step"], record["bad_steps"]) for record in steps] == [(3, 2), (6, 1)]
    assert all(record["loss"] > 0 for record in steps)
    bad = [record for record in records(tmp_path / "run") if record["kind"] == "bad_step"]
    assert [record["step"] for record in bad] == [2, 3, 5]
    for record in bad:
        assert record["loss"] == record["classification"] == "nan"
        (view,) = record["views"]
        assert (view["epoch"], view["position"]) == (0, 8 * (record["step"] - 1) + 2)
        assert (photos_root / "train" / view["photo"]).is_file()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "3 steps left out because the gradient was not finite" in (tmp_path / "run/report/report.html").read_text()


def test_a_run_gives_up_after_too_many_bad_steps_in_a_row(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny(photos_root, tmp_path / "run", distill__kind="none", train__max_bad_steps=3, train__epochs=2)
    with poison({2, 3, 5, *range(9, 13)}):
        said = refused(["train", *arguments], capsys)
    assert "train: the last 3 steps had no finite gradient and were left out" in said
    assert last_step(tmp_path / "run") == 6
    assert records(tmp_path / "run")[-1]["step"] == 11
    assert main(["train", *arguments, "--resume", "auto"]) == 0


@contextmanager
def speechless(steps: set[int]) -> Iterator[None]:
    """Let the teacher's answer to the third view of these steps (from 1) be not a number."""
    step = 0

    def spoil(module: nn.Module, inputs: Any, answer: TeacherOutput) -> Any:
        nonlocal step
        if isinstance(module, FrozenTeacher) and inputs[0].view_ids is not None:
            step += 1
            if step in steps:
                logits = answer.logits.clone()
                logits[2, 1] = torch.nan
                return answer._replace(logits=logits)
        return None

    hook = register_module_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


def test_answers_of_the_teacher_that_are_not_finite_are_counted_and_teach_nothing(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with speechless({2, 3, 5}):
        assert main(["train", *tiny(photos_root, tmp_path / "run", train__log_every_steps=3)]) == 0
    steps = [record for record in records(tmp_path / "run") if record["kind"] == "step"]
    assert [(record["teacher_not_finite"], record["bad_steps"]) for record in steps] == [(2, 0), (1, 0)]
    assert "2 teacher answers not finite" in capsys.readouterr().out


def test_a_run_gives_up_on_a_teacher_whose_answers_are_not_finite(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny(photos_root, tmp_path / "run", train__max_bad_steps=3, train__epochs=2)
    with speechless({1, 2, 4, 5, 6, 7}):
        said = refused(["train", *arguments], capsys)
    assert "teacher: each of the last 3 steps had an answer that was not finite" in said
    assert records(tmp_path / "run")[-1]["step"] == 6


SRUN = """#!/bin/bash
echo "$@" > srun.txt
trap 'echo heard > heard.txt; exit 1' USR1
for _ in $(seq 200); do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo node-1 || echo "$@" > requeued.txt
"""


def test_the_slurm_example_hands_the_signal_on_and_puts_the_job_back(tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_NAME": "kd"}
    programs = {"srun": SRUN, "scontrol": SCONTROL}
    assert stopped_job("slurm.sbatch", tmp_path, programs, "srun.txt", **slurm, DATA="photos") == 1
    assert (tmp_path / "heard.txt").read_text() == "heard\n"
    assert (tmp_path / "requeued.txt").read_text() == "requeue 7\n"
    arguments = (tmp_path / "srun.txt").read_text().split()
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "node-1:29500"
