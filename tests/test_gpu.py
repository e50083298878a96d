"""Every path that names CUDA: what can runs on the CPU as well, so that the tests themselves are known to work."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.distributed import Processes
from deit_kd.engine import Trainer
from deit_kd.interfaces import Batch, Missing
from deit_kd.memory import peak_memory, reset_peak_memory
from deit_kd.rehearsal import Rehearsal
from deit_kd.run_folder import read_facts
from deit_kd.runs.lesson import connect
from deit_kd.runs.run import build_trainer, prepare
from deit_kd.store import StoredTeacher
from deit_kd.teaching.ready import ready_lesson
from tests.helpers import CLASSES, heads_in, no_waiting, records, tiny
from tests.tiny_parts import STORED_VIEWS, begin_store, fill_store, make_batch, tiny_student, tiny_trainer

# CUDA's debug mode, inductor and NCCL warn of what is their own, and deterministic mode of what is not deterministic.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU, and a GPU if there is one; what a run sets for the process is put back."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield torch.device(request.param)
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


def on(device: torch.device, precision: str = "off", kind: str = "soft", **options: Any) -> Trainer:
    """Return the trainer of a tiny student on a device."""
    trainer = tiny_trainer(kind=kind, processes=Processes(0, 1, device), **options)
    trainer.student.model.to(device)
    if trainer.student.ema is not None:
        trainer.student.ema.to(device)
    trainer.distiller.precision = precision
    trainer.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=precision == "fp16")
    return trainer


def losses(trainer: Trainer, steps: int = 8) -> list[float]:
    return [trainer.step(iter([make_batch()]), step).terms[0].item() for step in range(steps)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains_as_fp32_does(device: torch.device, precision: str) -> None:
    """Under fp16 with the scaler."""
    found, expected = losses(on(device, precision)), losses(on(device))
    assert found[-1] < found[0]
    assert found == pytest.approx(expected, rel=0.05)


def test_under_fp16_a_step_that_overflows_is_left_out_and_the_scale_falls(device: torch.device) -> None:
    trainer = on(device, "fp16", ema=0.9)
    losses(trainer, 2)
    before, scale = [value.clone() for value in trainer.student.model.state_dict().values()], trainer.scaler.get_scale()
    batch = make_batch()
    batch.images[3] = float("inf")
    assert trainer.step(iter([batch]), 2).terms[3] == 1
    assert trainer.scaler.get_scale() < scale
    assert all(torch.equal(*pair) for pair in zip(before, trainer.student.model.state_dict().values(), strict=True))


def test_a_step_waits_for_nothing(device: torch.device, tmp_path: Path) -> None:
    """With answers from a label store: a thread reads their rows, which go to the device while it computes."""
    store = begin_store(tmp_path, top=6)
    fill_store(store, 0)
    store = type(store)(tmp_path)
    trainer = on(device, "bf16", kind="none", ema=0.9, clip_grad_norm=1.0)  # the store has other classes
    teacher = StoredTeacher(store, 1)
    batch = make_batch(8).to(device)
    ids = torch.stack([torch.zeros(8, dtype=torch.long), torch.arange(8) % STORED_VIEWS], dim=1)
    batch = batch._replace(view_ids=ids)
    trainer.distiller.teacher = teacher
    with teacher.reading_ahead([ids] * 4, [0], pinned=device.type == "cuda"):
        for step in range(3):
            trainer.step(iter([batch]), step)
        with no_waiting(device):
            result = trainer.step(iter([batch]), 3)
    assert result.terms.isfinite().all()
    columns = store.find(ids, pinned=device.type == "cuda").values()
    assert all(column.is_pinned() == (device.type == "cuda") for column in columns)


def test_a_step_that_lacks_a_view_waits_for_nothing(device: torch.device) -> None:
    trainer = on(device, "bf16", skip=True)
    batch = make_batch(8).without([Missing(2, 2, 0, 2, "unreadable")]).to(device)
    trainer.step(iter([batch]), 0)
    with no_waiting(device):
        result = trainer.step(iter([batch]), 1)
    assert result.terms.isfinite().all()


@contextmanager
def group_of_one(device: torch.device, folder: Path) -> Iterator[None]:
    """Be the only process of a group, over NCCL on a GPU."""
    store = dist.FileStore(str(folder / "group"), 1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_wrapped_student_takes_the_steps_of_a_plain_one(device: torch.device, tmp_path: Path) -> None:
    """Over two micro-steps, of which only the last one reduces the gradients."""
    plain, wrapped = (on(device, accumulation_steps=2, drop_path=0.5) for _ in range(2))
    batches = [make_batch(4, seed=seed) for seed in range(2)]
    with group_of_one(device, tmp_path):
        learner: Any = DistributedDataParallel(wrapped.student.model, gradient_as_bucket_view=True)
        wrapped.distiller.student = learner
        for step in range(3):
            for each in (plain, wrapped):
                each.step(iter(batches), step)
        del learner
        wrapped.distiller.student = wrapped.student.model
    for found, expected in zip(wrapped.student.model.parameters(), plain.student.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_training_batches_are_pinned_for_a_gpu_alone(device: torch.device, photos_root: Path, tmp_path: Path) -> None:
    arguments = tiny(photos_root, tmp_path / "run", train__device=device.type)
    run = prepare(parse_config(arguments)[0], Processes(0, 1, device))
    batch = next(iter(run.loader.batches(0)))
    assert batch.images.is_pinned() is (device.type == "cuda")
    assert batch.to(device).images.device.type == device.type


def resumed(arguments: list[str], run: Path) -> Path:
    """Continue a copy of `run` from its first checkpoint; return the copy."""
    copy = run.parent / "resumed"
    shutil.copytree(run, copy)
    for later in (*sorted((copy / "checkpoints").glob("step-*"))[1:], copy / "checkpoints/best.safetensors"):
        later.unlink()
    assert main([*arguments, "--output", str(copy), "--resume", "auto"]) == 0
    return copy


def test_a_deterministic_run_is_resumed_bit_for_bit(device: torch.device, photos_root: Path, tmp_path: Path) -> None:
    options = {
        "distill__kind": "soft",
        "student__drop_path": 0.2,
        "train__device": device.type,
        "train__deterministic": True,
        "train__epochs": 2,
        "train__ema_decay": 0.9,
        "train__keep_checkpoints": 9,
        "train__precision": "bf16",
    }
    arguments = tiny(photos_root, tmp_path / "run", **options)
    assert main(["train", *arguments]) == 0
    copy = resumed(["train", *arguments], tmp_path / "run")
    weights = "student/model.safetensors"
    assert (copy / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()
    assert records(copy) == records(tmp_path / "run")


@pytest.mark.parametrize("device_name", [CUDA])
def test_a_run_with_the_fastest_kernels_is_resumed_within_a_tolerance(
    device_name: str, photos_root: Path, tmp_path: Path
) -> None:
    """On CUDA sums may have another order from run to run: the class of every photo is kept, and losses to 1e-2."""
    options = {"train__device": device_name, "train__epochs": 2, "train__keep_checkpoints": 9}
    arguments = tiny(photos_root, tmp_path / "run", **options, train__precision="bf16")
    assert main(["train", *arguments]) == 0
    copy = resumed(["train", *arguments], tmp_path / "run")
    before, after = (
        [record["loss"] for record in records(folder) if record["kind"] == "step"]
        for folder in (tmp_path / "run", copy)
    )
    assert after == pytest.approx(before, rel=1e-2)
    assert heads_in(copy)["heads"]["cls"]["nll"] == pytest.approx(
        heads_in(tmp_path / "run")["heads"]["cls"]["nll"], rel=1e-2
    )
    assert read_facts(copy)["attention"] == read_facts(tmp_path / "run")["attention"]


@pytest.mark.parametrize("device_name", [CUDA])
@pytest.mark.parametrize("mode", ["true", "reduce-overhead"])
def test_a_compiled_student_learns_as_an_eager_one(
    device_name: str, mode: str, photos_root: Path, tmp_path: Path
) -> None:
    micro_steps = 2 if mode == "true" else 1  # CUDA graphs refuse two
    options = {"train__device": device_name, "train__accumulation_steps": micro_steps, "train__precision": "bf16"}
    options |= {"student__drop_path": 0.2}  # the same paths
    found = {}
    for name in ("false", mode):
        assert main(["train", *tiny(photos_root, tmp_path / name, **options, train__compile=name)]) == 0
        found[name] = [record["loss"] for record in records(tmp_path / name) if record["kind"] == "step"]
    assert found[mode] == pytest.approx(found["false"], rel=0.03)


@pytest.mark.parametrize("device_name", [CUDA])
def test_the_attention_of_a_run_is_measured_and_recorded(device_name: str, photos_root: Path, tmp_path: Path) -> None:
    arguments = tiny(photos_root, tmp_path / "run", train__device=device_name, train__precision="bf16")
    assert main(["train", *arguments]) == 0
    facts = read_facts(tmp_path / "run")["attention"]
    assert facts is not None
    assert facts["kernel"] in {"flash", "cudnn", "efficient", "math"}
    assert facts["measured"][facts["kernel"]]["gradient_error"] < 0.0157


def test_the_average_follows_as_lerp_does(device: torch.device) -> None:
    """torch's fused SGD rounds otherwise on a GPU, and its order of weight decay and sign is its own matter."""
    trainer = on(device, ema=0.99)
    average = {name: value.clone() for name, value in trainer.student.ema.module.state_dict().items()}
    result = trainer.step(iter([make_batch()]), 200)
    assert result.terms.isfinite().all()
    now = trainer.student.model.state_dict()
    weight = 1 - trainer.student.ema.get_decay(201)
    for name, value in trainer.student.ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, average[name].lerp(now[name], weight), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device_name", [CUDA])
def test_the_memory_format_of_a_teacher_is_measured_and_recorded(
    device_name: str, photos_root: Path, tmp_path: Path
) -> None:
    arguments = tiny(photos_root, tmp_path / "run", train__device=device_name, train__precision="bf16")
    assert main(["train", *arguments]) == 0
    facts = read_facts(tmp_path / "run")["memory_format"]
    assert facts is not None
    assert facts["teacher"]["seconds"].keys() == {"channels_last", "contiguous"}


def test_the_peak_of_memory_holds_the_weights_and_is_restarted(device: torch.device) -> None:
    trainer = on(device)
    losses(trainer, 2)
    reset_peak_memory(device)  # of other tests
    peak = peak_memory(device)
    assert peak > sum(parameter.nbytes for parameter in trainer.student.model.parameters())
    held = torch.ones(2**28, dtype=torch.uint8, device=device)
    assert peak_memory(device) > peak
    del held
    reset_peak_memory(device)
    assert peak_memory(device) < peak + 2**28


def trainer_of(photos_root: Path, home: Path, device: torch.device) -> Trainer:
    """Return the trainer of DeiT-Ti at 224 px, which a ResNet-18 teaches."""
    options = {
        "data__image_size": 224,
        "student__args": {},
        "teacher__name": "resnet18",
        "distill__kind": "soft",
        "train__attention": "fused",
        "train__device": device.type,
        "train__ema_decay": 0.9,
        "train__precision": "bf16",
    }
    run = prepare(parse_config(tiny(photos_root, home, **options))[0], Processes(0, 1, device))
    lesson = ready_lesson(run)
    return build_trainer(connect(run, lesson), lesson)


@pytest.mark.parametrize("device_name", [CUDA])
def test_the_estimate_of_a_dry_run_is_within_a_tenth_of_the_real_peak(
    device_name: str, photos_root: Path, tmp_path: Path
) -> None:
    views, size, device = 128, 224, torch.device(device_name)
    rehearsal = Rehearsal(trainer_of(photos_root, tmp_path / "cpu", torch.device("cpu")))
    for step in range(2):
        rehearsal.step([rehearsal.batch(views, size, len(CLASSES))], step)
    gc.collect()
    others = torch.cuda.memory_allocated(device)  # of other tests
    trainer = trainer_of(photos_root, tmp_path / device_name, device)
    trainer.step(iter([make_batch(views, side=size)]), 0)  # cuDNN tries algorithms, in any workspace
    torch.cuda.reset_peak_memory_stats(device)
    trainer.step(iter([make_batch(views, side=size)]), 1)
    assert rehearsal.peak_bytes == pytest.approx(torch.cuda.max_memory_allocated(device) - others, rel=0.1)


def test_a_student_answers_alike_on_both(device: torch.device) -> None:
    images: Tensor = make_batch(4).images
    here, there = tiny_student().eval(), tiny_student().eval().to(device)
    torch.testing.assert_close(there(images.to(device)).cls_logits.cpu(), here(images).cls_logits, rtol=1e-3, atol=1e-3)


def test_an_empty_batch_trains_nothing(device: torch.device) -> None:
    """Attention on CUDA refuses it, so it is answered by way of two blank images."""
    trainer = on(device, skip=True)
    batch: Batch = make_batch(8)
    gaps = [Missing(row, row, 0, row, "unreadable") for row in range(8)]
    empty = Batch(batch.images[:0], batch.targets[:0], batch.labels[:0], missing=gaps)
    assert trainer.step(iter([empty]), 0).terms[0] == 0
