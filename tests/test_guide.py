"""Terms that compare features: their losses, what they may compare, and the schedules of weights."""

from __future__ import annotations

import gc
import math
import weakref
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from deit_kd import Distiller, FrozenTeacher, InputError, Objective, TimmStudent
from deit_kd.config import parse_config
from deit_kd.features import POOLED, answer_with_features, check_layers, layer_names, shapes
from deit_kd.interfaces import Link, StudentOutput, TeacherOutput
from deit_kd.losses import (
    FeatureTerm,
    LogitTerm,
    Needs,
    Shapes,
    guide,
    map_links,
    pooled_cosine,
    pooled_huber,
    relations,
    soft_distillation,
    standardised_distillation,
)
from deit_kd.losses.pooled import normalised
from deit_kd.losses.standardised import default_temperature
from deit_kd.runs.lesson import Lesson
from deit_kd.runs.parts import build_objective
from deit_kd.schedules import Schedule, always
from deit_kd.students import ConnectedStudent, Connectors
from deit_kd.teachers import GuidedTeacher
from tests.helpers import MEAN, STD
from tests.tiny_parts import make_batch, tiny_student

seeds = st.integers(0, 2**31)


def maps(seed: int, channels: int = 6, side: int = 4, count: int = 5) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def vectors(seed: int, classes: int = 7, count: int = 5) -> Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Losses


def test_a_guide_that_is_matched_costs_nothing() -> None:
    teacher = maps(0)
    matched = F.layer_norm(teacher.movedim(1, -1), (6,)).movedim(-1, 1)
    torch.testing.assert_close(guide(matched, teacher), torch.zeros(5))
    assert torch.equal(guide(teacher, teacher, normalise=False), torch.zeros(5))
    assert guide(matched, maps(1)).min() > 0.1


def test_a_guide_is_the_mean_squared_error_over_channels_and_places() -> None:
    student, teacher = torch.zeros(1, 2, 1, 1), torch.tensor([3.0, 1.0]).view(1, 2, 1, 1)  # normalised: 1 and -1
    assert guide(student, teacher).item() == pytest.approx(1.0, abs=1e-4)
    assert guide(student, teacher, normalise=False).item() == pytest.approx((9 + 1) / 2)


def test_the_finer_map_is_averaged_to_the_coarser_place_by_place() -> None:
    coarse = maps(0, side=2)
    fine = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(guide(coarse, fine, normalise=False), torch.zeros(5))
    torch.testing.assert_close(guide(fine, coarse, normalise=False), torch.zeros(5))
    assert guide(coarse.transpose(2, 3), fine, normalise=False).min() > 0  # rows are not columns


def test_a_grid_compares_what_is_left_when_both_are_averaged_to_it() -> None:
    student, teacher = maps(0, side=4), maps(1, side=8)
    averaged = F.adaptive_avg_pool2d(student, 2), F.adaptive_avg_pool2d(teacher, 2)
    torch.testing.assert_close(guide(student, teacher, grid=2), guide(*averaged))


@pytest.mark.parametrize("loss", [pooled_cosine, pooled_huber])
def test_pooled_vectors_that_are_equal_cost_nothing(loss: Any) -> None:
    teacher = normalised(vectors(0))
    torch.testing.assert_close(loss(teacher, teacher), torch.zeros(5).double())
    assert loss(teacher, normalised(vectors(1))).min() > 0


def test_a_huber_loss_is_half_the_square_up_to_1_and_then_a_line() -> None:
    student = torch.tensor([[0.5, 3.0], [-0.5, -1.0]])
    assert pooled_huber(student, torch.zeros(2, 2)).tolist() == [(0.125 + 2.5) / 2, (0.125 + 0.5) / 2]


@pytest.mark.parametrize(
    "loss",
    [
        lambda seed: guide(maps(seed), maps(seed + 1, side=8)),
        lambda seed: pooled_cosine(vectors(seed), vectors(seed + 1)),
        lambda seed: standardised_distillation(vectors(seed), vectors(seed + 1), 2.0),
    ],
)
def test_feature_losses_are_per_example(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together = loss(3)
    order = torch.tensor([4, 2, 0, 1, 3])
    real_randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **options: real_randn(*size, **options)[order])
    torch.testing.assert_close(loss(3), together[order])
    monkeypatch.setattr(torch, "randn", lambda *size, **options: real_randn(*size, **options)[2:3])
    torch.testing.assert_close(loss(3), together[2:3])


@given(seeds, st.floats(0.1, 10), st.floats(-5, 5), st.floats(0.1, 10), st.floats(-5, 5))
def test_the_standardised_loss_knows_no_scale_and_no_shift(
    seed: int, scale: float, shift: float, other_scale: float, other_shift: float
) -> None:
    student, teacher = vectors(seed), vectors(seed + 1)
    moved = standardised_distillation(scale * student + shift, other_scale * teacher + other_shift, 1.5)
    torch.testing.assert_close(moved, standardised_distillation(student, teacher, 1.5), rtol=1e-6, atol=1e-9)


@given(seeds)
def test_the_standardised_loss_pushes_neither_scale_nor_mean(seed: int) -> None:
    student = vectors(seed).requires_grad_()
    standardised_distillation(student, vectors(seed + 1), 1.5).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    torch.testing.assert_close(student.grad.sum(-1), torch.zeros(5).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close((student.grad * student).sum(-1).detach(), torch.zeros(5).double(), atol=1e-9, rtol=0)


def test_the_standardised_loss_is_the_soft_one_between_z_scores() -> None:
    student, teacher = vectors(0), vectors(1)

    def z_scores(logits: Tensor) -> Tensor:
        return (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True, correction=0)

    expected = soft_distillation(z_scores(student), z_scores(teacher), 2.0)
    torch.testing.assert_close(standardised_distillation(student, teacher, 2.0), expected)


def test_logits_without_a_spread_have_a_finite_standardised_loss_and_gradient() -> None:
    student = torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)
    for teacher in (vectors(0), torch.ones(5, 7).double()):
        loss = standardised_distillation(student, teacher, 2.0)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_the_default_temperature_lets_a_teacher_ask_for_nine_tenths(classes: int) -> None:
    one_hot = F.one_hot(torch.tensor([0]), classes).double()
    z_scores = (one_hot - one_hot.mean()) / one_hot.std(correction=0)
    assert (z_scores / default_temperature(classes)).softmax(-1).max().item() == pytest.approx(0.9)


# Schedules


@pytest.mark.parametrize(
    ("schedule", "values"),  # at 0, .25, .5, .75 and 1
    [
        (always(2.0), [2, 2, 2, 2, 2]),
        (Schedule(2.5, 0.0, until=0.5), [2.5, 2.5, 0, 0, 0]),
        (Schedule(0.0, 1.0, until=0.5), [0, 0, 1, 1, 1]),
        (Schedule(1.0, 0.0, shape="linear"), [1, 0.75, 0.5, 0.25, 0]),
        (Schedule(1.0, 3.0, 0.25, 0.75, "linear"), [1, 1, 2, 3, 3]),
        (Schedule(1.0, 0.0, shape="cosine"), [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
    ],
)
def test_a_schedule_is_a_function_of_the_place(schedule: Schedule, values: list[float]) -> None:
    assert [schedule.at(place / 4) for place in range(5)] == pytest.approx(values)


@pytest.mark.parametrize("steps", [1, 7, 100, 300])
@pytest.mark.parametrize("until", [0.001, 0.07, 1 / 3, 0.55, 0.57, 1.0])  # 0.07 * 100 is above 7, 0.57 * 100 below 57
def test_a_schedule_settles_after_the_first_step_whose_end_is_not_before_its_own(steps: int, until: float) -> None:
    settled = Schedule(1, 0, until=until).settled_after(steps)
    assert settled == next(done for done in range(1, steps + 1) if done / steps >= until)
    assert always(1).settled_after(steps) is None


@given(st.floats(0, 3), st.floats(0, 3), st.floats(0, 0.5), st.floats(0.51, 1), st.floats(0, 1))
def test_a_schedule_stays_between_its_ends_and_is_over_only_at_zero(
    start: float, end: float, begin: float, until: float, place: float
) -> None:
    for shape in ("constant", "linear", "cosine"):
        schedule = Schedule(start, end, begin, until, shape)
        assert min(start, end) - 1e-9 <= schedule.at(place) <= max(start, end) + 1e-9
        if schedule.is_over(place):
            assert schedule.at(place) == schedule.at(1.0) == 0


# Objectives

LINK = Link("guide", "block", "stage", 6, 6)


def outputs(seed: int) -> tuple[StudentOutput, TeacherOutput, Tensor]:
    student = StudentOutput(vectors(seed).float(), vectors(seed + 1).float(), {"guide": maps(seed + 2)})
    teacher = TeacherOutput(vectors(seed + 3).float(), {"stage": maps(seed + 4, side=8)})
    return student, teacher, vectors(seed + 5).softmax(-1).float()


def term(weight: Schedule) -> FeatureTerm:
    return FeatureTerm("guide", weight, (LINK,))


LINKS = (Link("one", "block", "stage", 6, 6), Link("other", "block", "last", 6, 6))


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({"kind": "guide"}, guide),
        ({"kind": "guide", "normalise": False}, partial(guide, normalise=False)),
        ({"kind": "guide", "grid": 2}, partial(guide, grid=2)),
        ({"kind": "relations", "grid": 2}, partial(relations, grid=2)),
        ({"kind": "pooled"}, lambda own, theirs: pooled_cosine(own, normalised(theirs))),
        ({"kind": "pooled", "loss": "huber"}, lambda own, theirs: pooled_huber(own, normalised(theirs))),
    ],
)
def test_a_feature_term_is_the_sum_of_its_loss_over_its_links(options: dict[str, Any], loss: Any) -> None:
    drawn: Any = vectors if options["kind"] == "pooled" else partial(maps, side=4)
    student = {"one": drawn(0).float(), "other": drawn(1).float()}
    teacher = {"stage": drawn(2).float(), "last": drawn(3).float()}
    found, _ = FeatureTerm(weight=always(1.0), links=LINKS, **options).per_example(student, teacher)
    torch.testing.assert_close(found, loss(student["one"], teacher["stage"]) + loss(student["other"], teacher["last"]))


def test_the_cosine_of_a_guide_is_over_channels_at_each_place_and_its_mean_is_told() -> None:
    teacher = maps(0)
    matched = F.layer_norm(teacher.movedim(1, -1), (6,)).movedim(-1, 1)
    sizes = 0.1 + maps(1, channels=1).abs()
    one = sizes * matched
    other = one.clone()
    other[:, :, 0] *= -1  # one row of four
    guided = FeatureTerm("guide", always(1.0), LINKS)
    _, cosine = guided.per_example({"one": one, "other": other}, {"stage": teacher, "last": teacher})
    torch.testing.assert_close(cosine, torch.full((5,), (1 + 0.5) / 2))


def test_the_cosine_of_relations_is_the_correlation_of_each_places_relations() -> None:
    student, teacher = maps(0, side=2), maps(1, channels=9, side=2)

    def alike(features: Tensor) -> Tensor:
        places = F.normalize(features.flatten(2), dim=1)
        return places.mT @ places

    own, theirs = alike(student), alike(teacher)
    expected = torch.zeros(5)
    for place in range(4):
        others = [other for other in range(4) if other != place]
        rows = torch.stack((own[:, place, others], theirs[:, place, others]), dim=1)
        expected += torch.stack([torch.corrcoef(pair)[0, 1] for pair in rows]) / 4
    related = FeatureTerm("relations", always(1.0), (LINKS[0],))
    torch.testing.assert_close(related.per_example({"one": student}, {"stage": teacher})[1], expected)


def test_the_keys_of_a_recipes_feature_terms_reach_the_objective() -> None:
    own = {"blocks.0": (8, 4, 4), "blocks.1": (8, 4, 4), POOLED: (8,)}
    theirs = {"layer1": (6, 8, 8), "layer2": (9, 4, 4), POOLED: (9,)}
    written = (
        "[{kind: guide, weight: 2, blocks: [1], stages: [layer2], grid: 2, normalise: false}, "
        "{kind: relations, blocks: [0], stages: [layer1], grid: 2, temperature: 0.3}, {kind: pooled, loss: huber}]"
    )
    config, _ = parse_config(["--distill.kind", "none", "--distill.terms", written])
    guided, related, pooled = build_objective(config, own, theirs).terms
    guide_link = Link("guide blocks.1 layer2", "blocks.1", "layer2", 8, 9)
    relations_link = Link("relations blocks.0 layer1", "blocks.0", "layer1", 8, 6, has_connector=False)
    assert guided == FeatureTerm("guide", always(2.0), (guide_link,), normalise=False, grid=2)
    assert related == FeatureTerm("relations", always(1.0), (relations_link,), grid=2, temperature=always(0.3))
    assert pooled == FeatureTerm("pooled", always(1.0), (Link(POOLED, POOLED, POOLED, 8, 9),), loss="huber")


@pytest.mark.parametrize("kind", ["none", "soft", "hard", "standardised"])
def test_a_term_of_weight_zero_is_no_term_bit_for_bit(kind: str) -> None:
    with_term = Objective(kind, terms=[term(always(0))])
    assert not with_term.needs.links
    assert tuple(with_term(*outputs(0))) == tuple(Objective(kind)(*outputs(0)))


def test_a_term_adds_its_weight_times_its_mean_by_the_place_in_the_run() -> None:
    objective = Objective("soft", terms=[term(Schedule(2.5, 0.5, shape="linear"))])
    plain = Objective("soft")(*outputs(0)).loss
    mean = guide(maps(2), maps(4, side=8)).mean()
    for place, weight in ((0.0, 2.5), (0.5, 1.5), (1.0, 0.5)):
        terms = objective(*outputs(0), place)
        torch.testing.assert_close(terms.others["guide"], mean)
        torch.testing.assert_close(terms.loss, plain + weight * mean)


def test_alpha_and_temperature_follow_their_schedules() -> None:
    changing = Objective("soft", Schedule(0.9, 0.1, shape="linear"), Schedule(4.0, 1.0, until=0.5))
    for place, alpha, temperature in ((0.0, 0.9, 4.0), (0.5, 0.5, 1.0), (1.0, 0.1, 1.0)):
        expected = Objective("soft", alpha, temperature)(*outputs(0))
        torch.testing.assert_close(changing(*outputs(0), place).loss, expected.loss)


def test_what_is_over_asks_for_nothing() -> None:
    objective = Objective("soft", terms=[term(Schedule(2.5, 0.0, until=0.5))])
    assert objective.remaining(0.49).needs.teacher_features == ("stage",)
    rest = objective.remaining(0.5)
    assert (rest.needs.logits, rest.needs.links, rest.active) == (True, (), ("soft",))
    student, teacher, targets = outputs(0)
    without = StudentOutput(student.cls_logits, student.dist_logits), TeacherOutput(teacher.logits), targets
    assert tuple(rest(*without, 0.5)) == tuple(Objective("soft")(*without))


def test_an_alpha_that_has_ended_leaves_the_teacher_and_keeps_the_token_in_the_graph() -> None:
    rest = Objective("soft", Schedule(0.9, 0.0, until=0.5)).remaining(0.5)
    assert not rest.needs.teacher
    student, _, targets = outputs(0)
    assert student.dist_logits is not None
    student.dist_logits.requires_grad_()
    rest(student, None, targets, 0.5).loss.backward()
    assert student.dist_logits.grad is not None  # DDP waits for a gradient of every parameter
    assert not student.dist_logits.grad.any()


def test_an_alpha_that_is_0_from_the_start_is_measured_to_the_end() -> None:
    assert Objective("soft", Schedule(0.0, 0.0, until=0.5)).remaining(0.5).distils


def test_alpha_one_without_distillation_leaves_the_labels_out() -> None:
    terms = Objective("none", 1.0, terms=[term(always(2.0))])(*outputs(0))
    torch.testing.assert_close(terms.loss, 2 * terms.others["guide"])


def test_an_alpha_that_changes_weighs_the_labels_without_distillation_too() -> None:
    objective = Objective("none", Schedule(1.0, 0.2, until=0.5), terms=[term(always(2.0))])
    assert objective.learns_from_labels
    for place, weight in ((0.0, 0.0), (0.5, 0.8)):
        terms = objective(*outputs(0), place)
        torch.testing.assert_close(terms.loss, weight * terms.classification + 2 * terms.others["guide"])


@pytest.mark.parametrize("alpha", [0.0, 0.5, Schedule(0.7, 0.7, until=0.5)])
def test_an_alpha_that_stays_leaves_the_labels_their_weight_without_distillation(alpha: Any) -> None:
    terms = Objective("none", alpha)(*outputs(0))
    assert terms.loss == terms.classification


def test_a_logit_term_that_has_ended_keeps_the_token_in_the_graph_without_distillation() -> None:
    rest = Objective("none", terms=[LogitTerm("soft", Schedule(1.0, 0.0, until=0.5))]).remaining(0.5)
    student, _, targets = outputs(0)
    assert student.dist_logits is not None
    student.dist_logits.requires_grad_()
    rest(student, None, targets, 0.5).loss.backward()
    assert student.dist_logits.grad is not None


def test_standardised_logits_take_their_temperature_from_the_classes() -> None:
    classes = outputs(0)[2].shape[-1]
    expected = Objective("standardised", temperature=default_temperature(classes))(*outputs(0))
    assert Objective("standardised")(*outputs(0)).loss == expected.loss


RISING = Schedule(0.0, 1.0, 0.25, 0.5, "linear")
FALLING = Schedule(1.0, 0.0, 0.25, 0.5, "linear")


@pytest.mark.parametrize(
    ("alpha", "weights", "when"),
    [
        (1.0, [Schedule(1.0, 0.0, until=0.5)], "after 0.5"),
        (1.0, [FALLING, Schedule(1.0, 0.0, until=0.75)], "after 0.75"),
        (Schedule(1.0, 1.0, until=0.3), [FALLING], "after 0.5"),
        (1.0, [RISING], "before 0.25"),
        (Schedule(1.0, 0.0, until=0.7), [FALLING], "between 0.5 and 0.7"),
        (Schedule(0.0, 1.0, until=0.7), [FALLING], "after 0.7"),
        (1.0, [Schedule(0.0, 0.0, until=0.5)], "nothing else teaches"),
        (1.0, [FALLING, RISING], None),
        (Schedule(1.0, 0.0, until=0.5), [FALLING], None),
        (Schedule(1.0, 0.0, shape="linear"), [], None),
        (0.5, [FALLING], None),
    ],
)
def test_something_teaches_in_every_part_of_a_run(alpha: Any, weights: list[Schedule], when: str | None) -> None:
    kinds = ("soft", "hard")
    terms = [LogitTerm(kind, weight) for kind, weight in zip(kinds, weights, strict=False)]
    with nullcontext() if when is None else pytest.raises(InputError, match=when):
        Objective("none", alpha, terms=terms)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"terms": [term(always(1)), term(always(2))]}, "guide appears twice"),
        ({"kind": "soft", "terms": [LogitTerm("soft", always(1))]}, "soft appears twice"),
        ({"kind": "none", "alpha": 1.0}, "nothing else teaches"),
        ({"alpha": Schedule(0.5, 1.5)}, "alpha: 1.5"),
        ({"temperature": Schedule(3.0, 0.0)}, "temperature: 0 is not above 0"),
    ],
)
def test_an_objective_of_terms_that_cannot_be_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Objective(**options)


@pytest.mark.parametrize(
    ("student", "teacher", "reason"),
    [
        (outputs(0)[0]._replace(features=None), outputs(0)[1], "student with connectors"),
        (outputs(0)[0], outputs(0)[1]._replace(features=None), "asked for features"),
        (outputs(0)[0], None, "asked for features"),
    ],
)
def test_features_that_are_missing_are_named(student: Any, teacher: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Objective("none", terms=[term(always(1))])(student, teacher, outputs(0)[2])


def test_logits_of_a_teacher_without_a_head_are_refused() -> None:
    student, teacher, targets = outputs(0)
    with pytest.raises(InputError, match="with a head"):
        Objective("soft")(student, teacher._replace(logits=None), targets)


# Which feature goes with which

VIT: Shapes = {f"blocks.{number}": (192, 8, 8) for number in range(12)} | {POOLED: (192,)}
CNN: Shapes = {
    "act1": (64, 64, 64),
    "layer1": (64, 32, 32),
    "layer2": (128, 16, 16),
    "layer3": (256, 8, 8),
    "layer4": (512, 4, 4),
    POOLED: (512,),
}


def test_a_guide_spreads_the_stages_that_are_not_coarser_than_the_student_over_its_blocks() -> None:
    pairs = [(link.student, link.teacher, link.teacher_width) for link in map_links("guide", VIT, CNN)]
    assert pairs == [("blocks.0", "layer1", 64), ("blocks.5", "layer2", 128), ("blocks.11", "layer3", 256)]


def test_a_guide_of_one_grid_spreads_over_its_depth() -> None:
    assert [link.teacher for link in map_links("guide", VIT, VIT)] == ["blocks.0", "blocks.5", "blocks.11"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stages": ["layer9"]}, "no stage 'layer9' .nearest: layer"),
        ({"stages": ["layer1"], "blocks": [12]}, "no block 12; use 0 to 11"),
        ({"stages": ["layer1"], "blocks": [-1]}, "no block -1"),
        ({"blocks": [0, 1]}, "2 blocks cannot be compared with 3 stages"),
        ({"stages": []}, "1 block cannot be compared with 0 stages"),
        ({"grid": 16}, "cannot be averaged to one of 16 x 16"),
        ({"grid": 3}, "cannot be averaged to one of 3 x 3"),
    ],
)
def test_a_guide_that_cannot_be_linked_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        map_links("guide", VIT, CNN, **options)


@pytest.mark.parametrize("shape", [(64, 12, 12), (64, 16, 8), (64, 20, 20)])
def test_grids_of_which_none_divides_the_other_are_refused(shape: tuple[int, ...]) -> None:
    if shape == (64, 16, 8):
        assert map_links("guide", VIT, {"odd": shape}, stages=["odd"])  # each side on its own
        return
    with pytest.raises(InputError, match="cannot be averaged to one; choose another"):
        map_links("guide", VIT, {"odd": shape}, stages=["odd"])


def test_a_network_without_named_layers_is_refused() -> None:
    with pytest.raises(InputError, match="the teacher has no feature maps"):
        map_links("guide", VIT, {POOLED: (512,)})


# Networks


def frozen(name: str, **options: Any) -> FrozenTeacher:
    torch.manual_seed(0)
    network = timm.create_model(name, **{"num_classes": 3, **options})
    return FrozenTeacher(network, student_mean=MEAN, student_std=STD, mean=MEAN, std=STD, image_size=32)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        ("test_convnext", {}),
        ("test_efficientnet", {}),
        ("test_vit", {"img_size": 32}),
        ("test_vit4", {"img_size": 32}),
        ("resnet10t", {}),
        ("regnetx_002", {}),
    ],
)
def test_a_teachers_answer_is_the_same_when_it_is_asked_for_features(name: str, options: dict[str, Any]) -> None:
    teacher = frozen(name, **options)
    plain = teacher(make_batch(2, side=32))
    teacher.ask_for([*teacher.layer_names(), POOLED])
    asked = teacher(make_batch(2, side=32))
    torch.testing.assert_close(asked.logits, plain.logits)
    assert plain.features is None
    assert asked.features is not None
    found = shapes(asked.features)
    widths = {stage["module"]: stage["num_chs"] for stage in teacher.network.feature_info}
    assert {layer: found[layer][0] for layer in widths} == widths
    assert len(found[POOLED]) == 1
    teacher.ask_for(())
    assert teacher(make_batch(2, side=32)).features is None


@pytest.mark.parametrize(("name", "side"), [("coat_tiny", 224), ("crossvit_tiny_240", 240)])
def test_layers_without_names_of_their_own_are_refused(name: str, side: int) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    if not layer_names(model):
        with pytest.raises(InputError, match="has no layer"):
            check_layers("teacher", model, ["serial_blocks1"])
        return
    images, head, pool = make_batch(1, side=side).images, model.forward_head, nn.Identity()
    with pytest.raises(InputError, match="one by one"):
        answer_with_features(model, images, layer_names(model)[:1], head=head, pool=pool)


def test_a_layer_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="ResNet has no layer 'layer5'"):
        frozen("resnet10t").ask_for(["layer5"])


def test_a_teacher_without_a_head_answers_with_features_alone() -> None:
    teacher = frozen("test_resnet", num_classes=0)
    teacher.ask_for([POOLED])
    answer = teacher(make_batch(2, side=32))
    assert answer.logits is None
    assert answer.features is not None
    assert answer.features[POOLED].ndim == 2


def test_a_students_blocks_are_its_patches_in_rows_and_columns() -> None:
    student = TimmStudent(timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, depth=2))
    student.eval()
    images = make_batch(2, side=32).images
    output = student(images, ["blocks.1", POOLED])
    assert output.features is not None
    tokens = student.backbone.forward_features(images)
    patches = student.backbone.norm(output.features["blocks.1"].flatten(2).mT)  # raw, before the final norm
    torch.testing.assert_close(patches, tokens[:, 2:])
    torch.testing.assert_close(output.features[POOLED], tokens[:, 2:].mean(1))
    for head, alone in zip(output[:2], student(images)[:2], strict=True):
        torch.testing.assert_close(head, alone)


def connected() -> tuple[ConnectedStudent, FrozenTeacher, Objective]:
    student, teacher = tiny_student(image_size=32), frozen("test_resnet")
    teacher.ask_for([*teacher.layer_names(), POOLED])
    own = student(make_batch(2, side=32).images, [*layer_names(student.backbone), POOLED]).features
    theirs = teacher(make_batch(2, side=32)).features
    assert own is not None
    assert theirs is not None
    links = map_links("guide", shapes(own), shapes(theirs), blocks=[0, 1], stages=teacher.layer_names()[1:3])
    objective = Objective("soft", terms=[FeatureTerm("guide", always(2.0), links)])
    teacher.ask_for(objective.needs.teacher_features)
    return ConnectedStudent(student, Connectors(links), links), teacher, objective


def test_the_guide_teaches_the_blocks_and_the_connectors_and_nothing_of_the_teacher() -> None:
    student, teacher, objective = connected()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    Distiller(student, teacher, objective)(make_batch(2, side=32)).others["guide"].backward()
    assert all(parameter.grad is not None for parameter in student.connectors.parameters())
    backbone = student.student.backbone
    assert backbone.blocks[0].mlp.fc1.weight.grad is not None
    assert backbone.head_dist.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())  # BatchNorm, too


def test_the_guides_loss_falls_when_it_is_followed() -> None:
    student, teacher, objective = connected()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        terms = Distiller(student, teacher, objective)(make_batch(8, side=32))
        terms.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(terms.others["guide"].item())
    assert losses[-1] < 0.9 * losses[0]


def test_connectors_do_not_move_the_students_first_weights() -> None:
    torch.manual_seed(3)
    Connectors((LINK,), seed=0)
    drawn = torch.randn(4)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.randn(4))
    other = [Connectors((LINK,), seed=seed).linears[0].weight for seed in (0, 0, 1)]
    assert torch.equal(other[0], other[1])
    assert not torch.equal(other[0], other[2])


def test_a_guided_teacher_gives_the_answers_of_one_and_the_features_of_the_other() -> None:
    answers, guide_network = frozen("resnet10t"), frozen("test_resnet")
    guide_network.ask_for([POOLED])
    output = GuidedTeacher(answers, guide_network)(make_batch(2, side=32))
    assert torch.equal(output.logits, answers(make_batch(2, side=32)).logits)
    assert output.features is not None
    assert torch.equal(output.features[POOLED], guide_network(make_batch(2, side=32)).features[POOLED])


STAGE = Link("guide", "block", "layer2", 6, 6)


def test_a_teacher_computes_features_only_while_they_are_needed() -> None:
    lesson, batch = Lesson(frozen("test_resnet")), make_batch(2, side=32)
    asked: Any = lesson.teacher_for(Needs(True, (STAGE,)))
    assert list(asked(batch).features) == ["layer2"]
    rest: Any = lesson.teacher_for(Needs(True, ()))
    assert rest(batch).features is None
    assert lesson.teacher_for(Needs(False, ())) is lesson.answers is None


def test_whoever_is_no_longer_needed_is_freed() -> None:
    batch = make_batch(2, side=32)
    for needs, answers_are_needed in ((Needs(True, ()), True), (Needs(False, (STAGE,)), False)):
        answers, guide_network = frozen("resnet10t"), frozen("test_resnet")
        known = weakref.ref(guide_network if answers_are_needed else answers)
        lesson = Lesson(answers, guide=guide_network)
        both: Any = lesson.teacher_for(Needs(True, (STAGE,)))
        output = both(batch)
        assert (output.logits is None, list(output.features)) == (False, ["layer2"])
        del answers, guide_network, both
        rest: Any = lesson.teacher_for(needs)
        gc.collect()
        assert known() is None
        output = rest(batch)
        assert (output.logits is not None, output.features is not None) == (answers_are_needed, not answers_are_needed)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_the_mean_of_half_batches_is_the_whole(seed: int) -> None:
    objective = Objective("soft", terms=[term(always(2.0))])
    student, teacher, targets = outputs(seed)

    def rows(which: slice) -> Tensor:
        return objective(
            StudentOutput(
                student.cls_logits[which], student.dist_logits[which], {"guide": student.features["guide"][which]}
            ),
            TeacherOutput(teacher.logits[which], {"stage": teacher.features["stage"][which]}),
            targets[which],
        ).loss

    parts = torch.stack([rows(slice(index, index + 1)) for index in range(5)])
    torch.testing.assert_close(rows(slice(None)), parts.mean(), rtol=1e-5, atol=1e-5)
