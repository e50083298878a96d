"""The fixtures that several test modules share: a tiny image folder, and runs that are finished."""

from __future__ import annotations

import multiprocessing
import os
import tempfile

# Before torch and huggingface_hub are imported: nothing is downloaded, and this process and those that tests
# start compute with the same number of threads, so that their results can be compared bit for bit.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DEIT_KD_CACHE"] = tempfile.mkdtemp(prefix="deit-kd-cache-")  # indexes of large sets; not the user's

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import deit_kd.jobs.train  # noqa: F401 - a verb imports its job when it is called; here its warnings are not tests'
from deit_kd.cli import main
from tests.helpers import FULL, SEVEN_CLASSES, Finished, short, tiny, write_photos

torch.set_num_threads(1)
# Autograd looks for devices in the first backward pass of a process. Later, it would find the CUDA that tensors without
# values (torch.compile, a rehearsal) pretend to have, and start threads; then no fork of the process could go backward.
torch.zeros((), requires_grad=True).mul(2).backward()

# Begin first, or one worker is left alone with them at the end.
SLOWEST = ("test_benchmarks.py", "test_export.py", "test_processes.py", "test_evaluation.py", "test_store_runs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the slowest modules begin first; all others keep their order."""
    order = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def photos_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 21 validation photos of 3 classes."""
    return write_photos(tmp_path_factory.mktemp("photos"), {"train": 16, "validation": 7})


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, photos_root: Path) -> Finished:
    """A run with a fitted teacher, never broken off."""
    home = tmp_path_factory.mktemp("finished")
    arguments = tiny(photos_root, home / "run", **FULL, teacher__fit__folder=str(home / "teachers"))
    assert main(["train", *arguments]) == 0
    return Finished(home / "run", home / "teachers", arguments)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``photos`` and two runs on them: ``distilled``, and ``plain`` without a distillation token."""
    home = tmp_path_factory.mktemp("runs")
    write_photos(home / "photos", {"train": 4, "validation": 5}, SEVEN_CLASSES)
    for name, kind in (("distilled", "hard"), ("plain", "none")):
        assert main(["train", *short(home / "photos", home / name, distill__kind=kind)]) == 0
    return home


@pytest.fixture
def start_method() -> Iterator[None]:
    """The way in which this process starts others, which a test may change."""
    before = multiprocessing.get_start_method()
    yield
    multiprocessing.set_start_method(before, force=True)
