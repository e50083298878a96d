"""A student with a third head, which reads the patches: its answers, how they are fused, judged and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from deit_kd.engine import ask
from deit_kd.exports import About, Choices, export
from deit_kd.exports.traced import Answering
from deit_kd.interfaces import (
    Batch,
    InputError,
    Preprocessing,
    StudentOutput,
    head_log_probabilities,
    pair_log_probabilities,
)
from deit_kd.metrics import agreement, judge
from deit_kd.metrics.heads import weighted
from deit_kd.models.create import create_model
from deit_kd.models.state import save_local_dir
from deit_kd.models.tokens import answer_with_patches, dense_logits_of, names_of_heads, read_heads
from deit_kd.origins import open_model
from deit_kd.students import TimmStudent
from tests.helpers import FIVE_CLASSES, ONE_PROCESS, STUDENT, STUDENT_ARGS
from tests.tiny_parts import seen_at, tiny_teacher

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def answers(count: int = 3, images: int = 30, classes: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, classes, generator=generator) for _ in range(count)]


def three_headed(name: str = STUDENT, **options: object) -> torch.nn.Module:
    """Return a network in eval mode that answers with three heads at 32 px, a grid of 4 x 4 patches."""
    torch.manual_seed(0)
    arguments = {**STUDENT_ARGS, **options}
    model = create_model("student.name", name, image_size=32, distilled=True, num_classes=5, **arguments)
    answer_with_patches("distill.terms", model)
    return model.eval()


@pytest.mark.parametrize(("fusion", "change"), [("softmax", lambda x: x.softmax(-1)), ("logits", lambda x: x)])
def test_the_fused_head_of_three_is_the_mean_of_all(fusion: str, change: object) -> None:
    logits = answers()
    mean = torch.stack([change(one) for one in logits]).mean(0)
    output = StudentOutput.of(dict(zip(("cls", "dist", "patch"), logits, strict=True)))
    fused = head_log_probabilities(output, fusion)["fused"].exp()
    torch.testing.assert_close(fused, mean if fusion == "softmax" else mean.softmax(-1))


@pytest.mark.parametrize("fusion", ["softmax", "logits"])
def test_each_two_of_three_heads_are_fused_as_a_student_of_two_would(fusion: str) -> None:
    cls, dist, patch = answers()
    pairs = pair_log_probabilities(StudentOutput(cls, dist, patch_logits=patch), fusion)
    assert list(pairs) == ["fused_cls_dist", "fused_cls_patch", "fused_dist_patch"]
    assert torch.equal(pairs["fused_dist_patch"], head_log_probabilities(StudentOutput(dist, patch), fusion)["fused"])


def test_two_heads_have_no_pairs() -> None:
    assert pair_log_probabilities(StudentOutput(*answers(2))) == {}


def test_a_judgement_of_three_heads_scores_each_and_every_pair() -> None:
    cls, dist, patch = answers()
    judged = judge(
        StudentOutput(cls, dist, patch_logits=patch),
        torch.arange(30) % 7,
        teacher_logits=cls,
        others={},
        fusion="logits",
        seed=0,
    )
    assert list(judged["heads"]) == [
        *("cls", "dist", "patch", "fused", "fused_cls_dist", "fused_cls_patch", "fused_dist_patch"),
        *("fused_softmax", "fused_logits"),
    ]
    assert None not in judged["heads"].values()
    assert judged["disagreement"]["names"] == ["truth", "cls", "dist", "patch", "fused", "teacher"]


@pytest.mark.parametrize("fusion", ["softmax", "logits"])
def test_a_third_of_the_weight_on_cls_is_the_fusion_of_three(fusion: str) -> None:
    output = StudentOutput.of(dict(zip(("cls", "dist", "patch"), answers(), strict=True)))
    torch.testing.assert_close(weighted(fusion, output, 1 / 3), head_log_probabilities(output, fusion)["fused"])


def test_agreement_of_three_heads_names_every_pair() -> None:
    predictions = {head: torch.zeros(2, dtype=torch.long) for head in ("cls", "dist", "patch", "teacher")}
    found = agreement(predictions, 2, ONE_PROCESS)
    assert list(found) == ["cls_teacher", "dist_teacher", "patch_teacher", "cls_dist", "cls_patch", "dist_patch"]
    assert set(found.values()) == {1.0}


STUDENTS = {
    "timm's own": (STUDENT, {}),
    "grafted": ("vit_tiny_patch16_224", {}),
    "grafted, with registers": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "grafted, with a norm after pooling": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
}


@pytest.mark.parametrize(("name", "options"), STUDENTS.values(), ids=STUDENTS)
def test_the_patch_head_is_the_mean_over_places_of_the_dense_logits(name: str, options: dict[str, object]) -> None:
    model = three_headed(name, **options)
    with torch.no_grad():
        last = model.forward_features(IMAGES)
        for grid in ((4, 4), (2, 2), (1, 2), (1, 1)):
            dense = dense_logits_of(model, last, grid)
            assert dense.shape == (2, *grid, 5)
            torch.testing.assert_close(dense.mean((1, 2)), read_heads(model, IMAGES).patch_logits)


@pytest.mark.parametrize(("name", "options"), STUDENTS.values(), ids=STUDENTS)
def test_the_dense_logits_are_the_distillation_heads_answer_to_each_patch_token(
    name: str, options: dict[str, object]
) -> None:
    model: Any = three_headed(name, **options)
    norm = getattr(model, "fc_norm_dist", torch.nn.Identity())
    if not isinstance(norm, torch.nn.Identity):
        torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        last = model.forward_features(IMAGES)
        expected = model.head_dist(norm(last[:, -16:]))
        torch.testing.assert_close(dense_logits_of(model, last, (4, 4)).flatten(1, 2), expected)


@pytest.mark.parametrize("grid", [(3, 3), (7, 5)])
def test_any_grid_is_averaged_as_adaptive_pooling_does(grid: tuple[int, int]) -> None:
    model = three_headed()
    with torch.no_grad():
        last = model.forward_features(IMAGES)
        maps = model.head_dist(last[:, 2:]).mT.unflatten(2, (4, 4))
        expected = torch.nn.functional.adaptive_avg_pool2d(maps, grid).movedim(1, -1)
        torch.testing.assert_close(dense_logits_of(model, last, grid), expected)


def test_a_third_head_adds_no_parameter_and_changes_no_other_head() -> None:
    with_patches, without = three_headed(), three_headed()
    without.answers_with_patches = False  # type: ignore[assignment]
    assert with_patches.state_dict().keys() == without.state_dict().keys()
    assert names_of_heads(without) == ("cls", "dist")
    three, two = read_heads(with_patches, IMAGES).logits, read_heads(without, IMAGES).logits
    assert all(torch.equal(three[name], logits) for name, logits in two.items())
    assert list(three) == ["cls", "dist", "patch"]


@pytest.mark.parametrize(
    ("name", "distilled", "options", "reason"),
    [
        ("deit_tiny_patch16_224", False, STUDENT_ARGS, "no distillation token"),
        ("levit_128s", True, {}, "no distillation token"),
        ("pit_ti_distilled_224", True, {}, "without its patches"),
        (STUDENT, True, {**STUDENT_ARGS, "patch_drop_rate": 0.5}, "drops patches"),
    ],
)
def test_a_student_whose_head_cannot_read_every_patch_is_refused(
    name: str, distilled: bool, options: dict[str, object], reason: str
) -> None:
    size = 32 if options else 64
    model = create_model("student.name", name, image_size=size, distilled=distilled, num_classes=5, **options)
    with pytest.raises(InputError, match=rf"student\.name: the model .*{reason}.*; use a vit_"):
        answer_with_patches("student.name", model)


def test_an_empty_batch_has_an_empty_answer_of_each_head() -> None:
    output = ask(TimmStudent(three_headed()), IMAGES[:0])
    assert [tuple(logits.shape) for logits in output.logits.values()] == 3 * [(0, 5)]


def about() -> About:
    seen = Preprocessing(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", 0.9)
    return About(STUDENT, STUDENT_ARGS, FIVE_CLASSES, seen, "softmax", None, None, "folder", "seed: 0")


def test_a_saved_student_says_that_it_has_three_heads_and_plain_timm_loads_it(tmp_path: Path) -> None:
    model = three_headed()
    save_local_dir(
        model,
        tmp_path / "s",
        model_args={**STUDENT_ARGS, "img_size": 32},
        classes=FIVE_CLASSES,
        preprocessing=seen_at(32),
    )
    opened = open_model("student.checkpoint", tmp_path / "s").eval()
    assert names_of_heads(opened) == ("cls", "dist", "patch")
    torch.testing.assert_close(read_heads(opened, IMAGES).patch_logits, read_heads(model, IMAGES).patch_logits)
    plain = timm.create_model(f"local-dir:{tmp_path / 's'}", pretrained=True).eval()
    heads = read_heads(model, IMAGES)
    torch.testing.assert_close(plain(IMAGES), (heads.cls_logits + heads.dist_logits) / 2)


@pytest.mark.parametrize(("name", "heads"), [("timm", ["cls", "dist"]), ("local-dir", ["cls", "dist", "patch"])])
def test_an_export_describes_the_heads_that_its_reader_can_tell_apart(
    tmp_path: Path, name: str, heads: list[str]
) -> None:
    export(name, three_headed(img_size=32), tmp_path / "out", about())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["heads"] == heads


def test_a_student_with_three_heads_teaches_the_next_through_all_of_them(tmp_path: Path) -> None:
    model, size = three_headed(), {"img_size": 32}
    seen = seen_at(32)
    save_local_dir(model, tmp_path / "s", model_args={**STUDENT_ARGS, **size}, classes=FIVE_CLASSES, preprocessing=seen)
    teacher = tiny_teacher(name=None, checkpoint=str(tmp_path / "s"), classes=FIVE_CLASSES, student=seen)
    expected = head_log_probabilities(read_heads(model, IMAGES))["fused"]
    batch = Batch(IMAGES, torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(teacher(batch).logits, expected)


def test_a_traced_export_has_the_third_head_and_fuses_all_three(tmp_path: Path) -> None:
    model = three_headed()
    cls, dist, patch, fused = Answering(model, "softmax")(IMAGES)
    expected = head_log_probabilities(StudentOutput(cls, dist, patch_logits=patch))["fused"].exp()
    assert torch.equal(fused, expected)
    assert export("torch-export", model, tmp_path / "out", about(), Choices(outputs=("patch", "fused"))) < 1e-5
