"""Behind the attention of its last block a student computes only the tokens that its heads read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from deit_kd.models.last_block import LastBlock
from deit_kd.students import TimmStudent
from tests.helpers import STUDENT, STUDENT_ARGS
from tests.tiny_parts import make_batch, tiny_student

VIT = "vit_tiny_patch16_224"
REGISTERS = {**STUDENT_ARGS, "reg_tokens": 3}
SCALED = {**STUDENT_ARGS, "init_values": 0.5}
IMAGES = make_batch(4).images


def as_timm_has_it(student: TimmStudent) -> TimmStudent:
    """Return `student` with timm's own last block."""
    model = student.backbone
    block: Any = Block(32, 2, init_values=0.5 if hasattr(model.blocks[-1].ls1, "gamma") else None, qkv_bias=True)
    block.norm1.eps = block.norm2.eps = 1e-6
    block.load_state_dict(model.blocks[-1].state_dict())
    model.blocks[-1] = block.train(student.training)
    return student


def tokens_of_the_last_mlp(student: TimmStudent) -> list[int]:
    found: list[int] = []
    student.backbone.blocks[-1].mlp.register_forward_pre_hook(lambda _, given: found.append(given[0].shape[1]))
    return found


@pytest.mark.parametrize(
    ("name", "args", "distilled", "tokens"),
    [
        (STUDENT, STUDENT_ARGS, True, 2),
        (VIT, STUDENT_ARGS, True, 2),  # grafted
        (VIT, STUDENT_ARGS, False, 1),
        (VIT, REGISTERS, True, 5),
        ("deit3_small_patch16_224", SCALED, False, 1),
    ],
    ids=["two tokens", "a grafted token", "one token", "registers", "layer scale"],
)
def test_answers_and_gradients_are_timms(name: str, args: dict[str, Any], distilled: bool, tokens: int) -> None:
    answers: list[Tensor] = []
    gradients: list[list[Tensor]] = []
    for ours in (True, False):
        student = tiny_student(name=name, args=args, distilled=distilled)
        assert isinstance(student.backbone.blocks[-1], LastBlock)
        found = tokens_of_the_last_mlp(student if ours else as_timm_has_it(student))
        answers.append(torch.stack([*student(IMAGES).logits.values()]))
        assert found == [tokens if ours else student.backbone.num_prefix_tokens + 4]
        answers[-1].square().sum().backward()
        gradients.append([parameter.grad for parameter in student.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*answers)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "options",
    [
        {"name": VIT, "args": {**STUDENT_ARGS, "global_pool": "avg"}},
        {"name": "vit_base_patch16_siglip_224", "args": {**STUDENT_ARGS, "depth": 2}},  # pools by attention
        {"name": "test_resnet", "args": {}, "image_size": 32},
        {"name": "eva02_tiny_patch14_224", "args": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}},
    ],
    ids=["mean of the patches", "attention over patches", "a CNN", "another kind of block"],
)
def test_where_heads_read_more_every_block_is_timms(options: dict[str, Any]) -> None:
    student = tiny_student(distilled=False, **options)
    assert not any(isinstance(module, LastBlock) for module in student.modules())


@pytest.mark.parametrize(
    "asked",
    [{"features": ("blocks.1",)}, {"features": ("pooled",)}, {"grid": (2, 2)}],
    ids=["maps", "pooled", "logits at places"],
)
def test_what_is_asked_for_patches_has_all_of_them(asked: dict[str, Any]) -> None:
    student = tiny_student(patches=True)
    found = tokens_of_the_last_mlp(student)
    output, expected = student(IMAGES, **asked), as_timm_has_it(tiny_student(patches=True))(IMAGES, **asked)
    assert found == [6]
    torch.testing.assert_close(output._asdict(), expected._asdict())


def test_a_head_of_patches_reads_all_of_them() -> None:
    student = tiny_student(patches=True)
    found = tokens_of_the_last_mlp(student)
    assert student(IMAGES).patch_logits is not None
    assert found == [6]


def test_afterwards_the_model_has_all_of_its_last_features() -> None:
    student = tiny_student().eval()
    student(IMAGES)
    assert student.backbone.forward_features(IMAGES).shape == (4, 6, 32)
    with pytest.raises(AssertionError):
        student(torch.zeros(4, 3, 24, 24))
    assert student.backbone.forward_features(IMAGES).shape == (4, 6, 32)


def test_layers_that_are_computed_twice_compute_all_tokens() -> None:
    gradients = []
    for twice in (False, True):
        student = tiny_student()
        student.backbone.set_grad_checkpointing(twice)
        student(IMAGES).cls_logits.square().sum().backward()
        gradients.append(student.backbone.blocks[1].mlp.fc2.weight.grad)
    torch.testing.assert_close(*gradients)


def test_names_of_weights_are_timms() -> None:
    student = tiny_student()
    names = [*student.backbone.state_dict()]
    assert names == [*as_timm_has_it(student).backbone.state_dict()]
