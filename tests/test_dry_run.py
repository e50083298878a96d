"""A dry run says what the run will need, is refused for what the run would be, and leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.jobs.dry_run import dry_run
from tests.helpers import FULL, Finished, as_arguments, refused, snapshot, tiny

GUIDE = {"kind": "guide", "weight": 1.0, "blocks": [1], "stages": ["layer2"]}
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which is measured")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_says_memory_time_and_disk(photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *tiny(photos_root, tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for line in (r"memory: .+ [MG]B at the peak", r"time: about .+ per epoch \(6 steps", r"disk: .+ for checkpoints"):
        assert re.search(line, said), line


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distill__kind": "none"},
        {**FULL, "data__workers": 0},
        {"teacher__store": "store", "teacher__store_mode": "record"},
        {"train__epochs": 1, "train__batch_size": 48},
    ],
    ids=["online", "no teacher", "a teacher to fit", "recording", "one step"],
)
def test_it_leaves_nothing_behind(photos_root: Path, tmp_path: Path, options: dict[str, object]) -> None:
    assert main(["train", *tiny(photos_root, tmp_path / "run", **options), "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_must_be_fitted_first_is_said(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", *tiny(photos_root, tmp_path / "run", **FULL), "--dry-run"])
    assert "is not fitted yet; a fit of 2 epochs comes first" in capsys.readouterr().out


def test_a_teacher_that_is_fitted_is_used(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(finished.folder.parent)
    assert main(["train", *finished.arguments, "--output", "new", "--dry-run"]) == 0
    assert f"teacher: found {finished.teachers}" in capsys.readouterr().out
    assert snapshot(finished.folder.parent) == before


def for_cuda(photos_root: Path, **options: object) -> list[str]:
    recipe = tiny(photos_root, Path("run"), **{"train__device": "cuda", "train__precision": "bf16", **options})
    return [*recipe, "--dry-run"]


@without_cuda
@pytest.mark.parametrize(
    "options",
    [
        {"train__precision": "fp16"},
        {"distill__kind": "none", "optim__name": "lamb"},
        {"distill__terms": [GUIDE], **FULL},
    ],
    ids=["online, fp16", "no teacher, another optimiser", "a guide, and a teacher to fit"],
)
def test_the_memory_of_a_gpu_is_estimated_without_one(
    photos_root: Path, tmp_path: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *for_cuda(photos_root, **{**options, "train__device": "cuda"})]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for line in (
        r"memory: about .+ at the peak on the GPU: .+ stay between steps",
        "memory: estimated from the shapes of all tensors, since this machine has no CUDA device",
        "time: not measured",
        "disk: .+ for checkpoints",
    ):
        assert re.search(line, said), line
    assert list(tmp_path.iterdir()) == []


@without_cuda
def test_photos_in_its_memory_are_counted(photos_root: Path) -> None:
    options = {"distill__kind": "none", "train__device": "cuda", "data__executor": "device"}
    needed = [
        dry_run(parse_config(tiny(photos_root, None, **options, data__cache=cache))[0]).memory
        for cache in ("memory", "device")
    ]
    pixels = 0
    for file in (photos_root / "train").rglob("*.png"):
        with Image.open(file) as image:
            pixels += image.width * image.height
    assert needed[1] - needed[0] == 3 * pixels


@without_cuda
def test_the_estimate_counts_every_network_moment_and_gradient(photos_root: Path) -> None:
    """With one image, a network's weights outweigh its activations; AdamW has two moments, and the average is one more.

    At the peak of the optimiser's step the gradients are there, too.
    """
    arguments = {
        "student__args": {"patch_size": 8, "embed_dim": 256, "depth": 2, "num_heads": 2},
        "train__batch_size": 2,
    }
    options = {**arguments, "train__ema_decay": 0.9, "distill__kind": "none", "evaluate__batch_size": 1}
    needs = dry_run(parse_config(for_cuda(photos_root, **options)[:-1])[0])
    weights = needs.checkpoint / 4  # weights, average and two moments
    assert needs.memory == pytest.approx(5 * weights, rel=0.05)


@without_cuda
def test_the_checkpoint_of_a_gpu_is_as_large_as_said(finished: Finished) -> None:
    arguments = [*finished.arguments, "--output", "new", "--train.device", "cuda"]
    size = next((finished.folder / "checkpoints").iterdir()).stat().st_size
    assert 0.8 * size < dry_run(parse_config(arguments)[0]).checkpoint < size


@without_cuda
def test_an_optimiser_that_reads_values_is_refused(photos_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["train", *for_cuda(photos_root, optim__name="muon")], capsys)
    assert "a step with optim.name 'muon' cannot be rehearsed without values" in said


def test_the_checkpoint_is_as_large_as_said(finished: Finished) -> None:
    needs = dry_run(parse_config([*finished.arguments, "--output", "new"])[0])
    size = next((finished.folder / "checkpoints").iterdir()).stat().st_size
    assert 0.8 * size < needs.checkpoint < size


def test_the_store_is_as_large_as_said(photos_root: Path, tmp_path: Path) -> None:
    recording = {"teacher__store": str(tmp_path / "store"), "teacher__store_mode": "record", "distill__kind": "soft"}
    arguments = tiny(photos_root, tmp_path / "run", **recording)
    needs = dry_run(parse_config(arguments)[0])
    assert main(["train", *arguments]) == 0
    size = sum(file.stat().st_size for file in (tmp_path / "store").glob("*.safetensors"))
    assert size - 1000 < needs.store < size


@pytest.mark.parametrize(
    ("decay", "line"),
    [
        (0.75, "average: over 4 steps, 66.7 % of the run's 6"),
        (0.99, "warning: average: over 100 steps, 1666.7 % of the run's 6, so it is the plain mean of all"),
        ("null", "average: over 3 steps, 5.0 % of the run's 60"),
    ],
)
def test_it_says_the_span_of_the_average(
    decay: object, line: str, photos_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    epochs = 10 if decay == "null" else 1
    main(["train", *tiny(photos_root, Path("run"), train__ema_decay=decay, train__epochs=epochs), "--dry-run"])
    assert line in " ".join(capsys.readouterr().out.split())


def test_what_the_run_would_be_refused_for_is_refused(
    finished: Finished, photos_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "already holds a run" in refused(["train", *finished.arguments, "--dry-run"], capsys)
    options = as_arguments(teacher__random_weights=False)
    arguments = tiny(photos_root, Path("run"), teacher__random_weights=None)
    assert "has nothing to take its weights from" in refused(["train", *arguments, *options, "--dry-run"], capsys)
