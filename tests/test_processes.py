"""Two processes under torchrun are the same run as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deit_kd.cli import main
from tests.conftest import FULL, REPOSITORY, Finished, records, tiny

# One epoch with everything random but drop-path, whose seed names the process.
SHARED = {
    "data__workers": 1,
    "augment__auto_augment": "rand-m9-mstd0.5-inc1",
    "augment__repeats": 2,
    "distill__kind": "soft",
    "distill__temperature": 1.0,  # its square scales the rounding of a small divergence
    "train__accumulation_steps": 2,
    "train__ema_decay": 0.9,
    "optim__clip_grad_norm": 1.0,
}


def torchrun(arguments: list[str], said: Path) -> int:
    """Run ``torchrun --nproc-per-node 2 train.py``; return its exit code."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    with open(said, "w") as output:
        return subprocess.run(
            [*launcher, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": paths},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=250,
        ).returncode


@pytest.fixture(scope="module")
def one_and_two(finished: Finished, photos_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("processes")
    teacher = {"teacher__random_weights": None, "teacher__checkpoint": str(next(finished.teachers.iterdir()))}
    assert main(["train", *tiny(photos_root, home / "one", **SHARED, **teacher)]) == 0
    code = torchrun(tiny(photos_root, home / "two", **SHARED, **teacher), home / "said.txt")
    assert code == 0, (home / "said.txt").read_text()
    return home / "one", home / "two"


def heads(folder: Path) -> Any:
    return json.loads((folder / "heads.json").read_text())


def test_two_processes_give_the_losses_of_one(one_and_two: tuple[Path, Path]) -> None:
    one, two = ([record for record in records(folder) if record["kind"] == "step"] for folder in one_and_two)
    assert len(one) == len(two) == 6
    for here, there in zip(one, two, strict=True):
        for term in ("loss", "classification", "distillation", "lr"):
            assert here[term] == pytest.approx(there[term], rel=1e-5)


def test_two_processes_count_what_one_counts(one_and_two: tuple[Path, Path]) -> None:
    one, two = map(heads, one_and_two)
    assert one["n"] == two["n"] == 21
    assert one["agreement"] == two["agreement"]
    assert one["teacher"]["top1"] == two["teacher"]["top1"]
    for head in ("cls", "dist", "fused"):
        assert one["heads"][head]["top1"] == two["heads"][head]["top1"]
        assert one["heads"][head]["nll"] == pytest.approx(two["heads"][head]["nll"], rel=1e-5)


def test_two_processes_fit_a_teacher_and_go_on_where_they_were_cut(photos_root: Path, tmp_path: Path) -> None:
    options = {**FULL, "data__workers": 0, "teacher__fit__folder": str(tmp_path / "teachers")}
    arguments = [*tiny(photos_root, tmp_path / "run", **options), "--resume", "auto"]
    assert torchrun(arguments, tmp_path / "said.txt") == 0, (tmp_path / "said.txt").read_text()
    before, written = heads(tmp_path / "run"), records(tmp_path / "run")
    (tmp_path / "run" / "heads.json").unlink()
    max((tmp_path / "run" / "checkpoints").glob("step-*")).unlink()
    assert torchrun(arguments, tmp_path / "said.txt") == 0, (tmp_path / "said.txt").read_text()
    assert (heads(tmp_path / "run"), records(tmp_path / "run")) == (before, written)
