"""The student: timm's own two heads, the same in train and in eval, or a refusal with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from deit_kd import InputError, StudentOutput, TimmStudent, head_probabilities
from tests.helpers import STUDENT, STUDENT_ARGS
from tests.tiny_parts import tiny_student

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def answer(student: nn.Module, images: torch.Tensor = IMAGES) -> StudentOutput:
    with torch.no_grad():
        return student(images)


def test_the_heads_are_timms_distilled_training_outputs() -> None:
    student = tiny_student().train()
    student.backbone.set_distilled_training(True)
    cls_logits, dist_logits = student.backbone(IMAGES)
    assert torch.equal(answer(student).cls_logits, cls_logits)
    assert torch.equal(answer(student).dist_logits, dist_logits)


def test_timm_answers_with_the_mean_of_the_heads() -> None:
    student = tiny_student().eval()
    output = answer(student)
    torch.testing.assert_close(student.backbone(IMAGES), (output.cls_logits + output.dist_logits) / 2)


@pytest.mark.parametrize("distilled", [True, False])
def test_the_answer_is_the_same_in_train_and_in_eval(distilled: bool) -> None:
    student = tiny_student(distilled=distilled)
    trained, evaluated = answer(student.train()), answer(student.eval())
    assert torch.equal(trained.cls_logits, evaluated.cls_logits)
    assert (trained.dist_logits is None) == (evaluated.dist_logits is None) == (not distilled)


def test_the_heads_differ() -> None:
    output = answer(tiny_student())
    assert output.dist_logits is not None
    assert not torch.allclose(output.cls_logits, output.dist_logits)


def test_without_distillation_the_plain_twin_is_built() -> None:
    student = tiny_student(distilled=False)
    assert not student.has_distillation_token
    assert not hasattr(student.backbone, "head_dist")
    assert getattr(student.backbone, "dist_token", None) is None
    assert answer(student).dist_logits is None


def test_without_distillation_any_cnn_learns() -> None:
    student = tiny_student(name="test_resnet", args={}, distilled=False)
    assert answer(student).cls_logits.shape == (3, 3)


AVERAGED = {
    "levit_128s": {"embed_dim": [16, 32, 48], "depth": [1, 1, 1], "num_heads": [2, 2, 2], "key_dim": 8},
    "repvit_m0_9": {"embed_dim": [8, 16, 24, 32], "depth": [1, 1, 1, 1]},
    "efficientformer_l1": {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},  # sees 224 pixels alone
    "swiftformer_xs": {"embed_dims": [8, 16, 24, 32], "layers": [1, 1, 1, 1]},
    "iformer_m_distilled": {},
}


@pytest.mark.parametrize("name", AVERAGED)
def test_without_distillation_a_network_that_averages_its_two_heads_learns(name: str) -> None:
    size = 224 if name.startswith("efficientformer") else 64
    student = tiny_student(name=name, args=AVERAGED[name], distilled=False, image_size=size)
    images = torch.randn(2, 3, size, size)
    output = student.eval()(images)
    assert output.dist_logits is None
    torch.testing.assert_close(output.cls_logits, student.backbone(images))
    student.train()(images).cls_logits.sum().backward()
    learned = [name for name, tensor in student.named_parameters() if "head_dist" in name and tensor.grad is not None]
    assert learned


@pytest.mark.parametrize("name", ["pit_ti_distilled_224", "pit_ti_224"])
def test_pit_answers_with_both_heads(name: str) -> None:
    student = tiny_student(name=name, args={"base_dims": [8, 8, 8], "depth": [1, 1, 1]}, image_size=64)
    assert student.backbone.pretrained_cfg["architecture"] == "pit_ti_distilled_224"
    output = answer(student, torch.randn(2, 3, 64, 64))
    assert output.cls_logits.shape == (2, 3)
    assert output.dist_logits is not None
    assert not torch.allclose(output.cls_logits, output.dist_logits)


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("xcit_nano_12_p16_224", {"embed_dim": 32, "depth": 1, "num_heads": 2, "cls_attn_layers": 1}, 32),
        ("efficientvit_m0", {}, 64),  # both say their patch size as one integer
        ("pvt_v2_b0", {"depths": [1, 1, 1, 1]}, 64),  # patches of 7 pixels, 4 apart
        ("vit_tiny_patch16_224", {**STUDENT_ARGS, "dynamic_img_size": True, "dynamic_img_pad": True}, 20),
    ],
)
def test_any_size_that_every_pixel_of_is_seen(name: str, args: dict[str, Any], size: int) -> None:
    student = tiny_student(name=name, args=args, distilled=False, image_size=size)
    assert student(torch.randn(2, 3, size, size)).cls_logits.shape == (2, 3)


@pytest.mark.parametrize(("size", "patch", "tokens"), [(16, 8, 6), (32, 8, 18), (24, 4, 38)])
def test_any_image_size_and_patch_size(size: int, patch: int, tokens: int) -> None:
    student = tiny_student(image_size=size, args={**STUDENT_ARGS, "patch_size": patch}, classes=tuple("abcdefg"))
    images = torch.randn(1, 3, size, size)
    assert student.backbone.forward_features(images).shape == (1, tokens, 32)
    assert answer(student, images).cls_logits.shape == (1, 7)


def test_args_and_drop_path_reach_timm() -> None:
    student = tiny_student(args={**STUDENT_ARGS, "depth": 3}, drop_path=0.4)
    assert len(student.backbone.blocks) == 3
    assert student.backbone.blocks[2].drop_path1.drop_prob == pytest.approx(0.4)


def test_drop_path_only_acts_in_training() -> None:
    student = tiny_student(drop_path=0.9)
    assert not torch.equal(answer(student.train()).cls_logits, answer(student.eval()).cls_logits)
    assert torch.equal(answer(student.eval()).cls_logits, answer(student.eval()).cls_logits)


def test_first_weights_follow_from_the_seed() -> None:
    torch.rand(5)
    first, again, other = (tiny_student(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["backbone.dist_token"], other["backbone.dist_token"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_gives_its_weights(tmp_path: Path, suffix: str) -> None:
    state = tiny_student(seed=5).backbone.state_dict()
    file = tmp_path / f"weights{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save({"model": state}, file)
    loaded = tiny_student(checkpoint=str(file)).backbone.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"name": "test_resnet", "args": {}}, "is a ResNet, which a distillation token cannot be grafted onto"),
        (
            {"name": "deit_tiny_destilled_patch16_224"},
            r"is not a timm model \(nearest: deit_tiny_distilled_patch16_224",
        ),
        ({"name": None}, "student.name: is not set"),
        ({"image_size": 20}, "data.image_size: 20 is not a multiple of student.name's patch size 8; use 16 or 24"),
        ({"image_size": 6}, "data.image_size: 6 is not a multiple of student.name's patch size 8; use 8$"),
        ({"args": {**STUDENT_ARGS, "num_heads": 5}}, "cannot be created"),
        ({"args": {"no_such_argument": 1}}, "cannot be created .*no_such_argument"),
        (
            {"name": "vit_tiny_patch16_224", "args": {**STUDENT_ARGS, "global_pool": ""}},
            r"returns \[2, 6, 3\] for two images, not \[2, 3\] finite logits; see student.args",
        ),
        (
            {"name": "test_convnext", "args": {"global_pool": ""}, "distilled": False, "image_size": 64},
            r"returns \[2, 3, 2, 2\] for two images, not \[2, 3\]",
        ),
        ({"name": "xcit_nano_12_p16_224", "args": {}}, "is a Xcit, .*: it is built around one class token"),
        ({"name": "convnext_atto", "args": {}}, "is a ConvNeXt, .*: it has no class token to stand beside"),
        ({"pretrained": True, "checkpoint": "here"}, "exclude each other"),
        ({"checkpoint": "nowhere"}, "student.checkpoint: nowhere is not there"),
        ({"pretrained": True, "args": {}, "image_size": 224}, "check the network, or give a checkpoint"),
    ],
)
def test_a_student_that_cannot_be_is_refused_in_one_line(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        tiny_student(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"args": {**STUDENT_ARGS, "embed_dim": 64}}, r"blocks\.0\.\S+ is \["),
        ({"args": {**STUDENT_ARGS, "depth": 3}}, r"blocks\.2\.\S+ is unknown"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    save_file(tiny_student(**change).backbone.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=f"student.checkpoint: .*{reason}"):
        tiny_student(checkpoint=str(tmp_path / "other.safetensors"))


def test_the_fused_head_is_the_mean_of_softmaxes_or_of_logits() -> None:
    output = StudentOutput(torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]]))
    assert output.dist_logits is not None
    softmaxes = (output.cls_logits.softmax(-1) + output.dist_logits.softmax(-1)) / 2
    mean_logits = ((output.cls_logits + output.dist_logits) / 2).softmax(-1)
    torch.testing.assert_close(head_probabilities(output)["fused"], softmaxes)
    torch.testing.assert_close(head_probabilities(output, "logits")["fused"], mean_logits)
    assert not torch.allclose(softmaxes, mean_logits)


def test_a_student_of_one_head_has_no_dist_and_no_fused_head() -> None:
    assert list(head_probabilities(StudentOutput(torch.zeros(1, 2)))) == ["cls"]


@pytest.mark.parametrize(
    ("channels_last", "expected"), [(None, True), (True, True), (False, False)], ids=["default", "yes", "no"]
)
def test_the_memory_format_is_chosen(channels_last: bool | None, expected: bool) -> None:
    student = tiny_student(name="test_resnet", args={}, distilled=False, channels_last=channels_last)
    assert student.backbone.conv1[0].weight.is_contiguous(memory_format=torch.channels_last) == expected


def test_a_vit_is_contiguous_unless_asked_otherwise() -> None:
    formats = [tiny_student(channels_last=choice).backbone.patch_embed.proj.weight for choice in (None, True)]
    assert [weight.is_contiguous() for weight in formats] == [True, False]


def test_a_persons_own_timm_model_can_be_wrapped() -> None:
    backbone = timm.create_model(STUDENT, num_classes=3, img_size=16, **STUDENT_ARGS)
    assert TimmStudent(backbone).has_distillation_token
