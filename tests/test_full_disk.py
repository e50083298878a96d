"""A full disk, a read-only folder, a limit of file sizes: one line, and nothing that was good is damaged."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deit_kd.cli import main
from deit_kd.exports import FORMATS, missing_libraries
from deit_kd.interfaces import InputError
from deit_kd.origins import open_origin
from tests.helpers import (
    CLASSES,
    Finished,
    assert_same_end,
    copied,
    newest_two,
    refused,
    snapshot,
    tiny,
)
from tests.tiny_parts import save_student, seen_at, tiny_student


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes: what writes more, fails half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit_ends_the_run_and_costs_nothing(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*copied(finished, tmp_path), "--data.workers", "0"]  # workers' shared memory has the limit, too
    run = tmp_path / "run"
    (run / "heads.json").unlink()
    older, newest = newest_two(run)
    newest.unlink()
    good = older.read_bytes()
    with largest_file(40_000):
        line = refused(["train", *arguments], capsys)
    assert "File too large; raise the file size limit (ulimit -f)" in line
    assert str(run) in line
    assert newest_two(run) == [older]
    assert older.read_bytes() == good
    assert main(["train", *arguments]) == 0
    assert_same_end(finished, tmp_path)


def test_a_store_that_does_not_fit_keeps_what_it_has(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"teacher__store_top": 3, "distill__kind": "soft", "augment__repeats": 1, "train__epochs": 2}
    recipe = tiny(photos_root, tmp_path / "unused", **options)
    build = ["store", "build", "--store", str(tmp_path / "store"), *recipe]
    assert main([*build, "--epochs", "1"]) == 0
    before = snapshot(tmp_path / "store")
    with largest_file(700):
        assert "cannot be written (File too large)" in refused(build, capsys)
    assert {name: content for name, content in snapshot(tmp_path / "store").items() if name in before} == before
    assert main(build) == 0
    assert (tmp_path / "store/epoch-00001.safetensors").is_file()


@pytest.mark.parametrize("format_name", list(FORMATS))
def test_an_export_that_does_not_fit_leaves_nothing(
    format_name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing_libraries(format_name):
        pytest.skip(f"{format_name} needs {missing_libraries(format_name)}")
    with largest_file(20_000):
        refused(["export", str(runs / "distilled"), "--format", format_name, "--to", str(tmp_path / "out")], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["eval", "report"])
def test_a_new_folder_whose_first_file_does_not_fit_is_removed_again(
    verb: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with largest_file(30):
        refused([verb, str(runs / "plain"), "--to", str(tmp_path / "new/to")], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "RUN"],
        ["eval", "RUN", "--split", "validation"],
        ["predict", "RUN", "PHOTO", "--csv", "RUN/table.csv"],
        ["plot", "RUN"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_written_again_and_does_not_fit_stays_as_it_was(
    arguments: list[str], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "distilled", tmp_path / "run")
    photo = next((runs / "photos/validation/apple").iterdir())
    filled = [text.replace("RUN", str(run)).replace("PHOTO", str(photo)) for text in arguments]
    assert main(filled) == 0
    before = snapshot(run)
    with largest_file(30):
        refused(filled, capsys)
    assert snapshot(run) == before


def test_a_student_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    save_student(tiny_student(seed=0), tmp_path / "student", CLASSES, seen_at(16))
    before = snapshot(tmp_path)
    with largest_file(20_000), pytest.raises(InputError, match="cannot be written"):
        save_student(tiny_student(seed=1), tmp_path / "student", CLASSES, seen_at(16))
    assert snapshot(tmp_path) == before
    assert open_origin("key", tmp_path / "student").state


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root mounts a small tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_ends_the_run_with_one_line(
    small_disk: Path, photos_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["train", *tiny(photos_root, small_disk / "run", distill__kind="none")], capsys)
    assert "No space left on device; free space, or name another folder" in line
    assert not [name for name in snapshot(small_disk) if name.endswith(".partial")]


def test_a_disk_that_fills_up_while_a_student_is_saved_keeps_the_one_before(small_disk: Path) -> None:
    save_student(tiny_student(seed=0), small_disk / "student", CLASSES, seen_at(16))
    before = snapshot(small_disk)
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 20_000))
    with pytest.raises(InputError, match="cannot be written"):
        save_student(tiny_student(seed=1), small_disk / "student", CLASSES, seen_at(16))
    (small_disk / "filler").unlink()
    assert snapshot(small_disk) == before


def test_a_read_only_disk_is_refused_before_anything_is_done(
    small_disk: Path, photos_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    run = small_disk / "new" / "run"
    assert f"output: {run} cannot be written" in refused(["train", *tiny(photos_root, run)], capsys)
    findings = ["data", "check", str(photos_root), "--json", str(small_disk / "x")]
    assert f"--json: {small_disk} cannot be written" in refused(findings, capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written" in refused(["train", *tiny(photos_root, tmp_path / "locked/run")], capsys)
    assert list((tmp_path / "locked").iterdir()) == []
