"""A step copies and casts nothing but what its precision needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deit_kd import Distiller, Objective
from deit_kd.engine import Trainer
from deit_kd.models.create import chosen_attention
from deit_kd.students import TimmStudent
from tests.helpers import STUDENT_ARGS
from tests.tiny_parts import make_batch, tiny_learner, tiny_student, tiny_teacher, tiny_trainer

COPIES = {"_to_copy", "clone", "copy_", "_foreach_copy_", "contiguous"}


class Copies(TorchDispatchMode):
    """Counts casts and copies, those of whole tensors apart from those of scalars, and casts of each parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.of_weights: Counter[int] = Counter()
        self._weights = {parameter.data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, act: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = act.overloadpacket.__name__
        if name in COPIES:
            given = args[0] if isinstance(args[0], Tensor) else args[0][0]
            self.counts[name if given.ndim else f"{name} of a scalar"] += 1
            if given.data_ptr() in self._weights:
                self.of_weights[given.data_ptr()] += 1
        return act(*args, **(kwargs or {}))


def whole_trainer(precision: str, depth: int, **options: Any) -> Trainer:
    """Return a trainer with all that a step has: teacher, drop-path, clipping, fused AdamW and the average."""
    with chosen_attention("fused", torch.device("cpu")):
        model = tiny_student(args={**STUDENT_ARGS, "depth": depth}, drop_path=0.2)
    teacher = tiny_teacher(dtype=torch.float32 if precision == "off" else torch.bfloat16)
    learner = tiny_learner(model, 0.5, optimizer="adamw", lr=1e-3, weight_decay=0.05, clip_grad_norm=1.0)
    return replace(
        tiny_trainer(**options),
        distiller=Distiller(model, teacher, Objective("soft"), precision),
        learners=(learner,),
    )


def copies_of(trainer: Trainer) -> Copies:
    """Return those of a later step."""
    micro_steps = trainer.accumulation_steps
    for step in range(3):
        trainer.step(iter([make_batch(seed=step)] * micro_steps), step)
    batches = [make_batch(seed=3 + micro_step) for micro_step in range(micro_steps)]
    with Copies(trainer.student.model) as copies:
        trainer.step(iter(batches), 3)
    return copies


def weights_in_bf16(model: TimmStudent) -> int:
    """Return how many parameters autocast casts: those of linear layers and of the patch embedding."""
    layers = (module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return sum(len([*layer.parameters()]) for layer in layers)


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_in_bf16_only_weights_gradients_and_the_inputs_of_matrices_are_cast(depth: int, micro_steps: int) -> None:
    """Each weight once a step; the rest for each micro-batch.

    Of a block, the two norms' outputs and their gradients, and the gradients of its two branches. Around the blocks,
    the images of student and teacher, the patches beside the tokens, both heads' tokens and logits, each also backward
    (but images), the teacher's logits, the factors of drop-path, and which views are finite.
    """
    trainer = whole_trainer("bf16", depth, accumulation_steps=micro_steps)
    weights = weights_in_bf16(trainer.student.model)
    copies = copies_of(trainer)
    around = 2 + 2 * (1 + 2 + 2) + 1 + 1 + 1
    assert copies.counts["_to_copy"] <= weights + micro_steps * (weights + 6 * depth + around)
    assert set(copies.of_weights.values()) == {1}
    assert len(copies.of_weights) == weights


@pytest.mark.parametrize("precision", ["off", "bf16"])
def test_tensors_are_copied_where_timms_attention_needs_it_and_nowhere_else(precision: str) -> None:
    """The gradient of queries, keys and values, from apart to side by side."""
    counts = copies_of(whole_trainer(precision, 4)).counts
    assert {name: count for name, count in counts.items() if "_to_copy" not in name} == {
        "clone": 4,
        "copy_ of a scalar": 1,  # whether the step was left out
    }


def test_in_fp32_no_weight_and_nothing_that_blocks_compute_is_cast() -> None:
    copies = copies_of(whole_trainer("off", 4))
    assert copies.counts["_to_copy"] == 2  # the teacher's images, to channels-last, and which views are finite
    assert not copies.of_weights


def test_micro_steps_that_share_casts_give_the_gradients_of_those_that_do_not() -> None:
    trainer, batches = whole_trainer("bf16", 2, accumulation_steps=2), [make_batch(seed=seed) for seed in range(2)]
    trainer.student.model.eval()  # without drop-path
    for batch in batches:
        (trainer.distiller(batch).loss / 2).backward()
    expected = [parameter.grad for parameter in trainer.student.model.parameters()]
    trainer.student.optimizer.zero_grad()
    found: list[Tensor] = []
    trainer.student.optimizer.register_step_pre_hook(
        lambda *_: found.extend(
            parameter.grad for parameter in trainer.student.model.parameters() if parameter.grad is not None
        )
    )
    trainer.student.clip_grad_norm = None
    trainer.step(iter(batches), 0)
    assert all(torch.equal(gradient, other) for gradient, other in zip(found, expected, strict=True))
