"""What a person may import from the package."""

from __future__ import annotations

import types

import deit_kd


def test_all_names_are_there_sorted_and_once() -> None:
    assert all(hasattr(deit_kd, name) for name in deit_kd.__all__)
    assert deit_kd.__all__ == sorted(set(deit_kd.__all__))


def test_everything_public_is_in_all() -> None:
    public = {
        name
        for name, value in vars(deit_kd).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert public == set(deit_kd.__all__)


def test_public_names_have_docstrings() -> None:
    assert all(getattr(deit_kd, name).__doc__ for name in deit_kd.__all__)


def test_there_is_a_version() -> None:
    assert deit_kd.__version__.count(".") == 2
