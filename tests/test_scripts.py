"""The programs behind the figures of docs/evidence/reliability.md, each run for seconds here and for long by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").is_file(), reason="they read memory and open files in /proc"
)


def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, str(REPOSITORY / "scripts" / name), *arguments]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=280)


def test_spoiled_files_are_accepted_or_refused_in_one_line() -> None:
    done = program("fuzz", "--cases", "204", "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\| all +\| 204 \| \d+ \| \d+ \| 0 \|", done.stdout)


def test_neither_memory_nor_open_files_grow_over_a_hundred_steps() -> None:
    done = program("soak", "--steps", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"steps: 105, evaluations: 3; .* open files by -?\d+ ", done.stdout)
