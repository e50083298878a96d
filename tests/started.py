"""train.py under torchrun on several machines, and a run that is killed.

A torchrun costs twenty seconds, for it starts Python three times: for what two processes compute see forked.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from deit_kd.cli import main
from tests.faulty import register
from tests.forked import one
from tests.helpers import REPOSITORY

KEEP_ALIVE = "keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=120,is_host="


def launched(
    arguments: list[str], said: Path, launcher: tuple[str, ...], fault: str | None = None
) -> subprocess.Popen[bytes]:
    """Start ``torchrun train.py`` on one of several machines, perhaps with a fault in one process (faulty.py)."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher]
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    with open(said, "a") as output:
        return subprocess.Popen(
            [*command, "train.py" if fault is None else "tests/faulty.py", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": paths, "FAULT": fault or "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stopped_job(script: str, folder: Path, programs: dict[str, str], begun: str, **environment: str) -> int:
    """Run a job script of ``docs/guide`` in `folder`, stop it as SLURM does, and return its exit code.

    `programs`, by name, stand in for those that it calls. SIGUSR1 comes once they have written the file `begun`.
    """
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {**os.environ, **environment, "PATH": f"{folder}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", REPOSITORY / "docs" / "guide" / script], cwd=folder, env=environment)
    while not (folder / begun).exists():
        time.sleep(0.05)
    time.sleep(0.3)
    job.send_signal(signal.SIGUSR1)
    return job.wait(20)


def kill_family(pid: int) -> None:
    """Kill a process and all that it started, as the loss of a machine does."""
    children = [
        int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
    ]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in children:
        kill_family(child)


def kill(arguments: list[str], before_step: int, said: Path) -> None:
    """Train in a process that is killed in the optimiser step `before_step` (from 1), before it changes anything."""

    def act() -> int:
        register(f"kill:0:{before_step}", 0)
        return main(["train", *arguments])

    assert one(act, said) == -signal.SIGKILL, said.read_text()
