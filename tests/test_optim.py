"""The optimiser and the learning rate, which is a pure function of the step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from deit_kd import InputError
from deit_kd.checkpoint import load_checkpoint, save_checkpoint
from deit_kd.config import parse_config
from deit_kd.optim import WeightAverage, build_optimizer, build_schedule
from tests.helpers import REPOSITORY
from tests.tiny_parts import tiny_student


def optimizer(**options: Any) -> torch.optim.Optimizer:
    base: dict[str, Any] = {
        "name": "adamw",
        "lr": 5e-4,
        "lr_reference_batch": 512,
        "weight_decay": 0.05,
        "args": {},
        "batch_size": 1024,
    }
    return build_optimizer(tiny_student().backbone, **{**base, **options})


def rates(**options: Any) -> list[float]:
    """Return the learning rate of every step of a run of 4 epochs of 5 steps, at a peak of 1e-3."""
    built = optimizer()
    base: dict[str, Any] = {"warmup_epochs": 1, "warmup_lr": 1e-6, "min_lr": 1e-5, "epochs": 4, "steps_per_epoch": 5}
    schedule = build_schedule(built, **{**base, **options})
    found = []
    for step in range(20):
        schedule.step_update(step)
        found.append(built.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(
    ("batch_size", "reference", "expected"), [(1024, 512, 1e-3), (64, 512, 6.25e-5), (64, 0, 5e-4)]
)
def test_the_learning_rate_scales_with_the_global_batch(batch_size: int, reference: int, expected: float) -> None:
    built = optimizer(batch_size=batch_size, lr_reference_batch=reference)
    assert [group["lr"] for group in built.param_groups] == pytest.approx([expected] * 2)


def test_tokens_positions_biases_and_norms_are_not_decayed() -> None:
    backbone = tiny_student().backbone
    built = build_optimizer(
        backbone, name="adamw", lr=1e-3, lr_reference_batch=0, weight_decay=0.05, args={}, batch_size=8
    )
    names = {parameter: name for name, parameter in backbone.named_parameters()}
    decayed = {names[p] for group in built.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {name for name, p in backbone.named_parameters() if p.ndim > 1 and "token" not in name} - {
        "pos_embed"
    }
    assert sum(len(group["params"]) for group in built.param_groups) == len(names)


def test_args_reach_the_optimiser() -> None:
    assert optimizer(args={"betas": (0.8, 0.9)}).param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion"])
def test_timms_optimisers_go_by_name(name: str) -> None:
    assert name in type(optimizer(name=name)).__name__.lower()


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("name", ["adamw", "adafactorbv", "kron", "sgd"])
def test_an_optimiser_goes_on_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    twin = copy.deepcopy(layer)
    built, other = (
        build_optimizer(model, name=name, lr=1e-3, lr_reference_batch=0, weight_decay=0.1, args={}, batch_size=8)
        for model in (layer, twin)
    )
    for step in range(4):
        if step == 2:
            path = save_checkpoint(tmp_path, 2, {"optimizer": built.state_dict(), "model": layer.state_dict()}, keep=1)
            state = load_checkpoint(path)
            other.load_state_dict(state["optimizer"])
            twin.load_state_dict(state["model"])
        for model, its in ((layer, built), (twin, other))[: 1 + (step >= 2)]:
            its.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            torch.manual_seed(step)  # kron draws
            its.step()
    if name != "kron":  # which draws from a generator of its own
        assert torch.equal(layer.weight, twin.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "adamq"},
        {"name": "adahessian"},
        {"args": {"no_such": 1}},
        {"args": {"betas": (2, 3)}},
        {"args": {"betas": [0.9]}},
        {"args": {"foreach": True}},
    ],
)
def test_an_optimiser_that_cannot_be_is_refused_in_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^optim\.name: ") as caught:
        optimizer(**options)
    assert "\n" not in str(caught.value)


def test_the_rate_warms_up_linearly_then_falls_as_a_cosine() -> None:
    found = rates()
    assert found[0] == pytest.approx(1e-6)
    assert found[:6] == sorted(found[:6])
    assert found[1] - found[0] == pytest.approx(found[2] - found[1])
    assert max(found) <= 1e-3 * (1 + 1e-9)
    assert found[5:] == sorted(found[5:], reverse=True)
    assert 1e-5 <= found[-1] < 5e-5


def test_the_rate_is_a_pure_function_of_the_step() -> None:
    built = optimizer()
    schedule = build_schedule(built, warmup_epochs=1, warmup_lr=1e-6, min_lr=1e-5, epochs=4, steps_per_epoch=5)
    for step in (13, 2, 19):
        schedule.step_update(step)
        assert built.param_groups[0]["lr"] == rates()[step]


@pytest.mark.parametrize("warmup", [4, 9])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup: int) -> None:
    with pytest.raises(InputError, match=rf"warmup_epochs: {warmup} is not below train\.epochs 4"):
        rates(warmup_epochs=warmup)


@pytest.mark.parametrize(
    ("recipe", "images"),
    [
        ("quickstart", 1437),
        ("imagenet100", 126_689),
        ("finetune_384", 1_281_167),
        ("imagenet_tiny", 1_281_167),
    ],
)
def test_the_decay_of_a_recipe_acts_for_the_last_third_of_its_run_at_least(recipe: str, images: int) -> None:
    section = parse_config(["--config", str(REPOSITORY / "configs" / f"{recipe}.yaml")])[0].train
    assert section.ema_decay
    steps = section.epochs * (images // section.batch_size)
    average = WeightAverage(torch.nn.Linear(1, 1), section.ema_decay)
    assert average.get_decay(steps * 2 // 3) == section.ema_decay


@pytest.mark.parametrize(
    "recipe",
    ["assistant", "born_again", "finetune", "own_average", "peers", "photos", "pretrain", "specialists", "subset"],
)
def test_a_recipe_for_any_number_of_photos_leaves_the_decay_to_the_length_of_its_run(recipe: str) -> None:
    assert parse_config(["--config", str(REPOSITORY / "configs" / f"{recipe}.yaml")])[0].train.ema_decay is None


def test_an_average_begins_as_the_plain_mean_of_all_steps() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 0.9)
    assert average.span == pytest.approx(10)
    for step in range(1, 11):
        torch.nn.init.constant_(model.weight, step)
        average.follow(model, step, torch.tensor(True))
        assert average.module.weight.item() == pytest.approx((1 + step) / 2)
    assert average.get_decay(11) == pytest.approx(0.9)


@pytest.mark.parametrize("with_gaps", [False, True])
@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_an_average_is_the_interpolation_bit_for_bit_in_any_memory_layout(
    step: int, applied: bool, with_gaps: bool
) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(9, 7))
    model = model.to(memory_format=torch.channels_last)
    if with_gaps:
        model.register_buffer("with_gaps", torch.randn(4, 6)[:, ::2])
    average = WeightAverage(model, 0.9)
    before = {name: value.clone() for name, value in average.module.state_dict().items()}
    for value in model.state_dict().values():
        value.copy_(torch.randn(value.shape) * 8)
    average.follow(model, step, torch.tensor(applied))
    weight = torch.tensor(float(applied)) * (1 - average.get_decay(step))
    for name, value in model.state_dict().items():
        expected = before[name].lerp(value, weight) if value.is_floating_point() else value
        assert torch.equal(average.module.state_dict()[name], expected), name
