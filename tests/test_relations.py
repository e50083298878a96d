"""Relations: what one image's places have in common, compared between networks of any width."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deit_kd import Distiller, InputError, Objective, StudentOutput, TeacherOutput
from deit_kd.features import layer_names, shapes
from deit_kd.interfaces import Link
from deit_kd.losses import FeatureTerm, map_links, relations
from deit_kd.schedules import Schedule, always
from deit_kd.students import ConnectedStudent, Connectors
from tests.tiny_parts import make_batch, tiny_student


def maps(seed: int, channels: int = 6, side: int = 4, count: int = 5) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def test_relations_that_are_equal_cost_nothing() -> None:
    assert torch.equal(relations(maps(0), maps(0)), torch.zeros(5))
    assert relations(maps(0), maps(1)).min() > 0.1


def test_neither_scale_nor_a_rotation_of_channels_changes_relations() -> None:
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2))).Q
    turned = torch.einsum("ec,bchw->behw", rotation, maps(0))
    torch.testing.assert_close(relations(7 * turned, maps(1)), relations(maps(0), maps(1)), rtol=1e-4, atol=1e-5)


def test_the_divergence_of_three_places_is_that_of_a_hand() -> None:
    # Places in one row: the first two point the same way for the teacher, the last two for the student.
    teacher = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])[None, :, None]
    student = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])[None, :, None]
    high, low = math.e**2 / (1 + math.e**2), 1 / (1 + math.e**2)  # cosines 1 and 0 at temperature 1/2
    log = math.log
    first = high * log(high / 0.5) + low * log(low / 0.5)  # the student's first place is like no other
    second = (high - low) * log(high / low)
    third = 0.5 * log(0.5 / high) + 0.5 * log(0.5 / low)
    assert relations(student, teacher, 0.5).item() == pytest.approx((first + second + third) / 3, rel=1e-5)


def test_a_place_is_not_compared_with_itself() -> None:
    features = maps(0)
    places = torch.nn.functional.normalize(features.flatten(2).mT, dim=-1)
    other = torch.nn.functional.normalize(maps(1).flatten(2).mT, dim=-1)
    expected = torch.zeros(5)
    for row in range(16):
        rest = [place for place in range(16) if place != row]
        own, theirs = (
            ((each[:, rest] @ each[:, row, :, None]).squeeze(-1) / 0.1).log_softmax(-1) for each in (places, other)
        )
        expected += (theirs.exp() * (theirs - own)).sum(-1) / 16
    torch.testing.assert_close(relations(features, maps(1)), expected)


def test_relations_are_per_example() -> None:
    order = torch.tensor([4, 2, 0, 1, 3])
    together = relations(maps(0), maps(1, channels=9, side=8))
    torch.testing.assert_close(relations(maps(0)[order], maps(1, channels=9, side=8)[order]), together[order])
    torch.testing.assert_close(relations(maps(0)[2:3], maps(1, channels=9, side=8)[2:3]), together[2:3])


def test_a_finer_map_is_averaged_to_the_coarser_and_both_to_a_grid() -> None:
    fine = maps(1, channels=9, side=8)
    averaged = torch.nn.functional.adaptive_avg_pool2d(fine, 4)
    torch.testing.assert_close(relations(maps(0), fine), relations(maps(0), averaged))
    assert relations(maps(0), fine, grid=2).shape == (5,)


def term(temperature: Schedule | None = None) -> FeatureTerm:
    return FeatureTerm("relations", always(1.0), (Link("r", "b", "s", 6, 9, False),), temperature=temperature)


def measured(own: Tensor, theirs: Tensor, place: float = 0.0, temperature: Schedule | None = None) -> Tensor:
    logits = torch.zeros(len(own), 3)
    objective = Objective("none", 1.0, terms=[term(temperature)])
    return objective(StudentOutput(logits, None, {"r": own}), TeacherOutput(None, {"s": theirs}), logits, place).loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_gradient_are_finite_in_half_precision(dtype: torch.dtype) -> None:
    student = (6e4 * maps(0).clamp(-1, 1)).to(dtype)
    student[0, :, 0] = 0  # places without any activation
    student[1] = student[1].sign() * 6e-8
    student[2] = 1  # every place the same
    student.requires_grad_()
    teacher = maps(1, channels=9).to(dtype).relu()
    teacher[3] = 0
    loss = measured(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_the_temperature_follows_its_schedule() -> None:
    own, theirs = maps(0), maps(1, channels=9)
    loss = measured(own, theirs, 0.5, Schedule(0.1, 0.3, shape="linear"))
    torch.testing.assert_close(loss, relations(own, theirs, 0.2).mean())


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match=r"temperature: 0 is not above 0"):
        term(Schedule(0.1, 0.0))


def test_nothing_is_measured_of_no_view() -> None:
    assert measured(maps(0)[:0], maps(1, channels=9)[:0]) == 0


VIT = {f"blocks.{number}": (192, 8, 8) for number in range(12)}
CNN = {"layer1": (64, 32, 32), "layer2": (128, 16, 16), "layer3": (256, 8, 8), "layer4": (512, 2, 1)}


def test_relations_take_the_layers_of_a_guide_and_no_connector() -> None:
    links = map_links("relations", VIT, CNN)
    assert [(link.student, link.teacher) for link in links] == [
        ("blocks.0", "layer1"),
        ("blocks.5", "layer2"),
        ("blocks.11", "layer3"),
    ]
    assert not list(Connectors(links).parameters())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stages": ["layer9"]}, "no stage 'layer9' .nearest: layer"),
        ({"stages": ["layer1"], "blocks": [12]}, "no block 12; use 0 to 11"),
        ({"blocks": [0, 1]}, "2 blocks cannot be compared with 3 stages"),
        ({"grid": 3}, "cannot be averaged to one of 3 x 3"),
        ({"grid": 1}, "grid of 1 x 1, and fewer than 3 places have no relations"),
        ({"stages": ["layer4"], "blocks": [11]}, "grid of 2 x 1, and fewer than 3 places"),
    ],
)
def test_relations_that_cannot_be_linked_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        map_links("relations", VIT, CNN, **options)


def test_a_student_learns_the_relations_of_a_wider_one() -> None:
    torch.manual_seed(0)
    student, batch = tiny_student(image_size=32), make_batch(8, side=32)
    target = {"stage": maps(1, channels=9, side=8, count=8)}
    own = student(batch.images, layer_names(student.backbone)).features
    assert own is not None
    links = map_links("relations", shapes(own), shapes(target), blocks=[1], stages=["stage"])
    learner = ConnectedStudent(student, Connectors(links), links)
    objective = Objective("none", 1.0, terms=[FeatureTerm("relations", always(1.0), links)])
    distiller = Distiller(learner, lambda batch: TeacherOutput(None, target), objective)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        terms = distiller(batch)
        terms.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(terms.loss.item())
    assert losses[-1] < losses[0]
