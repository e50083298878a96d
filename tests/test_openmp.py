"""What is told to OpenMP, and when."""

from __future__ import annotations

import ast
import importlib
import os
from pathlib import Path

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
    first = next(
        node
        for node in ast.parse(Path(deit_kd.__file__).read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    )
    assert isinstance(first, ast.Import)
    assert first.names[0].name == "deit_kd.openmp"
