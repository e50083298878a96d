"""Processes of their own without a second start of Python, which imports for seconds what is here already.

What is about torchrun itself is in started.py.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from deit_kd.cli import main
from tests.faulty import register

SECONDS = 200.0


@dataclass
class Child:
    """A process that has begun."""

    pid: int
    code: int | None = None  # once it has ended

    def wait(self) -> int:
        """Return its exit code once it has ended, negative where it was killed."""
        if self.code is None:
            (self.code,) = _codes([self.pid])
        return self.code


def run_on_two(arguments: list[str], said: Path) -> None:
    """Run a command, which must succeed, on two processes of one group."""
    assert two(lambda rank: main(arguments), said) == [0, 0], said.read_text()


def faulty(arguments: list[str], said: Path, fault: str) -> list[int]:
    """Run a command on two processes of one group, one of them with a fault (faulty.py); return their exit codes."""

    def act(rank: int) -> int:
        register(fault, rank)
        return main(arguments)

    return two(act, said)


def one(act: Callable[[], int | None], said: Path) -> int:
    """Let another process `act`, as `two` does; return its exit code, negative where it was killed."""
    return begun(act, said).wait()


def begun(act: Callable[[], int | None], said: Path) -> Child:
    """Let another process begin to `act`, as `two` does."""
    return Child(_child(act, {}, said))


def two(act: Callable[[int], int | None], said: Path) -> list[int]:
    """Let each of two processes `act(rank)`; return their exit codes, negative where one had to be killed.

    What they print goes to `said`; an exception that is not caught is printed there, and its code is 99.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return _codes(
        [
            _child(lambda: act(rank), {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}, said)  # noqa: B023
            for rank in range(2)
        ]
    )


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds."""
    last = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < last
        time.sleep(0.05)


def _codes(children: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    last = time.monotonic() + SECONDS
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                if time.monotonic() > last:
                    os.kill(child, signal.SIGKILL)
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [codes[child] for child in children]


def _child(act: Callable[[], int | None], environment: dict[str, str], said: Path) -> int:
    if torch.cuda.is_available():
        pytest.skip("a fork cannot go backward beside CUDA: set CUDA_VISIBLE_DEVICES to nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which do nothing here
        pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.environ.update(environment)
        sys.stdout = sys.stderr = open(said, "a", buffering=1)  # noqa: SIM115 - until the process ends
        code = act() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
