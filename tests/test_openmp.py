"""What is told to OpenMP, and when."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

import deit_kd
import deit_kd.openmp


@pytest.mark.parametrize(
    ("given", "then"),
    [({}, deit_kd.openmp.SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing", "the count", "the policy"],
)
def test_threads_spin_for_a_moment_unless_a_person_says_otherwise(
    given: dict[str, str], then: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    importlib.reload(deit_kd.openmp)
    assert os.environ.get("GOMP_SPINCOUNT") == then


def test_it_is_told_before_torch_is_loaded() -> None:
    program = "import deit_kd, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [deit_kd.openmp.SPIN_COUNT, "False"]
