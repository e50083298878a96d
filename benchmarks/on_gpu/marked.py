"""The tests that need a GPU, in a process of their own."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from on_gpu.setup import Point, Setup
from on_gpu.timing import OutOfTime, Row, rounded

REPOSITORY = Path(__file__).resolve().parents[2]
LOG = "gpu-tests.log"
RESULT = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
COUNTED = {"PASSED": "passed", "FAILED": "failed tests", "ERROR": "errors", "SKIPPED": "skipped"}


def points(setup: Setup) -> Iterator[Point]:
    """Yield the one point of this section."""
    yield "pytest -m gpu", lambda: _rows(setup)


def _rows(setup: Setup) -> list[Row]:
    log = setup.output / LOG
    # The repository's own -q takes back one -v.
    command = [sys.executable, "-u", "-m", "pytest", "-m", "gpu", "-n", "0", "-vv", "-rfEs"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    since, ended = time.monotonic(), "all ran"
    with log.open("w") as lines:
        try:
            subprocess.run([*command, setup.tests], cwd=REPOSITORY, stdout=lines, stderr=subprocess.STDOUT, check=False)
        except OutOfTime:  # what has ended by then counts
            ended = "no time left for the others"
    results = RESULT.findall(log.read_text())
    row: Row = {name: sum(result == word for _, result in results) for word, name in COUNTED.items()}
    broken = [name for name, result in results if result in ("FAILED", "ERROR")]
    return [{**row, "seconds": rounded(time.monotonic() - since), "ended": ended, "which failed": ", ".join(broken)}]
