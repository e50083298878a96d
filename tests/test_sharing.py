"""Memory that workers share: how much of it batches in flight may take."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deit_kd import InputError
from deit_kd.cli import main
from deit_kd.data import PREFETCHED, batches_ahead, build_evaluation_loader
from deit_kd.data.loader import _keep_pages_shared
from deit_kd.data.sharing import MEGABYTE
from tests.helpers import refused, tiny
from tests.tiny_parts import array_photos


def with_free(free: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many bytes of shared memory be free; None is a system that does not say."""
    if free is None:
        monkeypatch.setattr("deit_kd.data.sharing.SHARED_MEMORY", Path("/proc/no-folder"))
        return
    fields = list(os.statvfs("/dev/shm"))
    found: Any = os.statvfs_result([fields[0], 1, *fields[2:4], free, *fields[5:]])
    monkeypatch.setattr(os, "statvfs", lambda path: found)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    st.integers(1, 10**7), st.integers(1, 12), st.integers(1, 8), st.none() | st.integers(1, 500), st.integers(0, 10**9)
)
def test_what_is_in_flight_never_exceeds_what_is_allowed(
    batch: int, workers: int, loaders: int, limit: int | None, free: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        with_free(free, patch)
        try:
            ahead = batches_ahead(batch, workers, loaders, limit)
        except InputError:
            assert 2 * batch * workers * loaders > free or limit is not None
            return
    each = (ahead + 1) * workers * batch
    assert ahead >= 1
    assert each * loaders <= free
    assert each <= MEGABYTE * limit < each + workers * batch if limit is not None else ahead <= PREFETCHED


@pytest.mark.parametrize(
    ("free", "limit", "ahead"),
    [(None, None, 2), (6000, None, 2), (5999, None, 1), (4000, None, 1), (None, 1, 523)],
)
def test_each_worker_makes_as_many_batches_ahead_as_fit(
    free: int | None, limit: int | None, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(free, monkeypatch)
    assert batches_ahead(500, workers=4, loaders=1, limit_mb=limit) == ahead


def test_what_does_not_fit_is_one_line_before_a_worker_begins(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(10_000, monkeypatch)
    line = refused(["train", *tiny(photos_root, tmp_path / "run", data__workers=2)], capsys)
    assert line.startswith("error: data.workers: 2 workers of this machine hold ")
    assert "and 10 kB of shared memory are free (/dev/shm); use fewer workers or a smaller batch" in line
    too_little = tiny(photos_root, tmp_path / "run", data__workers=2, data__prefetch_mb=1, data__image_size=256)
    line = refused(["train", *too_little], capsys)
    assert line.startswith("error: data.prefetch_mb: 1 MB do not hold two batches of ")
    assert not (tmp_path / "run").exists()


class Held:
    """A view that says how many MB of this process are its own, after its garbage was collected."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        gc.collect()
        line = next(
            line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if "Private_Dirty" in line
        )
        return torch.full((3, 1, 1), int(line.split()[1]) / 1024)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="needs Linux")
def test_a_worker_does_not_copy_what_it_shares_when_it_collects_garbage() -> None:
    photos = array_photos(6)
    _keep_pages_shared.cache_clear()  # done once in a process, perhaps by another test
    kept = [{"number": str(number)} for number in range(400_000)]  # some 100 MB of objects, as the libraries'
    held = [float(batch.images.max()) for batch in build_evaluation_loader(
        photos, Held(), batch_size=2, rank=0, processes=1, workers=1, pin_memory=False
    )]  # fmt: skip
    assert max(held) < 90  # 150 and more with a copy
    assert len(kept) == 400_000


def test_a_run_says_what_its_workers_hold_and_does_not_depend_on_it(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = []
    for run, limit in (("few", None), ("many", 1)):
        options = {} if limit is None else {"data__prefetch_mb": limit}
        assert main(["train", *tiny(photos_root, tmp_path / run, data__workers=1, **options)]) == 0
        assert "workers: 1 hold up to " in capsys.readouterr().out
        scores.append((tmp_path / run / "heads.json").read_bytes())
    assert scores[0] == scores[1]
