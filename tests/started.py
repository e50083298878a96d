"""train.py in processes of its own: under torchrun, with a fault, or killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers import REPOSITORY

STANDALONE = ("--standalone", "--nproc-per-node", "2")
KEEP_ALIVE = "keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=120,is_host="


def launched(
    arguments: list[str], said: Path, launcher: tuple[str, ...] = STANDALONE, fault: str | None = None
) -> subprocess.Popen[bytes]:
    """Start ``torchrun train.py``, with a fault in one process where `fault` says so (see faulty.py)."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher]
    several_machines = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if "--nnodes" in launcher else {}
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    with open(said, "a") as output:
        return subprocess.Popen(
            [*command, "train.py" if fault is None else "tests/faulty.py", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": paths, "FAULT": fault or "", **several_machines},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def torchrun(arguments: list[str], said: Path, launcher: tuple[str, ...] = STANDALONE, fault: str | None = None) -> int:
    """Run ``torchrun train.py`` on two processes; return its exit code."""
    process = launched(arguments, said, launcher, fault)
    try:
        return process.wait(250)
    finally:
        kill_family(process.pid)


def kill_family(pid: int) -> None:
    """Kill a process and all that it started, as the loss of a machine does."""
    children = [
        int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
    ]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in children:
        kill_family(child)


# train.py itself, which kills itself before the n-th optimiser step of this process.
KILLED = """
import os, runpy, signal, sys
from torch.optim.optimizer import register_optimizer_step_pre_hook
left, sys.argv[1:] = int(sys.argv[1]), sys.argv[2:]
def count(*_):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
register_optimizer_step_pre_hook(count)
runpy.run_path("train.py", run_name="__main__")
"""


# train.py itself, which kills itself when the n-th checkpoint is written whole and about to get its name.
KILLED_IN_A_WRITE = """
import os, runpy, signal, sys
left, sys.argv[1:] = int(sys.argv[1]), sys.argv[2:]
def watch(event, given):
    global left
    if event == "os.rename" and ".step-" in str(given[0]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
runpy.run_path("train.py", run_name="__main__")
"""


def kill(arguments: list[str], before_step: int, said: Path, program: str = KILLED) -> None:
    """Run `program`, which kills itself before step (or checkpoint) `before_step`."""
    command = [sys.executable, "-c", program, str(before_step), *arguments]
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    with open(said, "w") as output:  # no pipe: the workers would hold it open for seconds after the kill
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": paths},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=200,
        )
    assert done.returncode == -signal.SIGKILL, said.read_text()
