"""Photos decoded once: the same photos, in memory that they fit into and that other processes see."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from PIL import Image

from deit_kd import InputError
from deit_kd.cli import main
from deit_kd.data import CAN_SHARE
from deit_kd.data.photos import Photos
from deit_kd.memory import _left_by_control_groups, available_memory
from tests.helpers import records, refused, tiny, write_photos
from tests.tiny_parts import array_photos, folder_splits

CPU = torch.device("cpu")
OWN_AVERAGE = {"teacher__name": None, "teacher__random_weights": None, "teacher__kind": "average"}


def pixels(photos: Photos) -> list[tuple[tuple[int, int], bytes]]:
    return [(image.size, image.tobytes()) for image in map(photos.image, range(len(photos)))]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """Photos of many sizes and formats, one of them turned."""
    root = write_photos(tmp_path_factory.mktemp("odd"), {"train": 3, "validation": 2})
    folder = root / "train" / "bars"
    Image.radial_gradient("L").resize((91, 40)).save(folder / "grey.jpg", exif=_turned())
    Image.linear_gradient("L").convert("RGBA").resize((30, 64)).save(folder / "clear.webp")
    Image.radial_gradient("L").save(folder / "icon.png", format="ICO", sizes=[(16, 16), (48, 48)])
    Image.linear_gradient("L").convert("P").resize((33, 33)).save(folder / "palette.tif")
    return folder_splits(root).train


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("cache", ["memory", "device"])
@pytest.mark.parametrize("short_side", [None, 20, 1])
def test_photos_come_out_of_a_cache_as_they_are_read(cache: str, short_side: int | None, odd: Photos) -> None:
    photos = replace(odd, short_side=short_side)
    assert pixels(photos.cached(cache, CPU)) == pixels(photos)
    assert photos.cached(cache, CPU).digest() == odd.digest()
    some = photos.cached(cache, CPU).subset([4, 1, 1])
    assert pixels(some) == pixels(photos.subset([4, 1, 1]))


def test_arrays_are_cached_and_shrunk_too() -> None:
    photos = replace(array_photos(5), short_side=7)
    assert pixels(photos.cached("memory", CPU)) == pixels(photos)
    assert photos.image(0).size == (7, 7)


def test_a_smaller_size_keeps_the_shape_and_enlarges_nothing(odd: Photos) -> None:
    for before, after in zip(pixels(odd), pixels(replace(odd, short_side=24)), strict=True):
        (width, height), (less_wide, less_high) = before[0], after[0]
        assert min(less_wide, less_high) == min(24, width, height)
        assert less_wide / less_high == pytest.approx(width / height, rel=0.03)
        assert min(width, height) > 24 or before == after


@pytest.mark.skipif(not CAN_SHARE, reason="memory without a name exists on Linux")
def test_another_process_sees_the_photos_while_they_are_there_and_nothing_is_left(odd: Photos) -> None:
    decoded = odd.cached("memory", CPU).decoded
    assert decoded is not None
    assert decoded.shared is not None
    sent = decoded.without_pixels()
    assert not len(sent.pixels)
    there = sent.with_shared_pixels()
    assert [there.image(index).tobytes() for index in range(len(odd))] == [data for _, data in pixels(odd)]
    path = Path(decoded.shared.path)
    assert path.exists()
    del decoded
    gc.collect()
    assert not path.exists()
    with pytest.raises(OSError, match=r"cannot be mapped"):
        sent.with_shared_pixels()


@pytest.mark.skipif(not CAN_SHARE, reason="memory without a name exists on Linux")
def test_a_worker_that_is_not_forked_is_sent_no_pixels(odd: Photos) -> None:
    kept = odd.cached("memory", CPU)
    assert kept.decoded is not None
    sent = ForkingPickler.dumps(kept)
    assert len(sent) < len(kept.decoded.pixels)
    assert pixels(pickle.loads(sent)) == pixels(odd)


@pytest.mark.usefixtures("start_method")
def test_workers_that_are_not_forked_make_the_same_views(photos_root: Path, tmp_path: Path) -> None:
    options = {"data__workers": 1, "data__cache": "memory", "distill__kind": "none"}
    for method in ("fork", "spawn"):  # other systems spawn workers, and Python 3.14 does not fork them either
        multiprocessing.set_start_method(method, force=True)
        assert main(["train", *tiny(photos_root, tmp_path / method, **options)]) == 0
    assert records(tmp_path / "fork") == records(tmp_path / "spawn")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_holds_the_photos_of_main_memory_and_refuses_what_does_not_fit(
    odd: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = odd.cached("memory", CPU).decoded
    assert decoded is not None
    there = decoded.on(torch.device("cuda"))
    assert there.pixels.is_cuda
    assert there.on(torch.device("cuda")) is there
    assert pixels(replace(odd, decoded=there)) == pixels(odd)
    assert pixels(odd.cached("device", torch.device("cuda"))) == pixels(odd)
    monkeypatch.setattr("deit_kd.data.cache.available_memory", lambda place: 10)
    with pytest.raises(InputError, match=r"data\.cache: device needs .* on cuda"):
        decoded.on(torch.device("cuda"))


def test_what_does_not_fit_is_refused_with_the_numbers_before_anything_is_decoded(
    photos_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deit_kd.data.cache.available_memory", lambda place: 50_000)
    arguments = tiny(photos_root, tmp_path / "run", data__cache="memory")
    assert refused(["train", *arguments], capsys) == (
        "error: data.cache: memory needs 75.6 kB for 48 photos, and 50 kB are available in main memory; set a smaller "
        "data.cache_size, or data.cache none"
    )
    assert not (tmp_path / "run").exists()
    assert main(["train", *arguments, "--data.cache_size", "16", "--distill.kind", "none"]) == 0


def test_a_size_changes_the_views_and_a_cache_does_not(photos_root: Path, tmp_path: Path) -> None:
    said = []
    for name, options in {
        "plain": {},
        "small": {"data__cache_size": 18},
        "kept": {"data__cache_size": 18, "data__cache": "memory", "data__workers": 1},
    }.items():
        assert main(["train", *tiny(photos_root, tmp_path / name, distill__kind="none", **options)]) == 0
        said.append(records(tmp_path / name))
    assert said[0] != said[1]
    assert said[1] == said[2]


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "100", "a/b/memory.current": "70"}, [30]),
        ("0::/a/b\n", {"a/memory.max": "100", "a/memory.current": "70", "a/memory.stat": "inactive_file 9\nx 1"}, [39]),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/b/memory.current": "70"}, []),
        ("0::/\n", {"memory.max": "100", "memory.current": "70"}, [30]),
        ("0::/elsewhere\n", {"memory.max": "100", "memory.current": "70"}, [30]),
        (
            "4:memory:/c\n3:cpu:/c\n",
            {"memory/c/memory.limit_in_bytes": "50", "memory/c/memory.usage_in_bytes": "20"},
            [30],
        ),
        (
            "4:memory:/gone\n",
            {
                "memory/memory.limit_in_bytes": "50",
                "memory/memory.usage_in_bytes": "20",
                "memory/memory.stat": "total_inactive_file 5",
            },
            [35],
        ),
        ("", {}, []),
    ],
)
def test_a_control_groups_limit_counts(own: str, files: dict[str, str], left: list[int], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert list(_left_by_control_groups(tmp_path / "own", tmp_path / "groups")) == left


def test_a_machine_has_memory() -> None:
    assert available_memory(CPU) > 2**20


@pytest.mark.parametrize(
    ("options", "about"),
    [
        ({"student__name": "deit_tiny_distild"}, "student.name"),
        ({"optim__warmup_epochs": 1}, "optim.warmup_epochs"),
        ({"train__batch_size": 99}, "train.batch_size"),
        ({**OWN_AVERAGE, "train__ema_decay": 0.9999}, "train.ema_decay"),
        ({}, "output"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_a_photo_is_decoded(
    options: dict[str, object], about: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_photos(tmp_path / "photos", {"train": 6, "validation": 2})
    (root / "train" / "bars" / "000.png").write_bytes(b"not an image")  # decoding ends with another line
    output = tmp_path / "run"
    if about == "output":
        output.mkdir()
        (output / "notes.txt").touch()
    line = refused(["train", *tiny(root, output, data__cache="memory", **options)], capsys)
    assert line.startswith(f"error: {about}: "), line
