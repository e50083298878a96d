"""What is seen inside a student is what its weights do: attention, cosines and alignment, equal to a hand's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from deit_kd.cli import main
from deit_kd.interfaces import InputError
from deit_kd.metrics import followed
from deit_kd.models.create import chosen_attention
from deit_kd.probes import (
    block_attention,
    blocks,
    channels_of_stages,
    input_token_cosine,
    pooled,
    recorded,
    rollout,
    stages,
    token_attention,
)
from tests.helpers import SEVEN_CLASSES, heads_in, refused, short

CPU = torch.device("cpu")


def student(attention: str = "plain") -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32}
    with chosen_attention(attention, CPU):
        return timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **shape).eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_attention_is_the_softmax_that_a_hand_computes_and_its_rows_sum_to_one() -> None:
    model = student()
    found = block_attention(model, images())
    assert [tuple(weights.shape) for weights in found] == [(2, 2, 18, 18)] * 3
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images()))
        for block, weights in zip(model.blocks, found, strict=True):
            qkv = block.attn.qkv(block.norm1(x)).reshape(2, 18, 3, 2, 16).permute(2, 0, 3, 1, 4)
            by_hand = (qkv[0] @ qkv[1].transpose(-1, -2) / 16**0.5).softmax(-1)
            torch.testing.assert_close(weights, by_hand)
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 18))
            x = block(x)


def test_a_fused_attention_is_refused_because_it_holds_no_weights() -> None:
    with pytest.raises(InputError, match="use plain"):
        block_attention(student("fused"), images())


def test_token_attention_leaves_out_both_tokens_and_keeps_the_places_of_the_patches() -> None:
    model = student()
    seen = token_attention(model, images(), leading_tokens=2)
    last = block_attention(model, images())[-1]
    assert seen.last_block.shape == (2, 2, 2, 4, 4)
    assert torch.equal(seen.last_block[1, 0, 1].flatten(), last[1, 0, 1, 2:])
    assert seen.rollout is not None
    assert seen.rollout.shape == (2, 2, 4, 4)


def test_a_pit_has_attention_but_no_rollout_because_its_stages_pool_the_patches() -> None:
    with chosen_attention("plain", CPU):
        model = timm.create_model("pit_ti_distilled_224", img_size=64).eval()
    pixels = torch.randn(1, 3, 64, 64)
    seen = token_attention(model, pixels, leading_tokens=2)
    assert seen.rollout is None
    assert seen.last_block.shape[1:3] == (8, 2)  # heads, tokens
    with torch.no_grad(), recorded(blocks(model)) as said:
        model(pixels)
    assert said["block 1"].shape[1] > said["block 12"].shape[1] == 2 + seen.last_block.shape[-1] ** 2


def test_rollout_of_two_blocks_is_that_of_a_hand() -> None:
    first, second = torch.rand(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    eye = torch.eye(4)
    by_hand = (second.mean(1) / 2 + eye / 2) @ (first.mean(1) / 2 + eye / 2)
    torch.testing.assert_close(rollout([first, second], 2), by_hand[:, :2, 2:])
    assert torch.all(by_hand[:, :2, 2:].sum(-1) < 1)  # the rest stays on the tokens


def test_recording_a_network_changes_nothing_and_leaves_no_hooks() -> None:
    model = student()
    with torch.no_grad():
        before = model(images())
        with recorded(blocks(model)) as said:
            assert torch.equal(model(images()), before)
    assert list(said) == ["block 1", "block 2", "block 3"]
    assert not any(module._forward_hooks for module in model.modules())


def test_the_last_block_that_is_recorded_is_what_the_norm_reads() -> None:
    model = student()
    with torch.no_grad(), recorded(blocks(model)) as said:
        features = model.forward_features(images())
    torch.testing.assert_close(model.norm(said["block 3"]), features)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet10t", ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("test_vit", [f"block {number}" for number in range(1, 7)]),
        ("regnety_002", ["stem", "s1", "s2", "s3", "s4"]),
    ],
)
def test_a_teacher_is_compared_by_its_blocks_or_stages(name: str, expected: list[str]) -> None:
    assert list(stages(timm.create_model(name))) == expected


def test_a_network_without_named_stages_has_none_to_compare() -> None:
    assert stages(nn.Linear(2, 2)) == {}


def test_pooling_leaves_out_the_tokens_and_averages_places() -> None:
    tokens = torch.tensor([[[9.0], [9.0], [1.0], [3.0]]])
    assert pooled(tokens, 2).tolist() == [[2.0]]
    assert pooled(torch.arange(8.0).reshape(1, 2, 2, 2), 2).tolist() == [[1.5, 5.5]]
    assert pooled(torch.arange(12.0).reshape(1, 2, 2, 3), 0, channels=3).tolist() == [[4.5, 5.5, 6.5]]


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet10t", "convnext_atto"])
def test_a_stage_pools_to_its_channels(name: str) -> None:
    model = timm.create_model(name).eval()
    with torch.no_grad(), recorded(stages(model)) as said:
        model(torch.zeros(1, 3, 224, 224))
    channels = channels_of_stages(model)
    assert {stage: pooled(output, 0, channels[stage]).shape[1] for stage, output in said.items()} == channels


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "pit_ti_distilled_224"])
def test_the_input_cosine_is_one_for_a_copied_token(name: str) -> None:
    model = timm.create_model(name)
    assert abs(input_token_cosine(model)) < 0.5
    with torch.no_grad():
        if name.startswith("pit"):
            model.cls_token[:, 1] = model.cls_token[:, 0]
        else:
            model.dist_token.copy_(model.cls_token)
    assert input_token_cosine(model) == pytest.approx(1)


def test_heads_follow_the_label_the_teacher_or_neither() -> None:
    labels, teacher = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 1, 1])
    assert followed({"cls": torch.tensor([0, 1, 2, 1])}, labels, teacher) == {
        "cls": {"label": 1, "teacher": 1, "neither": 1}
    }


def diagnosis(folder: Path, *arguments: str) -> Any:
    assert main(["eval", *arguments, "--diagnose", "true", "--to", str(folder)]) == 0
    return json.loads((folder / "diagnosis.json").read_text())


def test_a_diagnosis_holds_tokens_layers_attention_and_whom_the_heads_follow(runs: Path, tmp_path: Path) -> None:
    found = diagnosis(tmp_path, str(runs / "distilled"))
    assert [layer["layer"] for layer in found["tokens"]] == ["input", "block 1", "block 2"]
    assert not found["collapsed"]
    assert (len(found["cka"]["matrix"]), len(found["cka"]["matrix"][0])) == (2, len(found["cka"]["teacher"]))
    assert min(min(row) for row in found["cka"]["matrix"]) > 0  # 0: a block without patches, which nothing is like
    heads = heads_in(tmp_path)
    wrong = round(heads["n"] * heads["disagreement"]["matrix"][0][heads["disagreement"]["names"].index("teacher")])
    assert {head: sum(counts.values()) for head, counts in found["followed"].items()} == dict.fromkeys(
        ("cls", "dist", "fused"), wrong
    )
    assert len(found["gallery"]) == len(found["disputed"]) == 8
    distances = [portrait["distance_of_heads"] for portrait in found["gallery"]]
    assert distances == sorted(distances, reverse=True)
    assert list(found["gallery"][0]["attention"]["dist"]) == ["last block", "rollout", "head 1", "head 2"]
    with Image.open(tmp_path / "attention/gallery-1.png") as strip:
        assert strip.size == (9 * 192 + 8 * 4, 192)  # the image, four maps of each token, and what is between


def test_chosen_images_are_shown_in_the_order_given(runs: Path, tmp_path: Path) -> None:
    found = diagnosis(tmp_path, str(runs / "distilled"), "--images", '["gate/004.png", "<b>cup/000.png"]')
    assert [portrait["path"] for portrait in found["gallery"]] == ["gate/004.png", "<b>cup/000.png"]


def test_an_image_that_is_not_there_is_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(runs / "distilled"), "--diagnose", "true", "--to", str(tmp_path / "out")]
    assert "nearest: gate/004.png" in refused([*arguments, "--images", '["gate/044.png"]'], capsys)
    assert not (tmp_path / "out").exists()


def test_a_student_without_the_token_shows_its_class_token_alone(runs: Path, tmp_path: Path) -> None:
    found = diagnosis(tmp_path, str(runs / "plain"))
    assert found["tokens"] == []
    assert found["cka"] is found["followed"] is None
    assert list(found["gallery"][0]["attention"]) == ["cls"]


@pytest.mark.parametrize("name", ["hrnet_w18_small", "mobilevit_xxs", "coat_lite_tiny"])
def test_a_teacher_whose_layers_say_nothing_about_whole_images_is_not_compared(
    runs: Path, tmp_path: Path, name: str
) -> None:
    other = ["--teacher.name", name, "--teacher.image_size", "64"]
    assert diagnosis(tmp_path, str(runs / "distilled"), *other)["cka"] is None


def test_registers_without_a_class_token_are_not_shown_as_one(runs: Path, tmp_path: Path) -> None:
    name = ["--student.name", "vit_medium_patch16_reg4_gap_256"]
    assert main(["train", *short(runs / "photos", tmp_path / "run", distill__kind="none"), *name]) == 0
    found = diagnosis(tmp_path / "to", str(tmp_path / "run"))
    assert found["gallery"][0]["attention"] == {}


def test_tokens_that_are_one_at_the_input_are_a_warning(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model(f"local-dir:{runs / 'distilled/student'}", pretrained=True)
    model.dist_token.data.copy_(model.cls_token)
    torch.save(model.state_dict(), tmp_path / "collapsed.pth")
    (tmp_path / "config.json").write_text(json.dumps({"label_names": sorted(SEVEN_CLASSES)}))
    shape = '{"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}'
    found = diagnosis(
        tmp_path / "out",
        str(tmp_path / "collapsed.pth"),
        *("--student.name", "deit_tiny_distilled_patch16_224", "--student.args", shape),
        *("--data.root", str(runs / "photos"), "--data.image_size", "16", "--data.workers", "0"),
    )
    assert found["collapsed"]
    assert "warning: the two tokens are the same at the input" in capsys.readouterr().out
