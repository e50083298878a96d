"""The engine: the step, the average, accumulation, clipping and exact evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deit_kd import Batch, TeacherOutput
from deit_kd.asking import evaluate, score_teacher
from deit_kd.engine import Trainer, train
from tests.helpers import ONE_PROCESS
from tests.tiny_parts import make_batch, pixel_teacher, tiny_learner, tiny_student, tiny_trainer


def terms(trainer: Trainer, step: int = 0) -> Tensor:
    """Do one step; return its terms."""
    return trainer.step(iter([make_batch()]), step).terms


def halves(batch: Batch) -> Iterator[Batch]:
    for part in (slice(0, 4), slice(4, 8)):
        yield Batch(batch.images[part], batch.targets[part], batch.labels[part])


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_close(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip_grad_norm", [None, 0.1])  # clipped, a gradient of any size gives the same step
def test_accumulation_equals_the_larger_batch(clip_grad_norm: float | None) -> None:
    at_once, in_two = (tiny_trainer(clip_grad_norm=clip_grad_norm, accumulation_steps=steps) for steps in (1, 2))
    for step in range(3):
        results = [at_once.step(iter([make_batch(seed=step)]), step), in_two.step(halves(make_batch(seed=step)), step)]
        torch.testing.assert_close(*[result.terms for result in results])
    assert_close(at_once.student.model, in_two.student.model)


def test_a_step_returns_loss_and_both_terms() -> None:
    loss, classification, distillation, *_ = tiny_trainer().step(iter([make_batch()]), 0).terms
    torch.testing.assert_close(loss, (classification + distillation) / 2)


@pytest.mark.parametrize("head", ["head", "head_dist"])
def test_clipping_holds_both_heads(head: str) -> None:
    clipped = tiny_trainer(clip_grad_norm=1e-6)
    before = getattr(clipped.student.model.backbone, head).weight.detach().clone()
    clipped.step(iter([make_batch()]), 0)
    moved = (getattr(clipped.student.model.backbone, head).weight.detach() - before).norm()
    assert 0 < moved <= 0.1 * 1e-6 * 1.01 + 1e-7


def test_a_clipped_gradient_has_the_norm_that_is_asked_for() -> None:
    """The norm is that of all parameters together, and what is below it stays as it is."""
    first = tiny_trainer()
    first.distiller(make_batch()).loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in first.student.model.parameters()]).norm().item()
    moves = []
    for clip_grad_norm in (None, norm / 4, 4 * norm):
        trainer = tiny_trainer(clip_grad_norm=clip_grad_norm)
        before = weights(trainer.student.model)
        trainer.step(iter([make_batch()]), 0)
        after = weights(trainer.student.model)
        moves.append(torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]))
    torch.testing.assert_close(moves[1], moves[0] / 4, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moves[2], moves[0], rtol=1e-3, atol=1e-6)


def applied_beside(gradient_of_connectors: float) -> tuple[bool, list[Tensor]]:
    """Return whether a step is applied, and the student's weights after it."""
    learner = tiny_learner(tiny_student(), clip_grad_norm=0.1, connectors=nn.Linear(2, 2))
    assert learner.connectors is not None
    for module, gradient in ((learner.model, 1.0), (learner.connectors, gradient_of_connectors)):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
    learner.begin(0)
    applied = learner.measure(torch.amp.GradScaler("cpu", enabled=False))
    learner.apply(applied)
    return bool(applied), weights(learner.model)


def test_clipping_takes_the_norm_of_the_student_and_not_of_its_connectors() -> None:
    (small, without), (large, beside) = applied_beside(0.0), applied_beside(1e6)
    assert small
    assert large
    assert all(torch.equal(one, other) for one, other in zip(without, beside, strict=True))


def test_a_gradient_of_the_connectors_that_is_not_finite_leaves_out_the_step() -> None:
    applied, after = applied_beside(float("nan"))
    assert not applied
    assert all(torch.equal(one, other) for one, other in zip(after, weights(tiny_student()), strict=True))


def test_the_average_follows_the_model_and_starts_with_it() -> None:
    averaged = tiny_trainer(ema=0.99)
    assert averaged.student.ema is not None
    averaged.step(iter([make_batch()]), 0)
    after_one = weights(averaged.student.ema.module)
    averaged.step(iter([make_batch(seed=1)]), 1)
    after_two, model = weights(averaged.student.ema.module), weights(averaged.student.model)
    decay = averaged.student.ema.get_decay(2)
    assert 0 < decay < 0.99  # the warm-up
    expected = [decay * old + (1 - decay) * new for old, new in zip(after_one, model, strict=True)]
    torch.testing.assert_close(after_two, expected)


def test_drop_path_follows_from_seed_and_step_alone() -> None:
    first, second = tiny_trainer(drop_path=0.5), tiny_trainer(drop_path=0.5)
    for each in (first, second):
        torch.rand(3)
        each.student.model.train()
    assert torch.equal(terms(first, 4), terms(second, 4))
    other_step = tiny_trainer(drop_path=0.5)
    other_step.student.model.train()
    assert not torch.equal(terms(other_step, 5), terms(tiny_trainer(drop_path=0.5), 4))


def test_a_state_goes_on_bit_for_bit() -> None:
    whole, broken = tiny_trainer(drop_path=0.3, ema=0.9), tiny_trainer(drop_path=0.3, ema=0.9)
    for step in range(4):
        whole.step(iter([make_batch(seed=step)]), step)
    for step in range(2):
        broken.step(iter([make_batch(seed=step)]), step)
    resumed = tiny_trainer(drop_path=0.3, ema=0.9)
    resumed.load_state(broken.state())
    for step in range(2, 4):
        resumed.step(iter([make_batch(seed=step)]), step)
    for here, there in zip(everything(whole), everything(resumed), strict=True):
        assert torch.equal(here, there)


def test_the_state_holds_nothing_of_the_teacher() -> None:
    class Network(nn.Linear):
        def forward(self, batch: Any) -> Any:
            return TeacherOutput(super().forward(batch.images.flatten(1)))

    teaching = tiny_trainer()
    teaching.distiller.teacher = Network(3 * 16 * 16, 3)
    teaching.step(iter([make_batch()]), 0)
    state = teaching.state()
    assert set(state) == {"student", "ema", "optimizer", "scaler"}
    assert state["student"].keys() == tiny_student().state_dict().keys()


def test_training_learns_what_it_is_shown() -> None:
    losses: list[float] = []
    train(
        tiny_trainer(kind="none"),
        [make_batch()] * 10,
        first_step=0,
        total_steps=10,
        after_step=lambda step, result: losses.append(result.terms[0].item()),
    )
    assert len(losses) == 10
    assert losses[-1] < 0.95 * losses[0]


def scored(batches: list[Batch], model: nn.Module | None = None, **options: Any) -> Any:
    base: dict[str, Any] = {
        "classes": 3,
        "total": sum(len(batch.labels) for batch in batches),
        "processes": ONE_PROCESS,
        "precision": "off",
        "fusion": "softmax",
    }
    return evaluate({"model": model or tiny_student()}, batches, **{**base, **options})["model"]


def test_evaluation_counts_every_image_of_an_incomplete_batch() -> None:
    batch = make_batch(11)
    output = tiny_student().eval()(batch.images)
    right = (output.cls_logits.argmax(-1) == batch.labels).sum().item()
    batches = [Batch(*(field[part] for field in batch[:3])) for part in (slice(0, 4), slice(4, 8), slice(8, 11))]
    assert scored(batches)["heads"]["cls"]["top1"] == pytest.approx(100 * right / 11)


def test_evaluation_is_the_same_whatever_the_batches_are() -> None:
    batch = make_batch(8)
    whole, parts = scored([batch]), scored(list(halves(batch)))
    assert whole["agreement"] == parts["agreement"]
    for head in ("cls", "dist", "fused"):
        assert whole["heads"][head]["top1"] == parts["heads"][head]["top1"]
        assert whole["heads"][head]["nll"] == pytest.approx(parts["heads"][head]["nll"], rel=1e-5)


def test_agreement_with_the_teacher_is_counted_by_image() -> None:
    batch = make_batch(8)
    predictions = tiny_student().eval()(batch.images).cls_logits.argmax(-1)
    predictions[:2] = (predictions[:2] + 1) % 3
    agreement = scored(list(halves(batch)), teacher_predictions=predictions)["agreement"]
    assert agreement["cls_teacher"] == 0.75


def test_evaluation_leaves_the_mode_of_a_model_as_it_was() -> None:
    for training in (True, False):
        model = tiny_student().train(training)
        scored([make_batch()], model)
        assert model.training is training


def test_a_teacher_is_scored_on_what_it_says() -> None:
    batch = make_batch(8)
    score, predictions = score_teacher(pixel_teacher, list(halves(batch)), classes=3, total=8, processes=ONE_PROCESS)
    expected = batch.images[:, :, 0, 0].argmax(-1)
    assert torch.equal(predictions, expected)
    assert score["top1"] == pytest.approx(100 * (expected == batch.labels).float().mean().item())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", torch.float32)]
)
def test_the_student_runs_in_the_precision_that_is_asked_for(precision: str, dtype: torch.dtype) -> None:
    """In a step and in an evaluation; the loss stays near that of fp32."""
    trainer, dtypes = tiny_trainer(), []
    trainer.distiller.precision = precision
    trainer.student.model.backbone.head.register_forward_hook(lambda _, __, logits: dtypes.append(logits.dtype))
    torch.testing.assert_close(terms(trainer), terms(tiny_trainer()), rtol=0.02, atol=0.02)
    scored([make_batch()], trainer.student.model, precision=precision)
    assert dtypes == [dtype, dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_amp_trains_on_the_gpu(precision: str) -> None:
    device = torch.device("cuda")
    trainer = tiny_trainer(kind="none", processes=type(ONE_PROCESS)(0, 1, device))
    trainer.student.model.to(device)
    trainer.distiller.precision = precision
    trainer.scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    losses = [terms(trainer, step)[0].item() for step in range(10)]
    assert losses[-1] < losses[0]


def poisoned(batch: Batch, value: float = float("nan")) -> Batch:
    """Return `batch` with one view that no network can take."""
    images = batch.images.clone()
    images[3] = value
    return batch._replace(images=images)


def everything(trainer: Trainer) -> list[Tensor]:
    """Return weights, buffers, moments and average."""
    learner = trainer.student
    moments = [value for state in learner.optimizer.state.values() for value in state.values()]
    states = [*learner.model.state_dict().values(), *(learner.ema.module.state_dict().values() if learner.ema else ())]
    return [value.clone() for value in [*states, *moments] if isinstance(value, Tensor)]


def with_optimizer(name: str) -> Trainer:
    return tiny_trainer(ema=0.9, clip_grad_norm=1.0, optimizer=name, lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_a_finite_gradient_changes_nothing(name: str, value: float) -> None:
    trainer = with_optimizer(name)
    for step in range(2):  # after two the average is no longer the model itself, and would follow it
        trainer.step(iter([make_batch(seed=step)]), step)
    before = everything(trainer)
    result = trainer.step(iter([poisoned(make_batch(seed=2), value)]), 2)
    assert result.terms[3] == 1
    for was, now in zip(before, everything(trainer), strict=True):
        assert torch.equal(was, now)
    trainer.step(iter([make_batch(seed=3)]), 3)
    assert all(torch.isfinite(value).all() for value in everything(trainer))
    assert not torch.equal(before[0], everything(trainer)[0])


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("fp16", [False, True], ids=["", "fp16's scaler"])
@pytest.mark.parametrize("name", ["adamw", "adafactorbv", "kron", "sgd", "lamb"])
def test_a_first_step_without_a_finite_gradient_changes_nothing(name: str, fp16: bool) -> None:
    trainer = with_optimizer(name)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=fp16)
    before = everything(trainer)
    assert trainer.step(iter([poisoned(make_batch())]), 0).terms[3] == 1
    assert trainer.student.optimizer.state_dict()["state"] == {}
    for was, now in zip(before, everything(trainer), strict=True):
        assert torch.equal(was, now)
    with torch.compiler.set_stance("force_eager"):  # kron compiles for ten seconds
        assert trainer.step(iter([make_batch(seed=1)]), 1).terms[3] == 0
    assert all(torch.isfinite(value).all() for value in everything(trainer))


def test_under_the_scaler_a_gradient_whose_norm_is_too_large_changes_nothing() -> None:
    trainer = with_optimizer("sgd")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-100)
    trainer.step(iter([make_batch()]), 0)
    before = everything(trainer)
    hook = next(trainer.student.model.parameters()).register_hook(lambda gradient: gradient + 1e20 * 2.0**-100)
    assert trainer.step(iter([make_batch(seed=1)]), 1).terms[3] == 1
    hook.remove()
    for was, now in zip(before, everything(trainer), strict=True):
        assert torch.equal(was, now)


def test_a_step_that_is_left_out_is_as_if_it_had_not_been() -> None:
    with_a_bad_step, without = with_optimizer("adamw"), with_optimizer("adamw")
    for trainer in (with_a_bad_step, without):
        trainer.step(iter([make_batch()]), 0)
    with_a_bad_step.step(iter([poisoned(make_batch(seed=1))]), 1)
    for trainer in (with_a_bad_step, without):
        trainer.step(iter([make_batch(seed=2)]), 2)
    for a, b in zip(everything(with_a_bad_step), everything(without), strict=True):
        assert torch.equal(a, b)


def test_the_statistics_of_a_batch_norm_are_not_poisoned_either() -> None:
    trainer = tiny_trainer(kind="none")
    model = trainer.student.model
    model.register_module("norm", nn.BatchNorm2d(3))
    forward = model.forward
    model.forward = lambda images: forward(model.norm(images))
    model.train()
    trainer.step(iter([make_batch()]), 0)
    before = everything(trainer)
    trainer.step(iter([poisoned(make_batch(seed=1))]), 1)
    for was, now in zip(before, everything(trainer), strict=True):
        assert torch.equal(was, now)


def test_a_step_says_which_views_had_no_finite_loss() -> None:
    trainer = tiny_trainer(accumulation_steps=2)
    batches = [poisoned(make_batch()), make_batch(seed=1)]
    assert (~trainer.step(iter(batches), 0).is_finite).nonzero().tolist() == [[3]]


def test_answers_of_the_teacher_that_are_not_finite_are_counted() -> None:
    def broken(batch: Batch) -> TeacherOutput:
        logits = pixel_teacher(batch).logits
        logits[2, 1], logits[5, 0] = float("nan"), float("inf")
        return TeacherOutput(logits)

    trainer = tiny_trainer()
    assert terms(trainer)[4] == 0
    trainer.distiller.teacher = broken
    assert terms(trainer, 1)[4] == 2


def test_the_teacher_has_answered_before_the_student_keeps_anything() -> None:
    trainer, order = tiny_trainer(), []

    def teacher(batch: Batch) -> TeacherOutput:
        order.append("teacher")
        return pixel_teacher(batch)

    trainer.distiller.teacher = teacher
    trainer.student.model.register_forward_pre_hook(lambda *_: order.append("student"))
    trainer.step(iter([make_batch()]), 0)
    assert order == ["teacher", "student"]
