"""Dense logits: a CNN's answer at every place teaches the patch tokens of the student."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from deit_kd.engine import Distiller
from deit_kd.interfaces import Batch, InputError, StudentOutput, TeacherOutput
from deit_kd.losses import DenseTerm, LogitTerm, Needs, Objective, hard_distillation, soft_distillation
from deit_kd.models.create import create_model
from deit_kd.models.tokens import answer_with_patches, names_of_heads
from deit_kd.runs.lesson import Lesson
from deit_kd.schedules import Schedule, always
from deit_kd.students import ConnectedStudent, Connectors
from deit_kd.teachers import EnsembleTeacher
from deit_kd.teachers.class_map import ClassMap
from deit_kd.teachers.dense import dense_grid, dense_logits
from tests.tiny_parts import make_batch, seen_at, tiny_student, tiny_teacher

CLASSES = 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def taught(views: int = 5, seed: int = 1) -> TeacherOutput:
    return TeacherOutput(2 * drawn(views, CLASSES, seed=seed), None, 3 * drawn(views, 2, 3, CLASSES, seed=seed + 1))


def term(**options: Any) -> DenseTerm:
    return DenseTerm(always(1.0), **options)


def rows(teacher: TeacherOutput, which: Any) -> TeacherOutput:
    return TeacherOutput(*(None if part is None else part[which] for part in teacher))


SOFT, HARD = {"mode": "soft"}, {"mode": "hard"}


def test_the_soft_loss_is_0_where_the_student_says_what_the_mix_does() -> None:
    loss, _ = term(mode="soft", mix=always(0.3)).per_example(taught().mixed(0.3) + 1.0, taught())
    torch.testing.assert_close(loss, torch.zeros(5), atol=1e-5, rtol=0)


def test_the_hard_loss_is_0_where_the_student_is_sure_of_the_mixs_argmax() -> None:
    sure = 100.0 * torch.nn.functional.one_hot(taught().mixed(0.3).argmax(-1), CLASSES)
    loss, _ = term(mix=always(0.3)).per_example(sure, taught())
    torch.testing.assert_close(loss, torch.zeros(5))


@pytest.mark.parametrize(("place", "share"), [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0)])
def test_the_share_of_a_place_falls_over_the_run(place: float, share: float) -> None:
    student = drawn(5, 2, 3, CLASSES, seed=5)
    found, _ = term().per_example(student, taught(), place)
    expected, _ = term(mix=always(share)).per_example(student, taught())
    assert torch.equal(found, expected)


def test_without_a_share_every_place_learns_the_answer_to_the_whole_image() -> None:
    student, teacher = drawn(5, 2, 3, CLASSES, seed=5), taught()
    assert teacher.logits is not None
    found, _ = term(mix=always(0.0)).per_example(student, teacher)
    labels = teacher.logits.argmax(-1)[:, None, None].expand(5, 2, 3)
    expected = torch.nn.functional.cross_entropy(student.movedim(-1, 1), labels, reduction="none").mean((1, 2))
    torch.testing.assert_close(found, expected)


def test_the_soft_loss_at_one_place_is_that_of_soft_labels() -> None:
    student, teacher = drawn(5, CLASSES, seed=5), taught()
    one = TeacherOutput(teacher.logits, None, teacher.dense_logits[:, :1, :1])
    found, _ = term(mode="soft", mix=always(0.0), temperature=always(2.0)).per_example(student[:, None, None], one)
    objective = Objective("soft", 1.0, 2.0)
    expected = objective(StudentOutput(student, student), TeacherOutput(teacher.logits), student).distillation
    torch.testing.assert_close(found.mean(), expected)


def test_the_loss_is_the_mean_of_that_at_each_place() -> None:
    student, target, temperature = drawn(5, 2, 3, CLASSES, seed=5), taught().mixed(0.3), 2.0
    soft = term(mode="soft", mix=always(0.3), temperature=always(temperature)).per_example(student, taught())[0]
    hard = term(mix=always(0.3)).per_example(student, taught())[0]
    places = [(row, column) for row in range(2) for column in range(3)]
    by_place = [soft_distillation(student[:, i, j], target[:, i, j], temperature) for i, j in places]
    torch.testing.assert_close(soft, torch.stack(by_place).mean(0))
    by_place = [hard_distillation(student[:, i, j], target[:, i, j]) for i, j in places]
    torch.testing.assert_close(hard, torch.stack(by_place).mean(0))


@pytest.mark.parametrize("options", [SOFT, HARD])
def test_the_loss_is_per_example(options: dict[str, Any]) -> None:
    student, order = drawn(5, 2, 3, CLASSES, seed=5), torch.tensor([4, 2, 0, 1, 3])
    together, _ = term(**options).per_example(student, taught(), 0.5)
    for which in (order, order[:1]):
        alone, _ = term(**options).per_example(student[which], rows(taught(), which), 0.5)
        torch.testing.assert_close(alone, together[which])


@pytest.mark.parametrize("options", [SOFT, HARD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_gradient_are_finite_in_half_precision(options: dict[str, Any], dtype: torch.dtype) -> None:
    student = (6e4 * drawn(5, 2, 3, CLASSES, seed=5).clamp(-1, 1)).to(dtype).requires_grad_()
    loss, _ = term(**options).per_example(student, taught(), 0.5)
    loss.mean().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("options", [SOFT, HARD])
@pytest.mark.parametrize("where", ["logits", "dense_logits"])
def test_a_view_whose_answer_is_not_finite_has_no_loss_and_no_gradient(options: dict[str, Any], where: str) -> None:
    teacher = taught()
    getattr(teacher, where)[2].view(-1)[0] = float("nan")
    student = drawn(5, 2, 3, CLASSES, seed=5).requires_grad_()
    loss, answered = term(**options).per_example(student, teacher, 0.5)
    loss.sum().backward()
    assert answered.tolist() == [True, True, False, True, True]
    assert loss[2] == 0
    assert student.grad is not None
    assert student.grad[2].abs().sum() == 0
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("before", [True, False])
def test_an_answer_that_is_not_finite_at_one_place_is_counted_in_any_order_of_terms(before: bool) -> None:
    teacher = taught()
    assert teacher.dense_logits is not None
    teacher.dense_logits[2, 0, 1, 0] = float("inf")
    terms = [term(), LogitTerm("hard", always(1.0))]
    student = StudentOutput(drawn(5, CLASSES), drawn(5, CLASSES), dense_logits=drawn(5, 2, 3, CLASSES))
    objective = Objective("soft", terms=terms if before else terms[::-1])
    assert objective.checked(student, teacher, drawn(5, CLASSES).softmax(-1)).teacher_not_finite == 1


def test_stored_labels_give_the_loss_of_the_answers_that_they_come_from() -> None:
    student, teacher, place = drawn(5, 2, 3, CLASSES, seed=5), taught(), 0.4
    shares = torch.full((5,), 1 - place, dtype=torch.float64)
    stored = TeacherOutput(teacher.logits, dense_labels=teacher.mixed(shares).argmax(-1).short())
    assert torch.equal(term().per_example(student, stored, place)[0], term().per_example(student, teacher, place)[0])


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.7, 1.0])
def test_the_mix_of_a_number_and_of_one_for_each_view_have_the_same_bits(share: float) -> None:
    assert torch.equal(taught().mixed(share), taught().mixed(torch.full((5,), share, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "harder"}, "mode 'harder' of dense is unknown; use hard or soft"),
        ({"mix": Schedule(2.0, 0.0)}, "is not between 0 and 1"),
        ({"mode": "soft", "temperature": always(0.0)}, "0 is not above 0"),
    ],
)
def test_a_term_that_cannot_work_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        term(**options)


def test_a_student_and_a_teacher_without_places_are_refused() -> None:
    objective = Objective("none", terms=[term()])
    plain = StudentOutput(drawn(5, CLASSES))
    with pytest.raises(InputError, match="dense needs a student that answers at every place"):
        objective(plain, taught(), drawn(5, CLASSES))
    with pytest.raises(InputError, match="dense needs the teacher's logits at every place"):
        objective(
            plain._replace(dense_logits=drawn(5, 2, 3, CLASSES)), TeacherOutput(drawn(5, CLASSES)), drawn(5, CLASSES)
        )


LINEAR = [
    *("test_resnet", "regnety_002", "efficientnet_b0", "densenet121", "rexnet_100", "nfnet_l0", "dla34", "resnetv2_50"),
    *("repvgg_a0", "mobileone_s0"),
]
NORMED = ["convnext_atto", "edgenext_xx_small", "poolformerv2_s12"]


def network(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options).eval()


@pytest.mark.parametrize("name", LINEAR)
def test_the_mean_over_places_is_the_networks_answer(name: str) -> None:
    model = network(name)
    assert dense_grid(name, model, 64) == (2, 2)
    with torch.no_grad():
        last = model.forward_features(drawn(2, 3, 64, 64))
        torch.testing.assert_close(dense_logits(model, last).mean((1, 2)), model.forward_head(last))


def test_rows_and_columns_of_places_are_those_of_the_map() -> None:
    model = network("test_resnet")
    with torch.no_grad():
        last = model.forward_features(drawn(2, 3, 64, 96))
        dense = dense_logits(model, last)
        assert dense.shape == (2, 2, 3, 5)
        for row, column in ((0, 2), (1, 0)):
            alone = model.forward_head(last[:, :, row, column, None, None])
            torch.testing.assert_close(dense[:, row, column], alone)


@pytest.mark.parametrize("name", NORMED)
def test_a_norm_after_the_pooling_acts_on_each_place_as_on_a_whole_image(name: str) -> None:
    model = network(name)
    assert dense_grid(name, model, 64) == (2, 2)
    with torch.no_grad():
        last = model.forward_features(drawn(2, 3, 64, 64))
        corner = last[:, :, :1, :1].expand_as(last)  # an image that looks like its corner everywhere
        torch.testing.assert_close(dense_logits(model, last)[:, 0, 0], model.forward_head(corner))


@pytest.mark.parametrize(
    ("name", "options", "size", "reason"),
    [
        ("test_vit", {"img_size": 64}, 64, "is a VisionTransformer, whose last features are tokens"),
        ("mobilenetv3_small_050", {}, 64, "has more than a norm and a linear layer after the pooling"),
        ("lcnet_050", {}, 64, "has more than a norm and a linear layer"),
        ("inception_next_atto", {}, 64, "has more than a norm and a linear layer"),
        ("test_resnet", {"global_pool": "max"}, 64, "has another head"),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 1, 1, 1)}, 64, "has another head"),
        ("vgg11", {}, 64, "has another head"),
        ("test_resnet", {}, 32, "has a last map of one place at 32 px"),
    ],
)
def test_a_teacher_whose_head_has_no_answer_at_places_is_refused(
    name: str, options: dict[str, Any], size: int, reason: str
) -> None:
    with pytest.raises(InputError, match=f"{name} .*{reason}.*; name another teacher, or leave out the dense term"):
        dense_grid(name, network(name, **options), size)


def asked(**options: Any) -> Any:
    teacher = tiny_teacher(dense=True, image_size=64, **options)
    teacher.ask_for_dense(True)
    return teacher


def test_a_teacher_answers_at_places_in_the_same_pass_and_says_the_same() -> None:
    teacher, batch = asked(), make_batch(4)
    plain = tiny_teacher(image_size=64)(batch)
    answer = teacher(batch)
    torch.testing.assert_close(answer.logits, plain.logits)
    torch.testing.assert_close(answer.dense_logits.mean((1, 2)), plain.logits)
    assert answer.dense_logits.shape == (4, *teacher.grid, 3)
    assert teacher(make_batch(0)).dense_logits.shape == (0, *teacher.grid, 3)
    teacher.ask_for_dense(False)
    assert teacher(batch).dense_logits is None


def test_places_and_features_come_from_one_pass() -> None:
    teacher, batch = asked(), make_batch(2)
    dense = teacher(batch).dense_logits
    teacher.ask_for(("pooled",))
    answer = teacher(batch)
    assert torch.equal(answer.dense_logits, dense)
    assert list(answer.features) == ["pooled"]


def test_places_are_answered_only_while_they_are_needed() -> None:
    lesson, batch = Lesson(asked()), make_batch(2)
    for dense in (True, False):
        teacher: Any = lesson.teacher_for(Needs(True, (), dense))
        assert (teacher(batch).dense_logits is not None) == dense


def test_places_are_in_the_datasets_classes() -> None:
    mapping = ClassMap([[2], [0], [4]])
    teacher, batch = asked(classes=tuple("abcde")), make_batch(2)
    whole = teacher(batch)
    teacher._map = mapping
    mapped = teacher(batch)
    assert torch.equal(mapped.dense_logits, whole.dense_logits[..., [2, 0, 4]])
    torch.testing.assert_close(mapped.dense_logits.mean((1, 2)), mapped.logits)


def test_a_merged_class_has_the_probability_of_its_columns_at_each_place() -> None:
    teacher, batch = asked(classes=tuple("abcde")), make_batch(2)
    whole = teacher(batch)
    teacher._map = ClassMap([[0, 1], [2], [3, 4]])
    merged = teacher(batch)
    columns = whole.dense_logits.softmax(-1)
    expected = torch.stack([columns[..., [0, 1]].sum(-1), columns[..., 2], columns[..., [3, 4]].sum(-1)], dim=-1)
    torch.testing.assert_close(merged.dense_logits.softmax(-1), expected)


@pytest.mark.parametrize("combine", ["mean", "draw"])
def test_several_teachers_are_combined_place_by_place_as_on_a_whole_image(combine: str) -> None:
    members = [asked(seed=seed) for seed in (0, 1)]
    ensemble = EnsembleTeacher(members, [0.25, 0.75], combine)
    ensemble.ask_for_dense(True)
    view_ids = torch.tensor([[0, position] for position in range(4)])
    batch = make_batch(4)._replace(view_ids=view_ids)
    places = torch.stack([member(batch).dense_logits.softmax(-1) for member in members])
    drawn_members = ensemble.draw(view_ids)
    expected = 0.25 * places[0] + 0.75 * places[1] if combine == "mean" else places[drawn_members, torch.arange(4)]
    torch.testing.assert_close(ensemble(batch).dense_logits.exp(), expected)


def test_several_teachers_with_other_grids_are_refused() -> None:
    with pytest.raises(InputError, match="have the grids 2 x 2, 4 x 4, and places are combined one by one"):
        EnsembleTeacher([asked(), tiny_teacher(dense=True, image_size=128)], [1.0, 1.0])


def test_a_teacher_that_was_not_built_for_it_is_refused() -> None:
    with pytest.raises(InputError, match="dense needs a teacher with logits at every place"):
        tiny_teacher(image_size=64).ask_for_dense(True)


def test_a_student_learns_from_a_teacher_at_every_place() -> None:
    student, teacher = tiny_student(patches=True), asked()
    learner = ConnectedStudent(student, Connectors(()), (), teacher.grid)
    distiller = Distiller(learner, teacher, Objective("hard", 0.5, terms=[term()]))
    batch: Batch = make_batch(4)
    terms = distiller(batch, 0.2)
    terms.loss.backward()
    assert terms.others["dense"] > 0
    assert seen_at(16).image_size == batch.images.shape[-1]
    assert all(parameter.grad is not None for parameter in student.parameters())
    torch.testing.assert_close(terms.loss, (terms.classification + terms.distillation) / 2 + terms.others["dense"])


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_224"])
def test_vits_that_could_drop_patches_but_do_not_have_places(name: str) -> None:
    model = create_model(
        "student.name", name, image_size=28 if "14" in name else 32, distilled=True, depth=2, num_classes=3
    )
    answer_with_patches("student.name", model)
    assert names_of_heads(model) == ("cls", "dist", "patch")
