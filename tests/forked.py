"""Two processes of one group without torchrun and without a second start of Python."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

SECONDS = 200.0


def two(act: Callable[[int], int | None], said: Path) -> list[int]:
    """Let each of two processes `act(rank)`; return their exit codes, negative where one had to be killed.

    What they print goes to `said`; an exception that is not caught is printed there, and its code is 99.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [_child(act, rank, port, said) for rank in range(2)]
    codes: dict[int, int] = {}
    last = time.monotonic() + SECONDS
    while len(codes) < 2:
        for rank, child in enumerate(children):
            if rank not in codes:
                if time.monotonic() > last:
                    os.kill(child, signal.SIGKILL)
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [codes[0], codes[1]]


def _child(act: Callable[[int], int | None], rank: int, port: int, said: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which do nothing here
        pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({key: str(value) for key, value in place.items()})
        sys.stdout = sys.stderr = open(said, "a", buffering=1)  # noqa: SIM115 - until the process ends
        code = act(rank) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
