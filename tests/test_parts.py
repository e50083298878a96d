"""What a recipe says reaches the parts that are built from it, key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from deit_kd import Objective, StudentOutput, TeacherOutput, TimmStudent
from deit_kd.cli import main
from deit_kd.config import Config, Fit, parse_config, read_recipe
from deit_kd.interfaces import Link
from deit_kd.losses import LogitTerm
from deit_kd.runs import parts
from deit_kd.schedules import always
from deit_kd.students import Connectors
from deit_kd.teaching.fit import fitted_teacher
from tests.helpers import CLASSES, ONE_PROCESS, STUDENT_ARGS, tiny
from tests.tiny_parts import folder_splits, tiny_student


def recipe(root: Path | None = None, **options: Any) -> Config:
    return parse_config(tiny(root or Path("photos"), None, **options))[0]


OPTIM = {
    "optim__lr": 3e-3,
    "optim__lr_reference_batch": 4,  # half the batch
    "optim__min_lr": 1e-5,
    "optim__warmup_lr": 1e-4,
    "optim__warmup_epochs": 1,
    "optim__weight_decay": 0.125,
    "train__epochs": 3,
}


def test_an_optimiser_has_the_recipes_rate_decays_and_arguments() -> None:
    made = recipe(**OPTIM, optim__layer_decay=0.5, optim__args={"betas": [0.8, 0.9]})
    groups = parts.build_student_optimizer(made, tiny_student()).param_groups
    assert {group["weight_decay"] for group in groups} == {0, 0.125}
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}
    assert {group["lr_scale"] for group in groups} == {1.0, 0.5, 0.25, 0.125}  # heads, two blocks, embedding
    assert {group["lr"] for group in groups} == {6e-3}


def test_connectors_are_a_group_of_their_own_that_learns_and_decays_as_the_student_does() -> None:
    made = recipe(**OPTIM)
    optimizer = parts.build_student_optimizer(made, tiny_student())
    connectors = Connectors((Link("guide", "block", "stage", 6, 4),))
    parts.add_connectors(made, optimizer, connectors)
    *_, before, own = optimizer.param_groups
    assert list(map(id, own["params"])) == list(map(id, connectors.parameters()))
    assert own["weight_decay"] == 0.125
    schedule = parts.build_schedule(made, optimizer, steps_per_epoch=5)
    for step in range(15):
        schedule.step_update(step)
        assert own["lr"] == before["lr"] > 0


def test_a_schedule_goes_from_the_recipes_warm_up_to_its_least_rate() -> None:
    made = recipe(**OPTIM)
    optimizer = parts.build_student_optimizer(made, tiny_student())
    schedule = parts.build_schedule(made, optimizer, steps_per_epoch=5)
    for step, rate in ((0, 1e-4), (15, 1e-5)):
        schedule.step_update(step)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate] * 2)


def test_an_objective_has_the_recipes_kind_alpha_temperature_and_scale() -> None:
    made = recipe(distill__kind="soft", distill__alpha=0.3, distill__temperature=2, distill__scale="numel")
    student = StudentOutput(torch.randn(4, 3), torch.randn(4, 3))
    taught, targets = TeacherOutput(torch.randn(4, 3)), torch.randn(4, 3).softmax(-1)
    expected = Objective("soft", 0.3, 2.0, "numel")(student, taught, targets)
    assert parts.build_objective(made, {}, {})(student, taught, targets).loss == expected.loss


def test_peers_compare_themselves_with_the_recipes_weight_and_temperature() -> None:
    alone = {"distill__kind": "none", "teacher__name": None, "teacher__random_weights": None}
    weighed = {"distill__peer_weight": 0.25, "distill__peer_temperature": 2}
    made = recipe(**alone, **weighed, peers=[{"name": "test_resnet"}])
    assert parts.build_objective(made, {}, {}).terms == (LogitTerm("peers", always(0.25), always(2.0)),)


def built(**options: Any) -> TimmStudent:
    return parts.build_student(recipe(**options), CLASSES, torch.device("cpu"))


def test_a_student_freezes_what_the_recipe_says() -> None:
    student = built(student__freeze="all_but_heads").backbone
    learning = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert learning == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_student_has_the_recipes_memory_format(channels_last: bool) -> None:
    weight: Tensor = built(student__channels_last=channels_last).backbone.patch_embed.proj.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_a_student_starts_from_a_checkpoint_as_the_recipe_says(tmp_path: Path) -> None:
    plain = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=3, **STUDENT_ARGS)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")

    def started(**options: Any) -> tuple[float, bool]:
        student = built(
            student__name="vit_tiny_patch16_224", student__checkpoint=tmp_path / "plain.safetensors", **options
        )
        cls, dist = student.backbone.cls_token[0].detach()
        cosine = torch.cosine_similarity(cls, dist, dim=0)
        return float(cosine), torch.equal(student.backbone.head.weight, plain.head.weight)

    alike, has_own_head = started()
    assert (alike > 0.9, has_own_head) == (True, True)
    apart, _ = started(student__token="scratch")
    assert abs(apart) < 0.6
    assert not started(student__new_heads=True)[1]


def test_a_teacher_is_fitted_by_the_keys_of_its_fit(photos_root: Path, tmp_path: Path) -> None:
    fit = {
        "augment": {"auto_augment": "rand-m5-n1", "color_jitter": 0.1, "mixup": 0.4, "erasing": 0.2, "repeats": 2},
        "optim": {"name": "sgd", "lr": 0.01, "lr_reference_batch": 16, "weight_decay": 0.01, "warmup_epochs": 0},
        **{"epochs": 1, "batch_size": 6, "ema_decay": 0.5, "drop_path": 0.3, "folder": str(tmp_path)},
    }
    made = recipe(photos_root, teacher__random_weights=None, train__accumulation_steps=2)
    made = made.with_keys(teacher={"fit": Fit.model_validate(fit)})
    run = read_recipe(fitted_teacher(made, ONE_PROCESS, folder_splits(photos_root)) / "config.yaml")
    for section in ("augment", "optim"):
        assert run[section] == made.model_dump(mode="json")["teacher"]["fit"][section]
    taught = {name: run["train"][name] for name in ("epochs", "batch_size", "ema_decay", "accumulation_steps")}
    assert taught == {"epochs": 1, "batch_size": 6, "ema_decay": 0.5, "accumulation_steps": 1}
    assert run["student"]["drop_path"] == 0.3
    assert run["distill"]["kind"] == "none"


@pytest.mark.parametrize(("minutes", "steps"), [(1e-9, [1, 2]), (10, [2])])
def test_checkpoints_are_as_many_minutes_apart_as_the_recipe_says(
    photos_root: Path, tmp_path: Path, minutes: float, steps: list[int]
) -> None:
    options = {"train__checkpoint_every_minutes": minutes, "train__keep_checkpoints": 9, "train__batch_size": 24}
    assert main(["train", *tiny(photos_root, tmp_path / "run", **options)]) == 0
    found = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert sorted(int(path.stem.removeprefix("step-")) for path in found) == steps
