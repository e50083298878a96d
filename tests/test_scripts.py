"""The programs behind the figures of docs/evidence/reliability.md, each run for seconds here and for long by hand."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

from tests.forked import one
from tests.helpers import REPOSITORY

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").is_file(), reason="they read memory and open files in /proc"
)


def script(name: str) -> Any:
    """Return a script as a module."""
    loader = SourceFileLoader(name, str(REPOSITORY / "scripts" / name))
    module = module_from_spec(spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def printed(said: Path, name: str, *arguments: str) -> str:
    """Run a script in a process of its own, which must succeed; return what it prints."""

    def act() -> int:
        warnings.simplefilter("default")
        sys.argv = [name, *arguments]
        return script(name).main()

    assert one(act, said) == 0, said.read_text()
    return said.read_text()


def test_spoiled_files_are_accepted_or_refused_in_one_line(tmp_path: Path) -> None:
    table = printed(tmp_path / "said.txt", "fuzz", "--cases", "204", "--seed", "7")
    assert re.search(r"\| all +\| 204 \| \d+ \| \d+ \| 0 \|", table)


def test_neither_memory_nor_open_files_grow_over_a_hundred_steps(tmp_path: Path) -> None:
    said = printed(tmp_path / "said.txt", "soak", "--steps", "100")
    assert re.search(r"steps: 105, evaluations: 3; .* open files by -?\d+ ", said)


def test_every_mutation_has_its_line_and_its_tests() -> None:
    words = [sys.executable, str(REPOSITORY / "scripts" / "mutate"), "--dry-run"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
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
    assert script("replay").same(before, here) == is_same
