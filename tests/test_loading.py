"""Weights from anywhere fit a student, or say why not, and every tensor is accounted for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from deit_kd import InputError, TimmStudent
from deit_kd.interfaces import Preprocessing
from deit_kd.models.layouts import from_transformers, to_transformers
from deit_kd.optim import build_optimizer, build_schedule
from deit_kd.origins import open_origin
from tests.helpers import FIVE_CLASSES
from tests.tiny_parts import save_student, student_of_five

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
DISTILLED, PLAIN = "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"


def source(name, **args):
    torch.manual_seed(7)
    model = timm.create_model(name, **{"num_classes": 5, "img_size": 32, **TINY, **args})
    for parameter in model.parameters():  # biases that start at 0 would hide a tensor that was not loaded
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def saved(folder: Path, state, kind):
    """Write `state` as `kind` and return what a recipe would name."""
    if kind == "deit .pth":
        torch.save({"model": state, "epoch": 3}, folder / "checkpoint.pth")
        return str(folder / "checkpoint.pth")
    if kind == "DDP .pth":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, folder / "checkpoint.pth")
        return str(folder / "checkpoint.pth")
    if kind == "transformers":
        save_file(to_transformers(state), folder / "model.safetensors")
        return str(folder)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return f"local-dir:{folder}" if kind == "local-dir" else str(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["deit .pth", "DDP .pth", "safetensors", "local-dir", "transformers"])
def test_same_weights_from_every_kind_of_file(tmp_path: Path, kind):
    model = source(DISTILLED)
    loaded = student_of_five(checkpoint=saved(tmp_path, model.state_dict(), kind))
    assert all(torch.equal(value, loaded.backbone.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.account.initialised == loaded.account.left_out == []


def test_transformers_names_go_there_and_back():
    state = source(DISTILLED).state_dict()
    back = from_transformers(to_transformers(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_deit3_as_it_was_published_is_read(tmp_path: Path):
    model = source("deit3_small_patch16_224")
    published = {re.sub(r"ls(\d)\.gamma$", r"gamma_\1", name): tensor for name, tensor in model.state_dict().items()}
    assert "blocks.1.gamma_2" in published
    loaded = student_of_five(
        "deit3_small_patch16_224", distilled=False, checkpoint=saved(tmp_path, published, "deit .pth")
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images).cls_logits, model(images))


def test_eva_keeps_its_own_names_of_layer_scales(tmp_path: Path):
    model = source("eva02_tiny_patch14_224", img_size=28, init_values=0.1)
    assert "blocks.0.gamma_1" in model.state_dict()
    checkpoint = saved(tmp_path, model.state_dict(), "safetensors")
    args = {**TINY, "init_values": 0.1}
    loaded = student_of_five("eva02_tiny_patch14_224", distilled=False, checkpoint=checkpoint, args=args, image_size=28)
    assert torch.equal(loaded.backbone.blocks[0].gamma_1, model.blocks[0].gamma_1)


@pytest.mark.parametrize("plain", [True, False])
def test_pits_plain_weights_start_its_distilled_twin(tmp_path: Path, plain: bool):
    args = {"base_dims": [8, 8, 8], "depth": [1, 1, 1]}
    torch.manual_seed(7)
    model = timm.create_model("pit_ti_224", num_classes=5, img_size=64, **args)
    checkpoint = saved(tmp_path, model.state_dict(), "safetensors")
    name = "pit_ti_224" if plain else "pit_ti_distilled_224"
    loaded = student_of_five(name, args=args, checkpoint=checkpoint, image_size=64)
    assert torch.equal(loaded.backbone.cls_token[:, :1], model.cls_token)
    assert loaded.account.derived["dist_token"] == "cls_token"
    assert torch.equal(loaded.backbone.head_dist.weight, model.head.weight)


def test_transformers_own_checkpoint_answers_the_same(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DeiTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=32,
        patch_size=16,
        layer_norm_eps=1e-6,
        id2label=dict(enumerate(FIVE_CLASSES)),
    )
    theirs = transformers.DeiTForImageClassificationWithTeacher(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = student_of_five(checkpoint=str(tmp_path)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    torch.testing.assert_close(found.cls_logits, expected.cls_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.dist_logits, expected.distillation_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [DISTILLED, PLAIN])
def test_plain_checkpoint_fits_a_student_with_a_token(tmp_path: Path, name):
    """deit and timm crash here."""
    plain = source(PLAIN)
    loaded = student_of_five(name, checkpoint=saved(tmp_path, plain.state_dict(), "deit .pth"))
    assert loaded.account.derived == {
        "head_dist.weight": "head.weight",
        "head_dist.bias": "head.bias",
        "dist_token": "cls_token",
        "pos_embed[dist]": "pos_embed[cls]",
    }
    assert torch.equal(loaded.backbone.head_dist.weight, plain.head.weight)
    assert torch.equal(loaded.backbone.pos_embed[:, 2:], plain.pos_embed[:, 1:])


@pytest.mark.parametrize("name", [DISTILLED, PLAIN])
def test_distilled_checkpoint_fits_a_plain_student(tmp_path: Path, name):
    model = source(DISTILLED)
    loaded = student_of_five(name, distilled=False, checkpoint=saved(tmp_path, model.state_dict(), "deit .pth"))
    assert loaded.account.left_out == ["dist_token", "head_dist.bias", "head_dist.weight", "pos_embed[dist]"]
    expected = torch.cat([model.pos_embed[:, :1], model.pos_embed[:, 2:]], dim=1)
    assert torch.equal(loaded.backbone.pos_embed, expected)


def test_grafted_and_timms_own_token_exchange_weights(tmp_path: Path):
    own = student_of_five(checkpoint=saved(tmp_path, source(DISTILLED).state_dict(), "safetensors")).eval()
    (tmp_path / "grafted").mkdir()
    grafted = student_of_five(PLAIN, checkpoint=str(tmp_path / "model.safetensors")).eval()
    again = student_of_five(checkpoint=saved(tmp_path / "grafted", grafted.backbone.state_dict(), "safetensors")).eval()
    images = torch.randn(2, 3, 32, 32)
    for other in (grafted, again):
        torch.testing.assert_close(other(images), own(images))
        assert not other.account.initialised


def test_new_class_count_draws_both_heads_anew(tmp_path: Path):
    model = source(DISTILLED, num_classes=7)
    loaded = student_of_five(checkpoint=saved(tmp_path, model.state_dict(), "deit .pth"))
    heads = ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]
    assert loaded.account.initialised == heads
    assert loaded.account.left_out == sorted(heads)
    assert torch.equal(loaded.backbone.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_heads_of_other_classes_are_drawn_anew_even_where_they_fit(tmp_path: Path):
    path = saved(tmp_path, source(DISTILLED).state_dict(), "local-dir")
    said = {"architecture": DISTILLED, "model_args": TINY}
    (tmp_path / "config.json").write_text(json.dumps({**said, "label_names": list("vwxyz")}))
    assert "head.weight" in student_of_five(checkpoint=path).account.initialised
    (tmp_path / "config.json").write_text(json.dumps({**said, "label_names": list(FIVE_CLASSES)}))
    assert "head.weight" in student_of_five(checkpoint=path).account.loaded


def test_heads_can_be_asked_to_be_new(tmp_path: Path):
    model = source(DISTILLED)
    loaded = student_of_five(checkpoint=saved(tmp_path, model.state_dict(), "safetensors"), new_heads=True)
    assert not torch.equal(loaded.backbone.head.weight, model.head.weight)
    assert len(loaded.account.initialised) == 4


@pytest.mark.parametrize("name", [DISTILLED, PLAIN])
def test_new_resolution_keeps_the_rows_of_both_tokens(tmp_path: Path, name):
    model = source(DISTILLED)
    loaded = student_of_five(name, checkpoint=saved(tmp_path, model.state_dict(), "deit .pth"), image_size=64)
    positions = loaded.backbone.pos_embed
    assert torch.equal(positions[:, :2], model.pos_embed[:, :2])
    expected = resample_abs_pos_embed(model.pos_embed, new_size=[4, 4], num_prefix_tokens=2)
    torch.testing.assert_close(positions, expected)
    assert loaded.account.interpolated == {"pos_embed": "[1, 4, 32] -> [1, 16, 32]"}


def test_new_patch_size_resamples_the_patch_embedding(tmp_path: Path):
    path = saved(tmp_path, source(DISTILLED).state_dict(), "deit .pth")
    loaded = student_of_five(checkpoint=path, args={**TINY, "patch_size": 8})
    assert list(loaded.account.interpolated) == ["pos_embed", "patch_embed.proj.weight"]


def test_pit_keeps_its_tokens_and_takes_another_size(tmp_path: Path):
    small = {"base_dims": (16, 16, 16), "depth": (1, 1, 1), "heads": (1, 1, 1)}
    torch.manual_seed(0)
    plain = timm.create_model("pit_ti_224", img_size=64, num_classes=5, **small)
    path = saved(tmp_path, plain.state_dict(), "deit .pth")
    loaded = student_of_five("pit_ti_distilled_224", checkpoint=path, args=small, image_size=96)
    assert loaded.account.derived["dist_token"] == "cls_token"
    assert "pos_embed" in loaded.account.interpolated


def test_published_weights_fit_another_class_count_and_size(monkeypatch):
    native = timm.create_model("test_vit.r160_in1k")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: native.state_dict())
    loaded = student_of_five("test_vit.r160_in1k", pretrained=True, args={})
    assert set(loaded.account.initialised) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert loaded.account.derived == {"dist_token": "cls_token", "pos_embed[dist]": "pos_embed[cls]"}
    assert list(loaded.account.interpolated) == ["pos_embed"]
    assert torch.equal(loaded.backbone.norm.weight, native.norm.weight)


def test_every_tensor_of_the_model_is_in_the_account_once(tmp_path: Path):
    model = source(PLAIN, num_classes=7)
    account = student_of_five(checkpoint=saved(tmp_path, model.state_dict(), "deit .pth"), image_size=64).account
    names = [*account.loaded, *account.interpolated, *account.derived, *account.initialised]
    assert len(names) == len(set(names))
    own = set(student_of_five().backbone.state_dict()) | {"pos_embed[cls]", "pos_embed[dist]"}
    assert set(names) == own


def test_account_is_told_line_by_line(tmp_path: Path):
    account = student_of_five(
        checkpoint=saved(tmp_path, source(PLAIN).state_dict(), "deit .pth"), image_size=64
    ).account
    lines = account.lines()
    assert lines[0].startswith("weights: 32 tensors loaded from ")
    assert lines[1] == "weights: interpolated: pos_embed [1, 4, 32] -> [1, 16, 32]"
    assert "dist_token from cls_token" in lines[2]
    assert account.record()["source"].endswith("checkpoint.pth")


def drop(name):
    return lambda state: {other: tensor for other, tensor in state.items() if other != name}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop("blocks.0.attn.qkv.weight"), "blocks.0.attn.qkv.weight is missing"),
        (drop("cls_token"), "cls_token is missing"),
        (lambda state: {**state, "blocks.2.norm1.weight": torch.ones(32)}, "blocks.2.norm1.weight is unknown"),
        (lambda state: {**state, "norm.weight": torch.ones(16)}, r"norm.weight is \[16\], not \[32\]"),
        (lambda state: {**state, "pos_embed": torch.ones(1, 7, 32)}, r"pos_embed is \[1, 5, 32\], not \[1, 4, 32\]"),
    ],
)
def test_weights_that_cannot_be_adapted_are_refused(tmp_path: Path, change, reason):
    path = saved(tmp_path, change(source(DISTILLED).state_dict()), "deit .pth")
    with pytest.raises(InputError, match=reason):
        student_of_five(checkpoint=path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model": Path("code")}, "not unpickled"),
        ([1, 2], "holds no state dict"),
        ({"model": {"a": 1}}, "holds no state dict"),
    ],
)
def test_file_that_is_no_state_dict_is_refused(tmp_path: Path, content, reason):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match=reason):
        student_of_five(checkpoint=str(tmp_path / "x.pth"))


def test_runs_own_student_must_be_whole(tmp_path: Path):
    path = saved(tmp_path, source(PLAIN).state_dict(), "deit .pth")
    with pytest.raises(InputError, match="is missing"):
        student_of_five(checkpoint=path, strict=True)


def test_local_dir_says_what_the_student_saw(tmp_path: Path):
    built = student_of_five(args={**TINY, "patch_size": 8})
    seen = Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 1.0)
    save_student(built, tmp_path / "student", FIVE_CLASSES, seen)
    origin = open_origin("student.checkpoint", tmp_path / "student")
    assert origin.classes == FIVE_CLASSES
    assert origin.architecture == DISTILLED
    assert origin.model_args["patch_size"] == 8
    assert origin.preprocessing[:5] == (32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 1.0)


@pytest.mark.parametrize(
    ("freeze", "learns", "rests"),
    [
        ("none", {"patch_embed", "pos_embed", "cls_token", "blocks", "norm", "head", "head_dist"}, set()),
        ("patch_embed", {"pos_embed", "cls_token", "blocks", "norm", "head", "head_dist"}, {"patch_embed"}),
        ("backbone", {"cls_token", "head", "head_dist"}, {"patch_embed", "pos_embed", "blocks", "norm"}),
        ("all_but_heads", {"head", "head_dist"}, {"patch_embed", "pos_embed", "cls_token", "blocks", "norm"}),
    ],
)
def test_frozen_parts_rest(freeze, learns, rests):
    built = student_of_five(PLAIN, freeze=freeze)
    before = {name: parameter.detach().clone() for name, parameter in built.backbone.named_parameters()}
    optimizer = optimiser_of(built)
    output = built.train()(torch.randn(2, 3, 32, 32))
    (output.cls_logits.square().sum() + output.dist_logits.square().sum()).backward()
    optimizer.step()
    moved = {n.split(".")[0] for n, p in built.backbone.named_parameters() if not torch.equal(p, before[n])}
    assert moved == learns
    assert {name.split(".")[0] for name in before} == learns | rests


def optimiser_of(built, layer_decay=None):
    return build_optimizer(
        built.backbone,
        name="adamw",
        lr=1.0,
        lr_reference_batch=0,
        weight_decay=0.05,
        layer_decay=layer_decay,
        args={},
        batch_size=4,
    )


def by_parameter(built, optimizer, field):
    names = {parameter: name for name, parameter in built.backbone.named_parameters()}
    return {names[parameter]: group[field] for group in optimizer.param_groups for parameter in group["params"]}


@pytest.mark.parametrize("name", [DISTILLED, PLAIN])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_tokens_positions_biases_and_norms_are_not_decayed(name, layer_decay):
    built = student_of_five(name)
    decay = by_parameter(built, optimiser_of(built, layer_decay), "weight_decay")
    decayed = {parameter for parameter, value in decay.items() if value}
    assert decayed == {
        parameter for parameter, tensor in built.backbone.named_parameters()
        if parameter.endswith("weight") and tensor.ndim > 1
    }  # fmt: skip
    assert {"head.weight", "head_dist.weight"} <= decayed


@pytest.mark.parametrize("name", [DISTILLED, PLAIN])
def test_layers_learn_the_slower_the_deeper_they_lie(name):
    built = student_of_five(name)
    scale = by_parameter(built, optimiser_of(built, 0.5), "lr_scale")
    tokens = {"cls_token", "pos_embed", "dist_token"} & scale.keys()
    assert {scale[token] for token in tokens} == {scale["patch_embed.proj.weight"]} == {0.125}
    assert (scale["blocks.0.norm1.weight"], scale["blocks.1.norm1.weight"]) == (0.25, 0.5)
    assert scale["head.weight"] == scale["head_dist.weight"] == scale["head_dist.bias"] == 1.0


def test_schedule_keeps_the_layers_apart():
    built = student_of_five(PLAIN)
    optimizer = optimiser_of(built, 0.5)
    fields = {"warmup_epochs": 1, "warmup_lr": 0.0, "min_lr": 0.0, "epochs": 4, "steps_per_epoch": 2}
    schedule = build_schedule(optimizer, **fields)
    for step in (1, 3, 6):
        schedule.step_update(step)
        lr = by_parameter(built, optimizer, "lr")
        assert lr["head.weight"] == pytest.approx(8 * lr["cls_token"]) != 0


def test_learning_rate_may_stay_fixed():
    optimizer = optimiser_of(student_of_five(PLAIN))
    fields = {"warmup_epochs": 0, "warmup_lr": 0.0, "min_lr": 1.0, "epochs": 4, "steps_per_epoch": 2}
    schedule = build_schedule(optimizer, **fields)
    for step in range(8):
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == 1.0


def test_cnn_cannot_be_frozen():
    with pytest.raises(InputError, match=r"student\.freeze: a frozen BatchNorm"):
        student_of_five("test_resnet", args={}, distilled=False, freeze="backbone")


def test_drop_path_of_loaded_weights_is_the_recipes(tmp_path: Path):
    path = saved(tmp_path, source(PLAIN, drop_path_rate=0.5).state_dict(), "deit .pth")
    built = student_of_five(checkpoint=path, drop_path=0.2)
    assert built.backbone.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    assert isinstance(built, TimmStudent)
