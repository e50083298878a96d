"""A token grafted onto a plain timm ViT leaves its class head alone, and is refused where it cannot stand."""

from __future__ import annotations

import pytest
import timm
import torch

from benchmarks.zoo import TokenHidden
from deit_kd import InputError, TimmStudent
from deit_kd.models.tokens import graft, is_grafted
from deit_kd.models.weights import fit_weights
from deit_kd.origins import open_model
from tests.helpers import FIVE_CLASSES, TINY
from tests.tiny_parts import save_student, seen_at, student_of_five

# name, arguments beside TINY, image size
HOSTS = [
    ("vit_tiny_patch16_224", {}, 32),
    ("vit_tiny_patch16_224", {"patch_size": 8}, 32),
    ("vit_tiny_patch16_224", {"global_pool": "avg"}, 32),
    ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}, 32),
    ("vit_tiny_patch16_224", {"pre_norm": True}, 32),
    ("vit_tiny_patch16_224", {"no_embed_class": True, "dynamic_img_size": True}, 32),
    ("vit_tiny_patch16_224", {"dynamic_img_size": True}, 32),
    ("deit_tiny_patch16_224", {}, 32),
    ("deit3_small_patch16_224", {}, 32),  # no_embed_class, layer scale
    ("vit_small_patch14_dinov2", {"img_size": 28}, 28),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 28}, 28),
    ("vit_little_patch16_reg1_gap_256", {}, 32),  # registers, average pooling, but a class token only if asked for
    ("eva02_tiny_patch14_224", {"img_size": 28}, 28),  # rotary and absolute positions, average pooling
    ("eva02_tiny_patch14_224", {"img_size": 28, "global_pool": "token"}, 28),
    ("vit_small_patch16_dinov3", {}, 32),  # rotary positions, four registers
    ("vit_small_patch16_rope_224", {}, 32),
    ("vit_small_patch16_rope_mixed_224", {}, 32),
    ("convit_tiny", {"local_up_to_layer": 1}, 32),  # its first blocks see no token
    ("convit_tiny", {"local_up_to_layer": 1, "global_pool": "avg"}, 32),
    ("vit_relpos_medium_patch16_cls_224", {"init_values": 1.0}, 32),
    ("vit_relpos_base_patch16_clsgap_224", {"init_values": 1.0}, 32),  # relative positions, pooling over patches
    ("vit_srelpos_small_patch16_224", {"init_values": 1.0, "class_token": True}, 32),  # one table for all blocks
]


def host(name, args, size):
    if name == "vit_little_patch16_reg1_gap_256":
        args = {**args, "class_token": True}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **{"img_size": size, **TINY, **args}).eval()
    with torch.no_grad():  # heads and layer scales that start at nearly nothing would hide a difference
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.startswith("head") or "gamma" in parameter_name or parameter_name.endswith("token"):
                parameter.normal_(std=0.5)
    return model


def grafted(plain, name, args, size):
    model = host(name, args, size)
    graft("student.name", model)
    fit_weights("student.checkpoint", model, plain.state_dict(), source="the plain model")
    return model.eval()


@pytest.mark.parametrize(("name", "args", "size"), HOSTS)
def test_class_head_is_the_plain_models_where_the_token_is_masked(name, args, size):
    plain = host(name, args, size)
    model = grafted(plain, name, args, size)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = plain(images)
        with TokenHidden(model.num_prefix_tokens):
            torch.testing.assert_close(TimmStudent(model)(images).cls_logits, expected, rtol=1e-5, atol=1e-5)
        unmasked = TimmStudent(model)(images)
        tokens = model.forward_features(images).shape[1]
    assert tokens == plain.forward_features(images).shape[1] + 1
    assert not torch.allclose(unmasked.cls_logits, expected, rtol=1e-5, atol=1e-5)  # the mask was what did it
    assert unmasked.dist_logits.shape == (2, 5)


@pytest.mark.parametrize(("name", "args", "size"), HOSTS)
def test_token_and_head_start_from_the_class_tokens(name, args, size):
    plain = host(name, args, size)
    model = grafted(plain, name, args, size)
    cls_token, dist_token = model.cls_token[0]
    assert 0.9 < torch.cosine_similarity(cls_token, dist_token, dim=0) < 0.9999
    assert torch.equal(model.head_dist.weight, plain.head.weight)
    assert torch.equal(cls_token, plain.cls_token[0, 0])
    if name.startswith("convit"):
        assert torch.equal(model.pos_embed, plain.pos_embed)
    elif getattr(model, "pos_embed", None) is not None and not model.no_embed_class:
        assert torch.equal(model.pos_embed[:, 1], plain.pos_embed[:, 0])
        assert torch.equal(model.pos_embed[:, 2:], plain.pos_embed[:, 1:])


def test_a_new_token_gets_the_position_after_the_class_tokens():
    model = host("vit_tiny_patch16_224", {}, 32)
    before = model.pos_embed.detach().clone()
    graft("student.name", model)
    assert torch.equal(model.pos_embed[:, :1], before[:, :1])
    assert torch.equal(model.pos_embed[:, 2:], before[:, 1:])


def test_token_and_head_may_start_from_scratch():
    plain = host("vit_tiny_patch16_224", {}, 32)
    model = host("vit_tiny_patch16_224", {}, 32)
    graft("student.name", model)
    account = fit_weights("student.checkpoint", model, plain.state_dict(), source="the plain model", token="scratch")
    assert account.initialised == ["head_dist.weight", "head_dist.bias", "dist_token", "pos_embed[dist]"]
    cls, dist = model.cls_token[0]
    assert abs(torch.cosine_similarity(cls, dist, dim=0)) < 0.5
    assert torch.equal(model.pos_embed[:, 0], plain.pos_embed[:, 0])


def test_average_pooling_stays_over_patches_alone():
    plain = host("vit_tiny_patch16_224", {"global_pool": "avg"}, 32)
    model = grafted(plain, "vit_tiny_patch16_224", {"global_pool": "avg"}, 32)
    features = torch.randn(2, 1 + 1 + 4, 32)
    torch.testing.assert_close(model.pool(features), features[:, 2:].mean(1))
    assert torch.equal(model.fc_norm_dist.weight, plain.fc_norm.weight)


def test_distillation_head_reads_its_token_through_a_copy_of_the_norm_after_pooling():
    plain = host("vit_tiny_patch16_224", {"global_pool": "avg"}, 32)
    torch.nn.init.normal_(plain.fc_norm.weight)
    model = grafted(plain, "vit_tiny_patch16_224", {"global_pool": "avg"}, 32)
    images = torch.randn(2, 3, 32, 32)
    token = plain.fc_norm(model.forward_features(images)[:, 1])
    torch.testing.assert_close(TimmStudent(model)(images).dist_logits, plain.head(token))


def test_grafted_model_takes_another_size():
    model = host("vit_tiny_patch16_224", {}, 32)
    graft("student.name", model)
    before = model.pos_embed[:, :2].clone()
    model.set_input_size(img_size=64)
    assert model.pos_embed.shape[1] == 16 + 2
    assert torch.equal(model.pos_embed[:, :2], before)
    assert TimmStudent(model)(torch.randn(1, 3, 64, 64)).dist_logits.shape == (1, 5)


def test_patch_dropout_spares_both_tokens():
    model = host("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, 64).train()
    graft("student.name", model)
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape[1] == 2 + 8


def test_patch_dropout_spares_both_tokens_of_timms_own_distilled_model():
    model = student_of_five("deit_tiny_distilled_patch16_224", args={**TINY, "patch_drop_rate": 0.5}).backbone.train()
    model.dist_token.data.fill_(100.0)
    kept = model.patch_drop(model._pos_embed(model.patch_embed(torch.randn(8, 3, 32, 32))))
    assert (kept[:, 1] > 50).all()


@pytest.mark.parametrize(
    "args",
    [
        {"reg_tokens": 4},
        {"fc_norm": True},
        {"no_embed_class": True},
        {"pos_embed": "none"},
        {"pos_embed": ""},
        {"pool_include_prefix": True},
    ],
    ids=str,
)
def test_what_timms_distilled_model_would_not_use_is_refused(args):
    with pytest.raises(InputError, match=f"does not use {next(iter(args))}"):
        student_of_five("deit_tiny_distilled_patch16_224", args={**TINY, **args})


def test_both_heads_learn():
    model = host("vit_tiny_patch16_224", {}, 32)
    graft("student.name", model)
    output = TimmStudent(model)(torch.randn(2, 3, 32, 32))
    (output.cls_logits.sum() + output.dist_logits.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.cls_token.grad[0, 1].abs().sum() > 0


def test_plain_name_in_a_recipe_gets_a_token():
    built = student_of_five("vit_tiny_patch16_224")
    assert is_grafted(built.backbone)
    assert built.has_distillation_token
    assert built.account is None


def test_timms_own_token_is_used_where_there_is_one():
    assert not is_grafted(student_of_five("deit_tiny_distilled_patch16_224").backbone)


def test_plain_name_stays_plain_without_distillation():
    assert not student_of_five("vit_tiny_patch16_224", distilled=False).has_distillation_token


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        (
            "vit_base_patch16_siglip_224",
            TINY,
            r"no class token .*to {class_token: true, global_pool: token}",
        ),
        ("vit_little_patch16_reg1_gap_256", TINY, r"no class token .*set student.args to {class_token: true}, or use"),
        ("vit_relpos_small_patch16_224", {**TINY, "class_token": True, "rel_pos_type": "bias"}, "a table of relative"),
        ("beit_base_patch16_224", TINY, "is a Beit, .*: it is built around one class token"),
        ("test_resnet", {}, "is a ResNet, which a distillation token cannot be grafted onto"),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 1, 1)}, "is a SwinTransformer"),
        ("vit_tiny_patch16_224", {**TINY, "global_pool": "prr"}, "pools over its prefix tokens"),
    ],
)
def test_model_without_a_place_for_the_token_is_refused(name, args, reason):
    with pytest.raises(InputError, match=reason):
        student_of_five(name, args=args, image_size=224 if name.startswith("swin") else 32)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_base_patch16_siglip_224", {"class_token": True, "global_pool": "token"}),
        ("vit_little_patch16_reg1_gap_256", {"class_token": True}),
        ("vit_relpos_small_patch16_224", {"class_token": True}),
        ("vit_pe_core_tiny_patch16_384", {"global_pool": "token"}),
    ],
)
def test_what_a_refusal_advises_helps(name, args):
    with pytest.raises(InputError, match=f"set student.args to {{{next(iter(args))}: "):
        student_of_five(name, args=TINY)
    assert student_of_five(name, args={**TINY, **args}).has_distillation_token


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("convit_tiny", {**TINY, "local_up_to_layer": 1}, 32),
        ("vit_relpos_medium_patch16_cls_224", TINY, 32),
        ("pit_ti_224", {"base_dims": [8, 8, 8], "depth": [1, 1, 1]}, 64),
    ],
)
def test_saved_student_is_opened_again(tmp_path, name, args, size):
    built = student_of_five(name, args=args, image_size=size).eval()
    save_student(built, tmp_path / "student", FIVE_CLASSES, seen_at(size))
    opened = TimmStudent(open_model("student", tmp_path / "student")).eval()
    images = torch.randn(2, 3, size, size)
    assert torch.equal(opened(images).dist_logits, built(images).dist_logits)
    again = student_of_five(name, args=args, image_size=size, checkpoint=str(tmp_path / "student"), strict=True).eval()
    assert torch.equal(again(images).cls_logits, built(images).cls_logits)
