"""A signal ends the program even where what ran at that moment dropped the exception."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import Dataset

from deit_kd import cli
from deit_kd.cli import main
from deit_kd.data.loader import in_workers
from deit_kd.distributed import process_group
from deit_kd.interrupts import EXIT_CODES
from deit_kd.stopping import Watch
from deit_kd.teachers import FrozenTeacher
from tests.helpers import FIT_STEPS, ONE_PROCESS, Finished, assert_same_end, elsewhere, newest_two, tiny

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class _Loud:
    def __init__(self, number: int) -> None:
        self._number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self._number)


def _in_an_except(number: int) -> None:
    with suppress(BaseException):
        os.kill(os.getpid(), number)


def _in_a_destructor(number: int) -> None:
    _Loud(number)


def _in_a_callback(number: int) -> None:
    one = {0}
    reference = weakref.ref(one, lambda _: os.kill(os.getpid(), number))
    del one
    assert reference() is None


def _as_another_error(number: int) -> None:
    try:
        os.kill(os.getpid(), number)
    except BaseException as error:
        raise cli.InputError("a file is damaged") from error


DROPS = {"except": _in_an_except, "__del__": _in_a_destructor, "callback": _in_a_callback}


def _watch() -> None:
    with Watch(ONE_PROCESS, 0, 0.0):
        pass


def _next_step() -> None:
    Watch(ONE_PROCESS, 0, 0.0).may_go_on(1)


def _process_group() -> None:
    with process_group("cpu"):
        pass


def _busy() -> None:
    with ONE_PROCESS.busy("works"):
        pass


def _busy_over() -> None:
    next(ONE_PROCESS.busy_over("works", [1]))


WORK: dict[str, Callable[[], None]] = {
    "a Watch": _watch,
    "another step": _next_step,
    "a group": _process_group,
    "work": _busy,
    "a batch": _busy_over,
    "the end": lambda: None,
}


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], int]:
    """Return what runs a function as a verb, and returns the exit code."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # what __del__ and callbacks drop

    def run(act: Callable[[], None]) -> int:
        monkeypatch.setitem(cli.VERBS, "plot", ("", lambda _: act()))
        return main(["plot"])

    return run


@pytest.mark.parametrize("number", CODES, ids=lambda number: signal.Signals(number).name)
@pytest.mark.parametrize("drop", DROPS)
def test_a_dropped_signal_ends_the_program_before_more_work_begins(
    drop: str, number: signal.Signals, verb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, begin in WORK.items():
        after: list[str] = []

        def act(begin: Callable[[], None] = begin, after: list[str] = after) -> None:
            DROPS[drop](number)
            begin()
            after.append("more")

        assert verb(act) == CODES[number], name
        assert after == (["more"] if name == "the end" else []), name
        assert capsys.readouterr().err == f"stopped by {number.name}; what was finished is kept\n"


def test_a_signal_that_became_another_error_is_still_a_signal(verb: Any) -> None:
    assert verb(lambda: _as_another_error(signal.SIGTERM)) == 143


def test_a_second_signal_after_a_dropped_one_ends_at_once(verb: Any) -> None:
    after: list[str] = []

    def act() -> None:
        _in_an_except(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        after.append("more")

    assert verb(act) == 130
    assert not after


def test_a_dropped_signal_does_not_end_the_next_program(verb: Any) -> None:
    assert verb(lambda: _in_an_except(signal.SIGTERM)) == 143
    assert verb(lambda: _watch()) == 0


def test_what_a_program_does_while_it_ends_is_not_cut_short(verb: Any) -> None:
    after: list[str] = []

    def act() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            try:
                raise ValueError
            except ValueError:
                os.kill(os.getpid(), signal.SIGTERM)  # another, while another error is handled
                _busy()
            after.append("more")

    assert verb(act) == 143
    assert after == ["more"]


def test_a_signal_after_a_watchs_last_question_is_raised_at_its_end(verb: Any) -> None:
    after: list[str] = []

    def act() -> None:
        with Watch(ONE_PROCESS, 0, 0.0):
            os.kill(os.getpid(), signal.SIGTERM)
        after.append("more")

    assert verb(act) == 143
    assert not after


@pytest.mark.parametrize("number", CODES, ids=lambda number: signal.Signals(number).name)
def test_a_run_does_not_begin_to_train_after_a_signal_that_was_dropped(
    number: signal.Signals, photos_root: Path, tmp_path: Path
) -> None:
    sent: list[int] = []

    def drop(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, FrozenTeacher) and not sent:  # it is scored before the first step
            sent.append(number)
            _in_an_except(number)

    hook = register_module_forward_pre_hook(drop)
    try:
        assert main(["train", *tiny(photos_root, tmp_path / "run", distill__kind="soft")]) == CODES[number]
    finally:
        hook.remove()
    assert sent
    assert not (tmp_path / "run").exists()


@contextmanager
def signal_while_a_checkpoint_is_written(number: int, step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Send a signal to this process while its checkpoint of `step` gets its name for the first time."""
    rename = os.replace
    sent: list[int] = []

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == f"step-{step:09d}.safetensors" and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        yield
    assert sent


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, FIT_STEPS), (signal.SIGINT, 12)], ids=["teacher's last", "student's last"]
)
def test_a_signal_while_the_last_checkpoint_is_written_ends_the_run(
    number: signal.Signals, step: int, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*elsewhere(finished, tmp_path), "--resume", "auto"]
    with signal_while_a_checkpoint_is_written(number, step, monkeypatch):
        assert main(["train", *arguments]) == CODES[number]
    place = next((tmp_path / "teachers").iterdir()) if step == FIT_STEPS else tmp_path / "run"
    assert newest_two(place)[-1].stem == f"step-{step:09d}"
    assert not (place / "heads.json").exists()
    assert main(["train", *arguments]) == 0
    assert_same_end(finished, tmp_path)


class _HitWhileItStarts(Dataset[int]):
    """Sends the worker that it comes to all signals, as a terminal and SLURM do, before the worker can ignore any."""

    def __reduce__(self) -> Any:
        return _HitWhileItStarts, (True,)

    def __init__(self, is_in_worker: bool = False) -> None:
        for number in EXIT_CODES if is_in_worker else ():
            os.kill(os.getpid(), number)

    def __getitem__(self, index: Any) -> int:
        return int(index)


@pytest.mark.usefixtures("start_method")
def test_a_signal_to_a_worker_that_is_still_importing_is_left_to_the_program() -> None:
    multiprocessing.set_start_method("spawn", force=True)
    batches = in_workers(_HitWhileItStarts(), cast(Any, [[3], [4]]), list, workers=1, ahead=1, has_gpu=False)
    assert list(batches) == [[3], [4]]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(EXIT_CODES)
