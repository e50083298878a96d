"""The losses: parity with timm and the published deit code, constants worked by hand, and Hinton's limit."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.loss import SoftTargetCrossEntropy
from timm.task import TokenDistillationTask
from torch import Tensor, nn
from torch.nn import functional as F

from deit_kd import (
    InputError,
    Objective,
    StudentOutput,
    TeacherOutput,
    hard_distillation,
    soft_distillation,
    soft_target_cross_entropy,
)
from deit_kd.losses import LogitTerm
from deit_kd.schedules import Schedule
from deit_kd.students import TimmStudent
from tests.helpers import STUDENT, STUDENT_ARGS

lawful = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 10_000)


def logits(seed: int, rows: int = 4, classes: int = 5) -> Tensor:
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(seed: int) -> tuple[StudentOutput, TeacherOutput, Tensor]:
    student = StudentOutput(logits(seed).float(), logits(seed + 1).float())
    return student, TeacherOutput(logits(seed + 2).float()), logits(seed + 3).softmax(-1).float()


class Fixed(nn.Module):
    """A teacher that always gives the same logits."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, images: Tensor) -> Tensor:
        return self.answer


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [("soft", 1.0), ("soft", 3.0), ("hard", 1.0)],
)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_objective_is_timms_token_distillation(kind: str, temperature: float, alpha: float) -> None:
    backbone = timm.create_model(STUDENT, img_size=16, num_classes=5, **STUDENT_ARGS)
    images, targets, answer = torch.randn(4, 3, 16, 16), logits(1).softmax(-1).float(), logits(2).float()
    task = TokenDistillationTask(
        backbone,
        Fixed(answer),
        SoftTargetCrossEntropy(),
        distill_type=kind,
        task_loss_weight=1 - alpha,
        temperature=temperature,
        verbose=False,
    )
    theirs = task(images, targets)
    ours = Objective(kind, alpha, temperature)(TimmStudent(backbone)(images), TeacherOutput(answer), targets)
    expected = (theirs["loss"], theirs["task_loss"], theirs["distill_loss"])
    torch.testing.assert_close(ours[:3], expected, rtol=1e-5, atol=1e-6)


@lawful
@given(seeds, st.floats(0.5, 20))
def test_numel_scale_is_the_published_deit_formula(seed: int, temperature: float) -> None:
    student, teacher, targets = outputs(seed)
    assert student.dist_logits is not None
    s, t, T = student.dist_logits, teacher.logits, temperature
    published = (
        F.kl_div(F.log_softmax(s / T, 1), F.log_softmax(t / T, 1), reduction="sum", log_target=True)
        * (T * T)
        / s.numel()
    )
    ours = Objective("soft", 0.5, temperature, scale="numel")(student, teacher, targets)
    torch.testing.assert_close(ours.distillation, published, rtol=1e-4, atol=1e-6)


@lawful
@given(seeds)
def test_numel_scale_is_exactly_c_times_smaller(seed: int) -> None:
    per_batch = Objective("soft", scale="batchmean")(*outputs(seed)).distillation
    per_number = Objective("soft", scale="numel")(*outputs(seed)).distillation
    assert per_number == per_batch / 5


@lawful
@given(seeds, st.floats(0, 1), st.sampled_from(["soft", "hard"]))
def test_alpha_weighs_the_terms_as_a_convex_mix(seed: int, alpha: float, kind: str) -> None:
    terms = Objective(kind, alpha)(*outputs(seed))
    torch.testing.assert_close(terms.loss, (1 - alpha) * terms.classification + alpha * terms.distillation)


@lawful
@given(seeds, st.floats(0.5, 10))
def test_soft_distillation_is_zero_only_for_the_teacher_itself(seed: int, temperature: float) -> None:
    student, teacher = logits(seed), logits(seed + 1)
    torch.testing.assert_close(soft_distillation(teacher + 7, teacher, temperature), torch.zeros(4).double())
    assert (soft_distillation(student, teacher, temperature) > 0).all()


@lawful
@given(seeds)
def test_soft_gradient_tends_to_the_zero_meaned_logit_difference_over_c(seed: int) -> None:
    student, teacher = logits(seed).requires_grad_(), logits(seed + 1)
    soft_distillation(student, teacher, temperature=1e5).sum().backward()
    centred = [x - x.mean(-1, keepdim=True) for x in (student.detach(), teacher)]
    torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / 5, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (soft_target_cross_entropy(torch.zeros(1, 4), torch.full((1, 4), 0.25)), math.log(4)),
        (
            soft_target_cross_entropy(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.5, 0.5]])),
            math.log(16 / 3) / 2,
        ),
        (hard_distillation(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]])), math.log(2)),
        (hard_distillation(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[9.0, 2.0]])), math.log(4)),
        # teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2
        (soft_distillation(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), 1.0), 0.13081203594),
        (soft_distillation(torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]]), 2.0), 4 * 0.13081203594),
    ],
)
def test_constants_worked_by_hand(loss: Tensor, expected: float) -> None:
    assert loss.tolist() == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
def test_losses_are_computed_in_fp32_under_autocast(kind: str) -> None:
    student, teacher, targets = outputs(3)
    half = StudentOutput(student.cls_logits.bfloat16(), student.dist_logits.bfloat16())
    wide = StudentOutput(half.cls_logits.float(), half.dist_logits.float())
    with torch.autocast("cpu", torch.bfloat16):
        terms = Objective(kind)(half, teacher, targets)
    assert {term.dtype for term in terms[:3]} == {torch.float32}
    assert tuple(terms) == tuple(Objective(kind)(wide, teacher, targets))


@pytest.mark.parametrize("function", [hard_distillation, lambda s, t: soft_distillation(s, t, 3.0)])
def test_losses_are_per_example(function: object) -> None:
    together = function(logits(0), logits(1))
    apart = torch.cat([function(logits(0)[i : i + 1], logits(1)[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, apart)


def test_kind_none_needs_neither_teacher_nor_second_head() -> None:
    objective = Objective("none")
    terms = objective(StudentOutput(torch.zeros(2, 4)), None, torch.full((2, 4), 0.25))
    assert not objective.needs.teacher
    assert terms.loss == terms.classification == pytest.approx(math.log(4))
    assert terms.distillation == 0


@pytest.mark.parametrize(
    ("student", "teacher", "reason"),
    [
        (StudentOutput(torch.zeros(1, 2)), TeacherOutput(torch.zeros(1, 2)), "distillation token"),
        (StudentOutput(torch.zeros(1, 2), torch.zeros(1, 2)), None, "needs a teacher"),
    ],
)
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_missing_head_or_teacher_is_refused(
    kind: str, student: StudentOutput, teacher: TeacherOutput | None, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        Objective(kind)(student, teacher, torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kind": "sof"}, "nearest: soft"),
        ({"alpha": 1.5}, "alpha: 1.5"),
        ({"alpha": -0.1}, "alpha: -0.1"),
        ({"alpha": float("nan")}, "alpha: nan"),
        ({"temperature": 0.0}, "temperature: 0 "),
        ({"scale": "sum"}, "scale: 'sum'"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(options: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Objective(**options)


@pytest.mark.parametrize("kind", ["hard", "soft", "standardised"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_view_without_a_finite_answer_has_no_distillation_term(kind: str, value: float) -> None:
    student = StudentOutput(torch.randn(4, 3), torch.randn(4, 3, requires_grad=True))
    taught, targets = torch.randn(4, 3), F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    broken = taught.clone()
    broken[2, 1] = value
    objective, others = Objective(kind), [0, 1, 3]
    checked = objective.checked(student, TeacherOutput(broken), targets)
    rest = StudentOutput(student.cls_logits[others], student.dist_logits[others])
    expected = objective(rest, TeacherOutput(taught[others]), targets[others])
    torch.testing.assert_close(checked.terms.distillation, expected.distillation * 3 / 4)
    checked.terms.loss.backward()
    assert student.dist_logits.grad[2].tolist() == [0, 0, 0]
    assert student.dist_logits.grad.isfinite().all()
    assert (checked.teacher_not_finite, checked.is_finite.tolist()) == (1, [True] * 4)


def test_an_objective_is_one_graph_wherever_its_schedules_are() -> None:
    """What `train.compile` captures: once for fixed numbers, then for numbers, and for each piece of a schedule."""
    falling = Schedule(0.8, 0.2, until=0.5, shape="cosine")
    objective = Objective("soft", falling, 3.0, terms=[LogitTerm("standardised", Schedule(1.0, 0.0), None)])
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def captured(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    judge = torch.compile(objective.checked, backend=captured, fullgraph=True)
    chance = torch.Generator().manual_seed(0)
    for step in range(20):
        cls, dist, taught, targets = torch.randn(4, 8, 5, generator=chance)
        given = StudentOutput(cls, dist), TeacherOutput(taught), targets.softmax(-1), step / 20
        assert torch.equal(judge(*given).terms.loss, objective.checked(*given).terms.loss)
    assert len(graphs) <= 4
