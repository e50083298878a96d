"""The programs behind the figures of docs/evidence/reliability.md, each run for seconds here and for long by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

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


def test_every_mutation_has_its_line_and_its_tests() -> None:
    done = program("mutate", "--dry-run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("before", "here", "is_same"),
    [
        ({"nll": 0.5, "top1": 50.0}, {"nll": 0.5 + 1e-15, "top1": 50.0}, True),
        ({"nll": 0.5}, {"nll": 0.5 + 1e-9}, False),
        ({"top1": 50.0}, {"top1": 50.0 + 1e-14}, False),
        ([{"loss": 1.0}], [{"loss": 1.0}, {"loss": 1.0}], False),
        ({"heads": {"dist": None}}, {"heads": {"dist": None}}, True),
        ({"heads": {"dist": None}}, {"heads": {}}, False),
        (b"weights", b"weightz", False),
    ],
)
def test_a_replay_forgives_nothing_but_the_last_digits_of_a_likelihood(before: Any, here: Any, is_same: bool) -> None:
    loader = SourceFileLoader("replay", str(REPOSITORY / "scripts/replay"))
    replay = module_from_spec(spec_from_loader("replay", loader))
    loader.exec_module(replay)
    assert replay.same(before, here) == is_same
