"""A rehearsed step: nothing in it waits for the device, and it says what a step holds in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from deit_kd.config import parse_config
from deit_kd.engine import Trainer
from deit_kd.interfaces import Missing
from deit_kd.rehearsal import LiveBytes, Rehearsal
from deit_kd.runs.lesson import connect
from deit_kd.runs.run import build_trainer, prepare
from deit_kd.teaching.ready import ready_lesson
from tests.helpers import CLASSES, ONE_PROCESS, tiny
from tests.tiny_parts import Operations, make_batch, tiny_trainer

GUIDE = {"kind": "guide", "weight": 1.0, "blocks": [1], "stages": ["layer2"]}
SOFT = {
    "distill__kind": "soft",
    "optim__clip_grad_norm": 1.0,
    "student__drop_path": 0.2,
    "train__accumulation_steps": 2,
    "train__ema_decay": 0.9,
    "train__precision": "bf16",
    "data__on_error": "skip",
}
OWN_AVERAGE = {
    "teacher__kind": "average",
    "teacher__name": None,
    "teacher__random_weights": None,
    "distill__alpha": {"start": 0, "end": 0.5, "until": 0.5},
    "train__ema_decay": 0.5,
}
RESNET = {"student__name": "test_resnet", "student__args": {}, "distill__kind": "none", "train__ema_decay": 0.9}


def trainer_of(photos_root: Path, home: Path, **options: Any) -> Trainer:
    """Return the trainer of a tiny run before its first step."""
    run = prepare(parse_config(tiny(photos_root, home / "run", **options))[0], ONE_PROCESS)
    lesson = ready_lesson(run)
    return build_trainer(connect(run, lesson), lesson)


@pytest.mark.parametrize(
    "options",
    [
        SOFT,
        {**SOFT, "distill__terms": [GUIDE, {**GUIDE, "kind": "relations"}]},
        {**SOFT, **OWN_AVERAGE},
        RESNET,
    ],
    ids=["soft", "soft, a guide and relations", "its own average", "a network with BatchNorm"],
)
def test_no_step_reads_a_value_from_the_device(photos_root: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    rehearsal = Rehearsal(trainer_of(photos_root, tmp_path, **options))
    gap = Missing(row=1, photo=0, epoch=0, position=1, reason="unreadable")
    batches = [rehearsal.batch(4, 16, len(CLASSES), missing) for missing in ((), (gap,))]
    for step in (0, 5):  # the average begins in its own way
        rehearsal.step(batches, step)


def test_a_rehearsal_shares_the_processes_of_its_trainer() -> None:
    """Their meetings are counted once; Python 3.14 cannot copy the count."""
    trainer = tiny_trainer()
    assert Rehearsal(trainer)._trainer.processes is trainer.processes


@pytest.mark.parametrize("reading", [lambda loss: loss.item(), lambda loss: loss > 0 or None], ids=["item", "if"])
def test_a_step_that_reads_a_value_is_noticed(reading: Any) -> None:
    rehearsal = Rehearsal(tiny_trainer())
    distiller: Any = rehearsal._trainer.distiller
    everyone = distiller.everyone

    def waits(*given: Any) -> Any:
        results = everyone(*given)
        assert reading(results[0].terms.loss) is not None
        return results

    distiller.everyone = waits
    with pytest.raises(DataDependentOutputException):
        rehearsal.step([rehearsal.batch(8, 16, 3)])


def rounded(tensors: Iterable[Tensor], block: int = 512) -> int:
    storages = {storage.data_ptr(): storage.nbytes() for storage in (found.untyped_storage() for found in tensors)}
    return sum(-(-size // block) * block for size in storages.values())


def test_what_stays_between_steps_is_counted_to_the_byte(photos_root: Path, tmp_path: Path) -> None:
    """Weights, buffers, moments, the average and the teacher; gradients are freed."""
    trainer = trainer_of(photos_root, tmp_path, **SOFT)
    rehearsal = Rehearsal(trainer)
    rehearsal.step([rehearsal.batch(4, 16, len(CLASSES)) for _ in range(2)])
    for step in range(2):
        trainer.step(iter([make_batch(4), make_batch(4, seed=1)]), step)
    assert trainer.student.ema is not None
    teacher: Any = trainer.distiller.teacher
    moments = [value for state in trainer.student.optimizer.state.values() for value in state.values()]
    networks = (trainer.student.model, trainer.student.ema.module, teacher)
    stays = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    assert rehearsal.bytes_now == rounded([*stays, *moments, trainer.student.optimizer.found_inf])  # type: ignore[attr-defined]


def test_what_a_forward_pass_keeps_is_what_autograd_saves() -> None:
    model, images = tiny_trainer().student.model, make_batch(8).images
    saved: list[Tensor] = []
    live = LiveBytes([*model.parameters(), images], block=1)
    before = live.now

    def keep(found: Tensor) -> Tensor:
        saved.append(found)
        return found

    with live, torch.autograd.graph.saved_tensors_hooks(keep, lambda found: found):
        output = model(images)
    given = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), images)}
    kept = [tensor for tensor in (*saved, *output[:2]) if tensor.untyped_storage().data_ptr() not in given]
    assert live.now - before == rounded(kept, block=1)


def test_the_peak_is_that_of_the_real_step() -> None:
    """Beside what PyTorch's profiler sees the allocator do, block and workspaces of kernels apart."""
    trainer, batch = tiny_trainer(ema=0.9), make_batch(64)
    rehearsal = Rehearsal(trainer)
    blank = rehearsal.batch(64, 16, 3)
    before = rehearsal.bytes_now
    rehearsal.step([blank])
    trainer.step(iter([batch]), 0)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        trainer.step(iter([batch]), 1)
    events = profile.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert rehearsal.peak_bytes - before == pytest.approx(most, rel=0.02)


def test_the_peak_grows_with_the_batch(photos_root: Path, tmp_path: Path) -> None:
    trainer = trainer_of(photos_root, tmp_path)
    peaks = []
    for views in (64, 128, 256):
        rehearsal = Rehearsal(trainer)
        rehearsal.step([rehearsal.batch(views, 16, len(CLASSES))])
        peaks.append(rehearsal.peak_bytes)
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.02)


def operations_of(trainer: Trainer) -> Counter[str]:
    """Return the operations of a later step."""
    for step in range(3):
        trainer.step(iter([make_batch(seed=step)]), step)
    with Operations() as operations:
        trainer.step(iter([make_batch(seed=3)]), 3)
    return operations.counts


def test_the_average_is_one_pass() -> None:
    with_average, without = operations_of(tiny_trainer(ema=0.9)), operations_of(tiny_trainer())
    extra = with_average - without
    assert extra["_fused_sgd_"] == 1
    assert sum(extra.values()) <= 3


def test_a_step_without_buffers_keeps_none_and_with_many_takes_few_operations() -> None:
    plain, few, many = (tiny_trainer(kind="none") for _ in range(3))
    for trainer, layers in ((few, 1), (many, 30)):
        trainer.student.model.register_module("norms", nn.ModuleList(nn.BatchNorm2d(3) for _ in range(layers)))
    views = {"view", "split"}
    costs = [
        sum(count for name, count in operations_of(trainer).items() if name not in views)
        for trainer in (plain, few, many)
    ]
    assert costs[2] == costs[1] < costs[0] + 20
