"""What the README promises: its example runs, and its commands name files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

README = REPOSITORY / "README.md"
pytestmark = pytest.mark.skipif(not README.is_file(), reason="there is no README.md")


@pytest.mark.parametrize("page", ["README.md", "docs/guide/distillation.md"])
def test_the_example_of_an_own_loop_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (REPOSITORY / page).read_text().partition("In your own loop")[2]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert example is not None, f"{page} has no python block under 'In your own loop'"
    monkeypatch.chdir(tmp_path)
    exec(compile(example[1], page, "exec"), {"__name__": "readme"})


def test_recipes_that_the_readme_names_are_there() -> None:
    named = re.findall(r"configs/[\w-]+\.yaml", README.read_text())
    assert named
    assert all((REPOSITORY / name).is_file() for name in named)
