"""Students whose two heads read the same vector (LeViT, RepViT, EfficientFormer, SwiftFormer, iFormer), and PiT."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deit_kd import Batch, InputError, TimmStudent, head_probabilities
from deit_kd.cli import main
from deit_kd.exports import CannotHold
from deit_kd.exports.traced import resizable
from deit_kd.models.names import has_published_second_head
from deit_kd.models.tokens import read_heads
from deit_kd.origins import open_model
from tests.forked import run_on_two
from tests.helpers import (
    CLASSES,
    assert_same_scores,
    evaluated,
    heads_in,
    records,
    refused,
    signal_in_step,
    snapshot,
    tiny,
)
from tests.tiny_parts import save_student, seen_at, tiny_student, tiny_teacher

LEVIT = {"embed_dim": [16, 32, 48], "depth": [1, 1, 1], "num_heads": [2, 2, 2], "key_dim": 8}
FAMILIES = {
    "levit_128s": LEVIT,
    "levit_conv_128s": LEVIT,
    "repvit_m0_9": {"embed_dim": [8, 16, 24, 32], "depth": [1, 1, 1, 1]},
    "efficientformer_l1": {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},  # sees 224 pixels alone
    "efficientformerv2_s0": {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "swiftformer_xs": {"embed_dims": [8, 16, 24, 32], "layers": [1, 1, 1, 1]},
    "iformer_m_distilled": {},
}
PIT = {"base_dims": [8, 8, 8], "depth": [1, 1, 1]}


def student_of(name: str = "levit_128s", **options: Any) -> TimmStudent:
    """Return a small student at 64 px, or at the one size that it sees."""
    size = 224 if name.startswith("efficientformer_") else 64
    return tiny_student(**{"name": name, "args": FAMILIES.get(name, PIT), "image_size": size, **options})


def images_for(name: str) -> Tensor:
    size = 224 if name.startswith("efficientformer_") else 64
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def seen_by_training(student: TimmStudent, images: Tensor) -> TimmStudent:
    """Return `student` after one forward pass in train mode: its BatchNorms have statistics that are not their first.

    Heads, whose first weights are small, get noise.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        student.train()(images)
        for name, parameter in student.named_parameters():
            if "head" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return student.eval()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_heads_are_timms_distilled_training_outputs(name: str) -> None:
    student, images = student_of(name).train(), images_for(name)
    theirs = copy.deepcopy(student.backbone)
    theirs.set_distilled_training(True)
    cls_logits, dist_logits = theirs(images)
    output = student(images)
    assert torch.equal(output.cls_logits, cls_logits)
    assert torch.equal(output.dist_logits, dist_logits)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_in_eval_both_heads_answer_and_timms_answer_is_their_mean(name: str) -> None:
    images = images_for(name)
    student = seen_by_training(student_of(name), images)
    output = student(images)
    assert output.dist_logits is not None
    assert not torch.allclose(output.cls_logits, output.dist_logits)
    torch.testing.assert_close(student.backbone(images), (output.cls_logits + output.dist_logits) / 2)


def test_the_only_head_of_a_plain_levit_is_not_enough() -> None:
    with pytest.raises(InputError, match=r"student\.name: the model is a Levit, .*has no class token"):
        student_of("levit_256d", args=LEVIT)


@torch.no_grad()
def test_in_ones_own_loop_timms_switch_separates_the_heads() -> None:
    backbone = timm.create_model("levit_128s", num_classes=3, img_size=64, **LEVIT).eval()
    images = images_for("levit_128s")
    assert TimmStudent(backbone)(images).dist_logits is None
    backbone.set_distilled_training(True)
    assert TimmStudent(backbone)(images).dist_logits is not None


@pytest.mark.parametrize("name", ["pit_ti_distilled_224", "pit_ti_224"])
@torch.no_grad()
def test_what_pit_pools_is_its_patches(name: str) -> None:
    student, images = student_of(name).eval(), images_for(name)
    plain, output = student(images), student(images, ("pooled",))
    _, maps = student.backbone.forward_intermediates(images)
    torch.testing.assert_close(output.features["pooled"], maps[-1].mean((2, 3)))
    assert list(output.features) == ["pooled"]
    torch.testing.assert_close(output.dist_logits, plain.dist_logits)


# Weights.


def published(folder: Path, without: str = " ", name: str = "levit_128s") -> str:
    """Write timm's own weights of 3 classes, with a BatchNorm and a linear layer for each head."""
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=3, img_size=64, **LEVIT)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if not name.startswith(without)}
    save_file(state, folder / "own.safetensors")
    return str(folder / "own.safetensors")


def test_both_heads_of_published_weights_are_read(tmp_path: Path) -> None:
    file = published(tmp_path)
    student = student_of(checkpoint=file)
    state = student.backbone.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(file).items())
    assert sorted(student.account.loaded) == sorted(state)


def test_weights_of_one_head_start_both(tmp_path: Path) -> None:
    student = student_of(checkpoint=published(tmp_path, without="head_dist"))
    assert student.account.derived["head_dist.linear.weight"] == "head.linear.weight"
    assert student.account.derived["head_dist.bn.running_mean"] == "head.bn.running_mean"
    assert torch.equal(student.backbone.head_dist.linear.weight, student.backbone.head.linear.weight)
    assert not student.account.initialised


@pytest.mark.parametrize("name", ["levit_128s", "levit_384_s8"])  # timm names the second head of one of them
@pytest.mark.parametrize("options", [{"classes": tuple("abcde")}, {"new_heads": True}])
def test_for_other_classes_both_heads_are_drawn_anew_and_keep_their_norms(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    student = student_of(name, args=LEVIT, checkpoint=published(tmp_path, name=name), **options)
    assert sorted(student.account.initialised) == [
        f"{head}.linear.{part}" for head in ("head", "head_dist") for part in ("bias", "weight")
    ]


def test_weights_of_another_image_size_are_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"attention_biases is .*; set the image size that its attention biases"):
        student_of(checkpoint=published(tmp_path), image_size=96)


@pytest.mark.parametrize("distilled", [True, False])
@torch.no_grad()
def test_a_local_dir_says_whether_the_heads_answer_apart(tmp_path: Path, distilled: bool) -> None:
    images = images_for("levit_128s")
    student = seen_by_training(student_of(distilled=distilled), images)
    save_student(student, tmp_path / "saved", CLASSES, seen_at(64))
    torch.testing.assert_close(read_heads(open_model("student", tmp_path / "saved").eval(), images), student(images))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("levit_128s.fb_dist_in1k", True),
        ("repvit_m1_0.dist_450e_in1k", True),
        ("pit_ti_distilled_224.in1k", True),
        ("deit_tiny_distilled_patch16_224", True),
        ("pit_ti_224.in1k", False),
        ("efficientvim_m1_dist", False),  # four pairs of heads
        ("crossvit_tiny_240", False),  # a head for each branch
        ("resnet18", False),
    ],
)
def test_published_weights_with_a_second_head_are_known_by_name(name: str, expected: bool) -> None:
    assert has_published_second_head(name) == expected


# Whole runs.


def levit(photos_root: Path, output: Path | None, **options: Any) -> list[str]:
    """Return the arguments of a run of two epochs of three steps."""
    own = {
        "data__image_size": 32,
        "student__name": "levit_128s",
        "student__args": {**LEVIT, "embed_dim": [8, 16, 24]},
        "student__drop_path": 0.1,
        "distill__kind": "hard",
        "distill__terms": [{"kind": "guide", "weight": 1.0}, {"kind": "pooled", "weight": 0.5}],
        "train__epochs": 2,
        "train__batch_size": 16,
        "train__accumulation_steps": 2,
        "train__ema_decay": 0.5,
    }
    return tiny(photos_root, output, **{**own, **options})


@pytest.fixture(scope="module")
def run(photos_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("levit") / "run"
    assert main(["train", *levit(photos_root, folder)]) == 0
    return folder


def test_each_head_of_a_levit_is_scored(run: Path) -> None:
    assert list(heads_in(run)["heads"]) == ["cls", "dist", "fused"]


def test_an_interrupted_levit_ends_as_the_unbroken_one(run: Path, photos_root: Path, tmp_path: Path) -> None:
    arguments = [*levit(photos_root, tmp_path / "run"), "--resume", "auto"]
    with signal_in_step(signal.SIGTERM, 4):
        assert main(["train", *arguments]) == 143
    assert main(["train", *arguments]) == 0
    assert snapshot(tmp_path / "run" / "student") == snapshot(run / "student")
    assert heads_in(tmp_path / "run") == heads_in(run)
    assert records(tmp_path / "run") == records(run)


def test_a_levit_learns_from_a_store_what_it_learns_from_its_teacher(photos_root: Path, tmp_path: Path) -> None:
    store = ["--store", str(tmp_path / "store"), "--epochs", "2", "--batch_size", "32"]
    assert main(["store", "build", *levit(photos_root, None, distill__terms=None), *store]) == 0
    weights = []
    for name, options in (("online", {}), ("stored", {"teacher__store": str(tmp_path / "store")})):
        assert main(["train", *levit(photos_root, tmp_path / name, distill__terms=None, **options)]) == 0
        weights.append(snapshot(tmp_path / name / "student"))
    assert weights[0] == weights[1]


def test_the_scores_of_two_processes_are_those_of_the_levit_that_they_save(photos_root: Path, tmp_path: Path) -> None:
    """Each process normalises by its own views: the statistics that were scored must be the ones that are saved."""
    arguments = levit(photos_root, tmp_path / "run", distill__terms=None, train__epochs=1)
    run_on_two(["train", *arguments], tmp_path / "said.txt")
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert_same_scores(evaluated(tmp_path / "run"), heads_in(tmp_path / "run"))


def test_a_levit_is_diagnosed_without_tokens(run: Path) -> None:
    assert main(["eval", str(run), "--diagnose", "true"]) == 0
    assert_same_scores(evaluated(run), heads_in(run))
    diagnosis = json.loads((run / "eval" / "validation" / "diagnosis.json").read_text())
    assert (diagnosis["tokens"], diagnosis["collapsed"], diagnosis["cka"]) == ([], False, None)
    assert diagnosis["gallery"]
    assert list(diagnosis["followed"]) == ["cls", "dist", "fused"]
    assert main(["report", str(run)]) == 0


@torch.no_grad()
def test_a_run_of_a_levit_teaches_with_both_its_heads(run: Path) -> None:
    teacher = tiny_teacher(name=None, checkpoint=str(run), student=seen_at(32))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own = open_model("student", run / "student").eval()
    seen = teacher(Batch(images, torch.eye(3)[:2], torch.tensor([0, 1]))).logits
    assert seen is not None
    expected = head_probabilities(read_heads(own, teacher._preprocess(images)))["fused"]
    torch.testing.assert_close(seen.exp(), expected)


def test_a_batch_of_one_view_is_refused(photos_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"train__batch_size": 2, "augment__mixup": 0.0, "augment__cutmix": 0.0}
    line = refused(["train", *levit(photos_root, None, **options)], capsys)
    assert "train.batch_size: 2 leaves one view for each process and micro-step" in line
    assert line.endswith("use at least 4")


def test_attention_biases_of_one_size_are_refused_for_a_dynamic_size() -> None:
    with pytest.raises(CannotHold, match="its attention biases have a fixed size"):
        resizable(student_of().backbone)
