"""Processes that see different disks, or make one another wait: all go on alike, or all stop with one line."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from deit_kd import cli, distributed
from deit_kd.cli import main
from deit_kd.distributed import on_main, process_group
from deit_kd.interfaces import InputError, Stopped
from deit_kd.stopping import Watch
from deit_kd.store import epoch_part
from deit_kd.teaching.store_identity import verify
from tests.forked import two, wait_for
from tests.helpers import records, short, tiny, write_photos
from tests.tiny_parts import begin_store, fill_store


def in_group(act: Callable[[distributed.Processes], int | None], timeout: float = 0.0) -> Callable[[int], int | None]:
    """Return `act` within a process group; what ends it as it ends a command gives that exit code."""

    def member(rank: int) -> int | None:
        try:
            with process_group("cpu", timeout) as processes:
                return act(processes)
        except Stopped as stopped:
            print(stopped, flush=True)
            return stopped.code
        except InputError as error:
            print(f"error: {error}", flush=True)
            return 2

    return member


def test_a_wait_outlasts_the_limit_of_a_collective_and_says_for_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "SECONDS_OF_A_COLLECTIVE", 3.0)
    monkeypatch.setattr(distributed, "SECONDS_BEFORE_A_LINE", 1.0)

    def act(processes: distributed.Processes) -> None:
        on_main(processes, lambda: time.sleep(5), "verifies a store")
        assert processes.gather(processes.rank) == [0, 1]

    assert two(in_group(act, timeout=3), tmp_path / "said.txt") == [0, 0]
    assert "waiting for process 0, which verifies a store (" in (tmp_path / "said.txt").read_text()


def test_a_process_that_does_not_come_and_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    def act(processes: distributed.Processes) -> None:
        if processes.rank:
            time.sleep(4)
        processes.wait()

    assert two(in_group(act, timeout=1), tmp_path / "said.txt") == [1, 1]
    assert "process 1 has made no progress for 1 s" in (tmp_path / "said.txt").read_text()


def test_a_process_that_fails_ends_one_that_waits_for_it(tmp_path: Path) -> None:
    def act(processes: distributed.Processes) -> None:
        if processes.rank:
            raise InputError("this disk is different")
        processes.wait()

    assert two(in_group(act), tmp_path / "said.txt") == [1, 2]
    assert "another process of the run is gone" in (tmp_path / "said.txt").read_text()


@pytest.mark.parametrize(("error", "code"), [(InputError("its own reason"), 2), (ValueError("its own reason"), 1)])
def test_a_process_that_fails_says_why_at_once_though_it_is_owed_a_collective(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "said.txt"

    def verb(_: list[str]) -> int:
        with process_group("cpu") as processes:
            processes.wait()
            if processes.rank:
                dist.all_reduce(torch.zeros(1), async_op=True)
                raise error
            last = time.monotonic() + 5  # while it computes
            while "its own reason" not in said.read_text() and time.monotonic() < last:
                time.sleep(0.05)
            return 0 if time.monotonic() < last else 3

    monkeypatch.setitem(cli.VERBS, "plot", ("", verb))
    assert two(lambda rank: main(["plot"]), said) == [0, code], said.read_text()


def test_a_process_that_waits_in_a_collective_ends_when_the_store_goes_with_another(tmp_path: Path) -> None:
    def act(processes: distributed.Processes) -> int:
        with Watch(processes, 0, 0.0):
            if processes.is_main:  # which holds the store
                wait_for((tmp_path / "waiting").exists)
                os._exit(9)
            (tmp_path / "waiting").touch()
            time.sleep(10)  # as a collective that does not notice
        return 0

    assert two(in_group(act), tmp_path / "said.txt") == [9, 1]
    assert "another process of the run is gone" in (tmp_path / "said.txt").read_text()


def failing(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", [InputError("no"), OSError(28, "No space left on device", "heads.json")], ids=repr)
def test_what_the_main_process_or_its_disk_refuses_ends_all_with_one_line(error: Exception, tmp_path: Path) -> None:
    def act(processes: distributed.Processes) -> int:
        with pytest.raises(type(error)) as told:
            on_main(processes, lambda: failing(error))
        print(str(told.value) == str(error))
        return 2

    assert two(in_group(act), tmp_path / "said.txt") == [2, 2]
    assert (tmp_path / "said.txt").read_text().split() == ["True"]


def test_checksums_of_a_store_are_shared_out(tmp_path: Path) -> None:
    store = begin_store(tmp_path / "store")
    for epoch in range(4):
        fill_store(store, epoch)
    parts = [epoch_part(epoch) for epoch in range(4)]

    def act(processes: distributed.Processes) -> None:
        class Counting(type(store)):  # type: ignore[misc]
            def verify(self, parts: Any) -> None:
                print(processes.rank, *parts, flush=True)
                super().verify(parts)

        verify(Counting(tmp_path / "store"), parts, processes)

    assert two(in_group(act), tmp_path / "said.txt") == [0, 0]
    lines = sorted((tmp_path / "said.txt").read_text().splitlines())
    assert lines == [f"0 {parts[0]} {parts[2]}", f"1 {parts[1]} {parts[3]}"]


def test_one_process_of_a_machine_is_the_first(tmp_path: Path) -> None:
    def act(processes: distributed.Processes) -> None:
        assert sorted(processes.gather(processes.first_of_machine("part"))) == [False, True]

    assert two(in_group(act), tmp_path / "said.txt") == [0, 0]


def shared(root: Path, output: Path, **options: Any) -> list[str]:
    return short(root, output, **{"train__batch_size": 16, "evaluate__batch_size": 8, **options})


@pytest.fixture(scope="module")
def two_trees(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same photos but for one, which is of another size on the second disk."""
    home = tmp_path_factory.mktemp("trees")
    trees = [write_photos(home / str(rank), {"train": 16, "validation": 7}) for rank in range(2)]
    for split in ("train", "validation"):
        shutil.copy(trees[1] / split / "bars/001.png", trees[1] / split / "bars/000.png")
    return trees


@pytest.mark.parametrize("verb", ["train", "store build", "eval"])
def test_photos_that_differ_between_processes_are_refused_before_the_first_view(
    verb: str, two_trees: list[Path], runs: Path, tmp_path: Path
) -> None:
    def act(rank: int) -> int:
        if verb == "eval":
            return main(["eval", str(runs / "distilled"), "--data.root", str(roots[rank]), "--to", str(output)])
        more = ["--store", str(output)] if verb == "store build" else []
        return main([*verb.split(), *shared(roots[rank], output), *more])

    output, roots = tmp_path / "out", two_trees
    if verb == "eval":
        roots = [runs / "photos", tmp_path / "photos"]
        shutil.copytree(roots[0], roots[1])
        shutil.copy(roots[1] / "validation/apple/001.png", roots[1] / "validation/apple/000.png")
    assert two(act, tmp_path / "said.txt") == [2, 2]
    said = (tmp_path / "said.txt").read_text()
    first = "apple/000.png" if verb == "eval" else "bars/000.png"
    assert said.count("error: ") == said.count(f"of process 0 (the first that differs is {first})") == 1, said
    assert "(process 1)" in said
    assert not output.exists()


def newest_first(place: Path) -> list[Path]:
    return sorted((place / "run/checkpoints").glob("step-*"), reverse=True)


def truncate(place: Path) -> None:
    newest_first(place)[0].write_bytes(b"half")


def replace_by_another(place: Path) -> None:
    newest, before = newest_first(place)
    shutil.copy(before, newest)


@pytest.mark.parametrize("spoil", [truncate, replace_by_another, lambda place: newest_first(place)[0].unlink()])
def test_all_processes_go_on_from_the_checkpoint_of_the_main_one_or_none_does(
    spoil: Callable[[Path], None], photos_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", *shared(photos_root, Path("run"), distill__kind="none")]
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    monkeypatch.chdir(tmp_path / "0")
    assert main(arguments) == 0
    shutil.copytree(tmp_path / "0/run", tmp_path / "1/run")
    (tmp_path / "0/run/heads.json").unlink()
    spoil(tmp_path / "1")

    def act(rank: int) -> int:
        os.chdir(tmp_path / str(rank))  # the same name on another disk
        return main([*arguments, "--resume", "auto"])

    assert two(act, tmp_path / "said.txt") == [2, 2]
    said = (tmp_path / "said.txt").read_text()
    newest = newest_first(tmp_path / "0")[0].name
    assert said.count("error: ") == said.count(f"error: resume: run/checkpoints/{newest} is ") == 1, said
    assert "but process 0 resumes from it" in said
    assert "(process 1)" in said
    assert not (tmp_path / "0/run/heads.json").exists()


def test_what_the_main_process_passes_over_is_said_and_passed_over_by_all(
    photos_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0").mkdir()
    monkeypatch.chdir(tmp_path / "0")
    arguments = ["train", *shared(photos_root, Path("run"), distill__kind="none")]
    assert main(arguments) == 0
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    truncate(tmp_path / "0")
    expected = records(tmp_path / "1/run")

    def act(rank: int) -> int:
        os.chdir(tmp_path / str(rank))
        return main([*arguments, "--resume", "auto"])

    assert two(act, tmp_path / "said.txt") == [0, 0], (tmp_path / "said.txt").read_text()
    said = (tmp_path / "said.txt").read_text()
    assert said.count("skipped: run/checkpoints/step-") == 1, said
    assert "continued from step 3" in said
    steps = [record for record in records(tmp_path / "0/run") if record["kind"] == "step"]
    for here, there in zip(steps, (record for record in expected if record["kind"] == "step"), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)


def test_a_full_disk_of_the_main_process_ends_all_with_one_line(photos_root: Path, tmp_path: Path) -> None:
    def act(rank: int) -> int:
        if rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        return main(["train", *shared(photos_root, tmp_path / "run", distill__kind="none")])

    assert two(act, tmp_path / "said.txt") == [2, 2]
    said = (tmp_path / "said.txt").read_text()
    assert said.count("error: ") == 1, said
    assert "File too large; raise the file size limit" in said
    assert "Traceback" not in said


def test_a_disk_that_lets_a_checkpoint_wait_is_waited_for(
    photos_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "SECONDS_BEFORE_A_LINE", 1.0)
    arguments = shared(photos_root, tmp_path / "run", distill__kind="none", train__timeout_seconds=6)
    is_slow = True

    def wait_once(event: str, given: tuple[Any, ...]) -> None:
        nonlocal is_slow
        if is_slow and event == "os.rename" and ".step-" in str(given[0]):
            is_slow = False
            time.sleep(9)

    def act(rank: int) -> int:
        sys.addaudithook(wait_once)  # for the life of this process
        return main(["train", *arguments])

    assert two(act, tmp_path / "said.txt") == [0, 0], (tmp_path / "said.txt").read_text()
    assert "waiting for process 0, which waits for the previous checkpoint" in (tmp_path / "said.txt").read_text()


def test_what_a_resumed_recording_run_still_has_to_ask_beats_the_watch(photos_root: Path, tmp_path: Path) -> None:
    options = {"teacher__store": tmp_path / "store", "teacher__store_mode": "record", "distill__kind": "soft"}
    options |= {"train__epochs": 1, "train__batch_size": 8, "evaluate__batch_size": 2, "train__timeout_seconds": 6}
    options |= {"train__checkpoint_every_steps": 3}
    arguments = ["train", *tiny(photos_root, tmp_path / "run", **options), "--resume", "auto"]
    done = 0

    def die_in_step_five(*_: object) -> None:
        nonlocal done
        done += 1
        if done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    def think(module: nn.Module, inputs: Any) -> None:
        if type(module).__name__ == "ResNet":
            time.sleep(1.5)

    def begin_and_die(rank: int) -> int:
        register_optimizer_step_pre_hook(die_in_step_five)
        return main(arguments)

    def go_on_slowly(rank: int) -> int:
        register_module_forward_pre_hook(think)
        return main(arguments)

    assert two(begin_and_die, tmp_path / "said.txt") == [-9, -9]
    assert two(go_on_slowly, tmp_path / "said.txt") == [0, 0], (tmp_path / "said.txt").read_text()
    assert "continued from step 3" in (tmp_path / "said.txt").read_text()
    assert (tmp_path / "store/epoch-00000.safetensors").is_file()


def test_a_machine_is_what_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of one host are of two machines if the environment says so: each is the first of its own."""

    def act(processes: distributed.Processes) -> None:
        monkeypatch.setenv("DEIT_KD_MACHINE", f"machine {processes.rank}")
        assert processes.of_this_machine() == [processes.rank]
        assert processes.gather(processes.first_of_machine("part")) == [True, True]
        monkeypatch.delenv("DEIT_KD_MACHINE")
        assert processes.of_this_machine() == [0, 1]

    assert two(in_group(act), tmp_path / "said.txt") == [0, 0]
