"""Batches whose views are made on the device that trains: the same bits from every cache, worker and process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deit_kd import InputError
from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.data import DeviceLoader, Draws, Photos, TrainingBatchSampler, UnreadableImage
from deit_kd.data.sharing import one_ahead
from deit_kd.interfaces import Batch, Missing
from deit_kd.runs.photos import build_splits
from deit_kd.runs.viewing import build_training_loader
from deit_kd.teaching.fit import teacher_folder
from deit_kd.views import Drawing, Executor
from tests.helpers import MEAN, ONE_PROCESS, STD, heads_in, newest_two, records, refused, tiny
from tests.tiny_parts import array_photos, folder_splits

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
BAD = ("dots/003.png", "rings/011.png")


def loader(photos: Photos, *, device: torch.device = CPU, cache: str = "none", **options: Any) -> DeviceLoader:
    """Return a loader of everything random, three steps of 16 views in each of two epochs."""
    own = {"workers": 0, "skip": False, "auto_augment": None} | options
    drawing = Drawing(
        image_size=16,
        interpolation="random",
        auto_augment=own.pop("auto_augment"),
        color_jitter=0.3,
        horizontal_flip=0.5,
        scale=(0.3, 1.0),
        ratio=(0.75, 4 / 3),
        erasing=0.5,
        mixup=0.8,
        cutmix=1.0,
    )
    workers, skip = own.pop("workers"), own.pop("skip")
    kept = photos if cache == "none" else photos.cached(cache, device, skip)
    order = {"batch_size": 16, "accumulation_steps": 1, "rank": 0, "processes": 1, "repeats": 1} | own
    sampler = TrainingBatchSampler(photos=len(photos), seed=3, pairs=True, epochs=2, **order)
    executor = Executor(image_size=16, mean=MEAN, std=STD, device=device)
    draws = Draws(kept, drawing, 3, skip)
    return DeviceLoader(draws, executor, sampler, label_smoothing=0.1, workers=workers, device=device)


def bits(batches: Any) -> list[list[bytes]]:
    """Return everything about each batch."""
    return [
        [*(field.cpu().numpy().tobytes() for field in batch[:4]), repr(list(batch.missing)).encode()]
        for batch in batches
    ]


@pytest.fixture(scope="module")
def photos(photos_root: Path) -> Photos:
    return folder_splits(photos_root).train


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, photos_root: Path, photos: Photos) -> Photos:
    """The photos, two of which cannot be read."""
    root = tmp_path_factory.mktemp("bad")
    for name in photos.names:
        (root / name).parent.mkdir(exist_ok=True)
        content = (photos_root / "train" / name).read_bytes()
        (root / name).write_bytes(b"no image" if name in BAD else content)
    return Photos.of_files(root, photos.names, photos.labels, photos.classes)


@pytest.fixture(scope="module")
def expected(photos: Photos) -> list[Batch]:
    return list(loader(photos).batches(0))


@pytest.mark.parametrize("options", [{"workers": 2}, {"cache": "memory"}, {"cache": "device"}], ids=str)
def test_views_are_the_same_bits_from_every_cache_and_worker(
    options: dict[str, Any], photos: Photos, expected: list[Batch]
) -> None:
    assert bits(loader(photos, **options).batches(0)) == bits(expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("options", [{"workers": 2}, {}, {"cache": "memory"}, {"cache": "device"}], ids=str)
def test_a_gpu_makes_the_same_bits_from_every_cache_and_worker(options: dict[str, Any], photos: Photos) -> None:
    cuda = torch.device("cuda")
    on_gpu = list(loader(photos, device=cuda, cache="device").batches(0))
    assert on_gpu[0].images.is_cuda
    assert bits(loader(photos, device=cuda, **options).batches(0)) == bits(on_gpu)


def test_a_run_goes_on_from_any_step(photos: Photos, expected: list[Batch]) -> None:
    for step in (1, 3, 5):
        assert bits(loader(photos, cache="memory").batches(step)) == bits(expected[step:])


@pytest.mark.parametrize("order", [{"processes": 2}, {"accumulation_steps": 4}], ids=str)
def test_a_step_has_the_same_views_however_it_is_dealt(
    order: dict[str, int], photos: Photos, expected: list[Batch]
) -> None:
    ranks = range(order.get("processes", 1))
    shares = [list(loader(photos, cache="memory", rank=rank, **order).batches(0)) for rank in ranks]
    per_step = order.get("accumulation_steps", 1)
    for step, whole in enumerate(expected):
        dealt = [batch for share in shares for batch in share[step * per_step : (step + 1) * per_step]]
        for name in ("images", "targets", "labels", "view_ids"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in dealt]), getattr(whole, name))


@pytest.mark.parametrize("batch_size", [1, 6, 100])
def test_any_view_is_the_one_that_training_sees(batch_size: int, photos: Photos, expected: list[Batch]) -> None:
    view_ids = np.array([[epoch, position] for epoch in (0, 1) for position in range(0, 48, 2)])
    asked = list(loader(photos, cache="memory").views(view_ids, batch_size))
    assert torch.equal(torch.cat([batch.images for batch in asked]), torch.cat([batch.images for batch in expected]))
    assert torch.equal(torch.cat([batch.targets for batch in asked]), torch.cat([batch.targets for batch in expected]))


def test_view_epochs_that_come_again_have_the_same_views(photos: Photos, expected: list[Batch]) -> None:
    cycled = loader(photos, cache="memory")
    cycled.cycle_views(1)
    assert bits(cycled.batches(0)) == [*bits(expected[:3]), *bits(expected[:3])]


@pytest.mark.parametrize("options", [{}, {"workers": 1}, {"cache": "memory"}], ids=str)
def test_a_photo_that_cannot_be_read_is_missing_and_the_other_views_stay(
    options: dict[str, Any], bad: Photos, expected: list[Batch]
) -> None:
    missing: list[Missing] = []
    for whole, batch in zip(expected, loader(bad, skip=True, **options).batches(0), strict=True):
        missing += batch.missing
        rows = batch.rows()
        assert batch.view_ids is not None
        assert whole.view_ids is not None
        assert torch.equal(batch.view_ids, whole.view_ids[rows])
        assert torch.equal(batch.labels, whole.labels[rows])
        alone = {view.row ^ 1 for view in batch.missing}
        for here, place in enumerate(rows.tolist()):
            if place not in alone:
                assert torch.equal(batch.images[here], whole.images[place])
                assert torch.equal(batch.targets[here], whole.targets[place])
            else:
                assert batch.targets[here].max() == pytest.approx(0.9 + 0.1 / 3)
    assert sorted(bad.names[view.photo] for view in missing) == sorted(BAD * 2)
    assert all("cannot be read as an image" in view.reason for view in missing)


@pytest.mark.parametrize("options", [{}, {"workers": 1}], ids=str)
def test_a_photo_that_cannot_be_read_ends_a_run_that_does_not_skip(options: dict[str, Any], bad: Photos) -> None:
    with pytest.raises(InputError, match=r"^/\S+/dots/003\.png: cannot be read as an image|rings/011"):
        list(loader(bad, **options).batches(0))
    with pytest.raises(UnreadableImage):
        loader(bad, cache="memory")


def test_a_batch_of_which_nothing_can_be_read_is_empty(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    nothing = Photos.of_files(tmp_path, ["a.png", "b.png"], [0, 1], ("a", "b"))
    for cache in ("none", "memory"):
        (batch, _) = loader(nothing, cache=cache, skip=True, batch_size=2).batches(0)
        assert (tuple(batch.images.shape), tuple(batch.targets.shape)) == ((0, 3, 16, 16), (0, 2))
        assert [view.row for view in batch.missing] == [0, 1]


def test_a_policy_that_is_unknown_is_refused_before_any_view() -> None:
    with pytest.raises(InputError, match=r"augment\.auto_augment: 'no-such-policy'"):
        loader(array_photos(16), auto_augment="no-such-policy")


def test_photos_without_a_label_have_no_target() -> None:
    unlabelled = replace(array_photos(16), labels=np.full(16, -1))
    (batch, _) = loader(unlabelled, cache="memory").batches(0)
    assert not batch.targets.any()
    assert (batch.labels == -1).all()


def test_the_next_batch_is_made_while_one_is_used_and_nothing_is_requested_before_it_is_done() -> None:
    said: list[str] = []
    main_thread = threading.current_thread()

    def items() -> Iterator[int]:
        for item in range(3):
            assert threading.current_thread() is main_thread
            said.append(f"request {item}")
            yield item

    def make(item: int) -> int:
        time.sleep(0.02)
        said.append(f"made {item}")
        return 10 * item

    used = []
    for made in one_ahead(make, items()):
        said.append(f"use {made // 10}")
        time.sleep(0.2)
        used.append(made)
    assert used == [0, 10, 20]
    assert said == [
        *("request 0", "made 0", "request 1", "use 0", "made 1"),
        *("request 2", "use 1", "made 2", "use 2"),
    ]


def test_an_error_in_the_next_batch_comes_after_the_one_before() -> None:
    def make(item: int) -> int:
        if item == 1:
            raise UnreadableImage("1: cannot be read")
        return item

    batches = one_ahead(make, [0, 1])
    assert next(batches) == 0
    with pytest.raises(UnreadableImage, match=r"1: cannot be read"):
        next(batches)


# Whole runs

DEVICE = {"data__executor": "device", "data__cache": "memory", "train__epochs": 2, "distill__kind": "none"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos_root: Path) -> Path:
    """A run whose views were made on the device."""
    home = tmp_path_factory.mktemp("device") / "run"
    assert main(["train", *tiny(photos_root, home, **DEVICE)]) == 0
    return home


def test_a_run_without_a_cache_is_the_same_run(run: Path, photos_root: Path, tmp_path: Path) -> None:
    assert main(["train", *tiny(photos_root, tmp_path / "run", **{**DEVICE, "data__cache": "none"})]) == 0
    assert records(tmp_path / "run") == records(run)


def test_a_run_that_is_resumed_with_another_cache_ends_as_the_unbroken_one(run: Path, photos_root: Path) -> None:
    before, scored = records(run), heads_in(run)
    newest_two(run)[1].unlink()
    (run / "heads.json").unlink()
    arguments = tiny(photos_root, run, **{**DEVICE, "data__cache": "device"})
    assert main(["train", *arguments, "--resume", "auto"]) == 0
    assert (records(run), heads_in(run)) == (before, scored)


def test_another_executor_or_version_of_it_does_not_resume(
    run: Path, photos_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", *tiny(photos_root, run, **DEVICE), "--resume", "auto"]
    said = refused([*arguments, "--data.executor", "pillow"], capsys)
    assert "(data.executor: 'device 1' in the run, 'pillow' here)" in said
    monkeypatch.setattr("deit_kd.runs.viewing.EXECUTOR_VERSION", 2)
    assert "(data.executor: 'device 1' in the run, 'device 2' here)" in refused(arguments, capsys)


def test_the_device_keeps_no_photos_for_views_that_workers_make(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny(photos_root, tmp_path / "run", data__cache="device")
    assert refused(["train", *arguments], capsys).startswith("error: data.cache: device is for views that are made")


@pytest.mark.parametrize(
    ("executor", "policy"), [("pillow", "no-such-policy"), ("device", "no-such-policy"), ("device", "augmix-m5-w4-d2")]
)
def test_a_policy_that_cannot_be_used_is_refused_before_photos_are_decoded(
    executor: str, policy: str, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"data__executor": executor, "data__cache": "memory", "augment__auto_augment": policy}
    assert main(["train", *tiny(photos_root, tmp_path / "run", **options)]) == 2
    said = capsys.readouterr()
    assert "cache: " not in said.out + said.err
    assert f"augment.auto_augment: {policy!r}" in said.err


def test_a_teacher_is_fitted_anew_for_another_executor_or_version(
    photos_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = {"teacher__random_weights": None, "teacher__fit__epochs": 1}
    configs = [
        parse_config(tiny(photos_root, None, **fit, data__executor=executor))[0] for executor in ("pillow", "device")
    ]
    splits = build_splits(configs[0])
    folders = {teacher_folder(config, splits) for config in configs}
    monkeypatch.setattr("deit_kd.runs.viewing.EXECUTOR_VERSION", 2)
    assert len(folders | {teacher_folder(configs[1], splits)}) == 3


def test_a_recipe_chooses_the_executor_and_its_views_are_alike(photos_root: Path) -> None:
    options = {"augment__mixup": 0, "augment__cutmix": 0, "augment__erasing": 0, "augment__color_jitter": 0}
    means = []
    for executor in ("pillow", "device"):
        config, _ = parse_config(tiny(photos_root, None, data__executor=executor, **options))
        batches = list(build_training_loader(config, build_splits(config).train, ONE_PROCESS).batches(0))
        means.append(torch.cat([batch.images for batch in batches]).mean((0, 2, 3)))
    torch.testing.assert_close(*means, atol=0.1, rtol=0)
