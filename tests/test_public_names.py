"""What a person may import from the package, and a test module from the others."""

from __future__ import annotations

import ast
import types
from pathlib import Path

import pytest

import deit_kd


def test_all_names_are_there_sorted_and_once() -> None:
    assert all(hasattr(deit_kd, name) for name in deit_kd.__all__)
    assert deit_kd.__all__ == sorted(set(deit_kd.__all__))


def test_everything_public_is_in_all() -> None:
    public = {
        name
        for name in dir(deit_kd)
        if not name.startswith("_") and not isinstance(getattr(deit_kd, name), types.ModuleType)
    }
    assert public == set(deit_kd.__all__)


def test_a_type_checker_sees_what_is_opened_late() -> None:
    branch = next(node for node in ast.parse(Path(deit_kd.__file__).read_text()).body if isinstance(node, ast.If))
    imports = [node for node in branch.body if isinstance(node, ast.ImportFrom)]
    seen = {name.name: f"{node.module}" for node in imports for name in node.names}
    assert seen == {name: f"deit_kd.{room}" for room, names in deit_kd._ROOMS.items() for name in names}
    assert seen.keys() == set(deit_kd.__all__)


def test_another_name_is_not_there() -> None:
    with pytest.raises(AttributeError, match="'distil'"):
        deit_kd.distil  # noqa: B018 - the access is what is refused


def test_public_names_have_docstrings() -> None:
    assert all(getattr(deit_kd, name).__doc__ for name in deit_kd.__all__)


def test_there_is_a_version() -> None:
    assert deit_kd.__version__.count(".") == 2


def test_no_module_imports_a_test_module() -> None:
    nodes = [node for module in Path(__file__).parent.glob("*.py") for node in ast.walk(ast.parse(module.read_text()))]
    imported = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    assert not [name for name in imported if name.startswith(("tests.test_", "tests.conftest"))]
