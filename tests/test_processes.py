"""Two processes are the same run as one, whatever happens to one of them, and under torchrun."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from deit_kd.cli import main
from tests.forked import faulty, run_on_two, wait_for
from tests.helpers import FULL, Finished, heads_in, records, tiny
from tests.started import KEEP_ALIVE, kill_family, launched

# One epoch with everything random but drop-path, whose seed names the process.
SHARED = {
    "data__workers": 1,
    "augment__auto_augment": "rand-m9-mstd0.5-inc1",
    "augment__repeats": 2,
    "distill__kind": "soft",
    "distill__temperature": 1.0,  # its square scales the rounding of a small divergence
    "train__accumulation_steps": 2,
    "train__ema_decay": 0.9,
    "optim__clip_grad_norm": 1.0,
}


def shared(finished: Finished, photos_root: Path, output: Path, **options: Any) -> list[str]:
    teacher = {"teacher__random_weights": None, "teacher__checkpoint": str(next(finished.teachers.iterdir()))}
    return tiny(photos_root, output, **{**SHARED, **teacher, **options})


@pytest.fixture(scope="module")
def one_and_two(finished: Finished, photos_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("processes")
    assert main(["train", *shared(finished, photos_root, home / "one")]) == 0
    run_on_two(["train", *shared(finished, photos_root, home / "two", data__cache="memory")], home / "said.txt")
    return home / "one", home / "two"


def assert_same_losses(one: Path, two: Path) -> None:
    steps_of_one, steps_of_two = (
        [record for record in records(folder) if record["kind"] == "step"] for folder in (one, two)
    )
    assert len(steps_of_one) == len(steps_of_two) == 6
    for here, there in zip(steps_of_one, steps_of_two, strict=True):
        for term in ("loss", "classification", "distillation", "lr"):
            assert here[term] == pytest.approx(there[term], rel=1e-5)


def test_two_processes_give_the_losses_of_one(one_and_two: tuple[Path, Path]) -> None:
    assert_same_losses(*one_and_two)


def test_two_processes_give_the_losses_of_one_on_views_that_the_device_makes(
    finished: Finished, photos_root: Path, tmp_path: Path
) -> None:
    options = {"data__executor": "device", "data__cache": "device"}
    assert main(["train", *shared(finished, photos_root, tmp_path / "one", **options)]) == 0
    run_on_two(["train", *shared(finished, photos_root, tmp_path / "two", **options)], tmp_path / "said.txt")
    assert_same_losses(tmp_path / "one", tmp_path / "two")


def test_two_processes_count_what_one_counts(one_and_two: tuple[Path, Path]) -> None:
    one, two = map(heads_in, one_and_two)
    assert one["n"] == two["n"] == 21
    assert one["agreement"] == two["agreement"]
    assert one["teacher"]["top1"] == two["teacher"]["top1"]
    for head in ("cls", "dist", "fused"):
        assert one["heads"][head]["top1"] == two["heads"][head]["top1"]
        assert one["heads"][head]["nll"] == pytest.approx(two["heads"][head]["nll"], rel=1e-5)


def test_two_processes_fit_a_teacher_and_go_on_where_they_were_cut(photos_root: Path, tmp_path: Path) -> None:
    options = {**FULL, "data__workers": 0, "teacher__fit__folder": str(tmp_path / "teachers")}
    arguments = ["train", *tiny(photos_root, tmp_path / "run", **options), "--resume", "auto"]
    run_on_two(arguments, tmp_path / "said.txt")
    before, written = heads_in(tmp_path / "run"), records(tmp_path / "run")
    (tmp_path / "run" / "heads.json").unlink()
    max((tmp_path / "run" / "checkpoints").glob("step-*")).unlink()
    run_on_two(arguments, tmp_path / "said.txt")
    assert (heads_in(tmp_path / "run"), records(tmp_path / "run")) == (before, written)


@pytest.mark.parametrize("step", [2, 6], ids=["within the epoch", "at its end, before it is scored"])
def test_a_signal_to_one_process_stops_both_and_one_process_goes_on(
    one_and_two: tuple[Path, Path], finished: Finished, photos_root: Path, tmp_path: Path, step: int
) -> None:
    arguments = ["train", *shared(finished, photos_root, tmp_path / "run"), "--resume", "auto"]
    assert faulty(arguments, tmp_path / "said.txt", f"term:1:{step}") == [143, 143]
    said = (tmp_path / "said.txt").read_text()
    assert said.count("stopped by SIGTERM; the checkpoint of step ") == 1, said
    assert not (tmp_path / "run" / "heads.json").exists()
    assert main(arguments) == 0
    assert_same_losses(one_and_two[0], tmp_path / "run")


def test_a_killed_process_ends_the_other_and_the_run_goes_on_where_it_was_saved(
    one_and_two: tuple[Path, Path], finished: Finished, photos_root: Path, tmp_path: Path
) -> None:
    options = {"train__checkpoint_every_steps": 2, "resume": "auto"}
    arguments = ["train", *shared(finished, photos_root, tmp_path / "run", **options)]
    assert faulty(arguments, tmp_path / "said.txt", "kill:1:4") == [1, -signal.SIGKILL]
    run_on_two(arguments, tmp_path / "said.txt")
    assert "continued from step 2" in (tmp_path / "said.txt").read_text()
    assert_same_losses(one_and_two[0], tmp_path / "run")


def test_a_process_that_stalls_stops_the_others(finished: Finished, photos_root: Path, tmp_path: Path) -> None:
    arguments = ["train", *shared(finished, photos_root, tmp_path / "run", train__timeout_seconds=8)]
    assert faulty(arguments, tmp_path / "said.txt", "stall:1:3") == [1, 1]
    said = (tmp_path / "said.txt").read_text()
    assert "error: process 1 has made no progress for 8 s; all stop, the last checkpoint is kept" in said, said


def test_a_bad_gradient_of_one_process_is_left_out_on_both(
    finished: Finished, photos_root: Path, tmp_path: Path
) -> None:
    arguments = ["train", *shared(finished, photos_root, tmp_path / "run")]
    assert faulty(arguments, tmp_path / "said.txt", "nan:1:4") == [0, 0], (tmp_path / "said.txt").read_text()
    written = records(tmp_path / "run")
    assert [record["bad_steps"] for record in written if record["kind"] == "step"] == [0, 1, 0, 0, 0, 0]
    (bad,) = [record for record in written if record["kind"] == "bad_step" and len(record["views"]) == 1]
    assert (bad["step"], bad["process"], bad["loss"]) == (2, 1, "nan")


def test_a_machine_that_is_lost_comes_back_and_the_run_ends_as_if_it_had_not_been(
    one_and_two: tuple[Path, Path], finished: Finished, photos_root: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = shared(finished, photos_root, tmp_path / "run", train__checkpoint_every_steps=2, resume="auto")
    launcher: tuple[str, ...] = ("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "run")
    launcher += (
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{port}",
        "--local-addr",
        "localhost",
        "--rdzv-conf",
    )
    on_host, on_other = (*launcher, KEEP_ALIVE + "true"), (*launcher, KEEP_ALIVE + "false")
    said = [tmp_path / "host.txt", tmp_path / "other.txt"]
    # Process 1 waits in its third step until its machine is lost, on whichever machine it is.
    host = launched(arguments, said[0], on_host, "wait:1:3")
    other = launched(arguments, said[1], on_other, "wait:1:3")
    try:
        wait_for(lambda: any("waiting in step 3" in file.read_text() for file in said))
        kill_family(other.pid)
        other.wait()
        other = launched(arguments, said[1], on_other)
        assert host.wait(200) == 0, said[0].read_text()
    finally:
        for machine in (host, other):
            kill_family(machine.pid)
            machine.wait()
    assert "continued from step 2" in said[0].read_text() + said[1].read_text()
    assert_same_losses(one_and_two[0], tmp_path / "run")
