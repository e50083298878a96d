"""Drop-path is drawn at once before the forward pass, with timm's rates, and given to the blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch._dynamo.utils import counters

from deit_kd.engine import ask, autocast
from deit_kd.interfaces import Link
from deit_kd.students import ConnectedStudent, Connectors, TimmStudent
from deit_kd.students.paths import GivenPath
from tests.helpers import STUDENT, STUDENT_ARGS
from tests.tiny_parts import Operations, make_batch, tiny_student, tiny_trainer

CPU = torch.device("cpu")
DRAWS = {"bernoulli_", "rand", "uniform_", "random_", "native_dropout"}


def of_depth(depth: int, drop_path: float) -> TimmStudent:
    return tiny_student(args={**STUDENT_ARGS, "depth": depth}, drop_path=drop_path)


def drawn(student: TimmStudent, views: int) -> Tensor:
    paths = student.draw_paths(views)
    assert paths is not None
    return paths


def test_each_path_of_each_block_is_kept_as_often_as_timm_keeps_it_and_its_mean_stays() -> None:
    student = of_depth(4, 0.6)
    rates = [block.drop_path1.drop_prob for block in student.backbone.blocks[1:]]  # the first block drops nothing
    assert rates == pytest.approx([0.2, 0.4, 0.6])
    torch.manual_seed(0)
    factors = drawn(student, 100_000)
    keep = 1 - torch.tensor(rates).repeat_interleave(2)  # attention and MLP
    torch.testing.assert_close((factors > 0).float().mean(1), keep, atol=0.006, rtol=0)
    torch.testing.assert_close(factors.mean(1), torch.ones(6), atol=0.015, rtol=0)
    torch.testing.assert_close(factors.amax(1), 1 / keep)
    together = torch.corrcoef(factors) - torch.eye(6)
    assert together.abs().max() < 0.015  # each path for itself


def test_a_view_loses_the_branches_that_are_dropped_and_no_other() -> None:
    """Beside timm's blocks by hand, for paths of both branches of the only block that drops any."""
    student, images = tiny_student(drop_path=0.5), make_batch(3).images
    factors = torch.tensor([[0.0, 2.0, 0.0], [2.0, 0.0, 0.0]])
    model = student.backbone
    before: list[Tensor] = []
    model.blocks[1].register_forward_pre_hook(lambda _, given: before.append(given[0]))
    found = student(images, paths=factors)
    x, block = before[0], model.blocks[1]
    x = x + block.attn(block.norm1(x)) * factors[0].view(3, 1, 1)
    x = model.norm(x + block.mlp(block.norm2(x)) * factors[1].view(3, 1, 1))
    assert torch.equal(found.cls_logits, model.head(x[:, 0]))
    assert torch.equal(found.dist_logits, model.head_dist(x[:, 1]))


@pytest.mark.parametrize(
    ("name", "args", "size", "paths"),
    [
        (STUDENT, STUDENT_ARGS, 16, 2),
        ("vit_tiny_patch16_224", STUDENT_ARGS, 16, 2),
        ("convit_tiny", {"embed_dim": 32, "depth": 2, "num_heads": 2, "local_up_to_layer": 1}, 32, 2),  # one for both
        ("eva02_tiny_patch14_224", {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 2}, 32, 2),
        ("levit_128s", {}, 64, None),
        ("resnet18", {}, 32, 7),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 2), "num_heads": (1, 2)}, 56, 4),
    ],
)
def test_no_forward_pass_draws(name: str, args: dict[str, Any], size: int, paths: int | None) -> None:
    student = tiny_student(
        name=name, args=args, image_size=size, drop_path=0.5, distilled=not name.startswith(("resnet", "swin"))
    )
    factors = drawn(student, 3)
    assert paths in (None, len(factors))
    assert not any(type(module) is DropPath and module.drop_prob for module in student.modules())
    with Operations() as operations:
        student(make_batch(3, side=size).images, paths=factors)
    assert not DRAWS & operations.counts.keys()


def test_paths_that_do_not_belong_to_a_view_stay_timms() -> None:
    """TNT drops inner paths of each patch."""
    args = {"embed_dim": 32, "inner_dim": 8, "depth": 2, "num_heads_outer": 2, "num_heads_inner": 2}
    student = tiny_student(name="tnt_s_patch16_224", args=args, image_size=32, distilled=False, drop_path=0.5)
    with Operations() as operations:
        ask(student, make_batch(3, side=32).images)
    assert operations.counts["bernoulli_"] > 0


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_names_and_values_of_weights_are_timms(drop_path: float) -> None:
    student = tiny_student(drop_path=drop_path)
    model = timm.create_model(STUDENT, num_classes=3, img_size=16, **STUDENT_ARGS)
    state = student.backbone.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tiny_student().backbone.state_dict().items())
    assert len([*student.buffers()]) == 0


def test_without_a_rate_nothing_is_drawn_and_every_module_is_timms() -> None:
    student = tiny_student()
    assert student.draw_paths(8) is None
    assert not any(isinstance(module, DropPath) for module in student.modules())
    trainer, batch = tiny_trainer(), make_batch()
    with Operations() as operations:
        trainer.step(iter([batch]), 0)
    assert not DRAWS & operations.counts.keys()


def test_in_eval_mode_nothing_is_drawn() -> None:
    student, images = tiny_student(drop_path=0.9).eval(), make_batch().images
    before = torch.get_rng_state()
    assert torch.equal(ask(student, images).cls_logits, ask(tiny_student().eval(), images).cls_logits)
    assert torch.equal(torch.get_rng_state(), before)
    factors = torch.zeros(2, len(images))
    assert torch.equal(student(images, paths=factors).cls_logits, student(images).cls_logits)


def test_a_student_that_is_called_without_paths_draws_as_timm_does() -> None:
    student, images = tiny_student(drop_path=0.5), make_batch().images
    ask(student, images)  # nothing of an earlier step is left
    assert {module.kept for module in student.modules() if isinstance(module, GivenPath)} == {None}
    timms = tiny_student(drop_path=0.5)
    for name, module in [*timms.backbone.named_modules()]:
        if isinstance(module, GivenPath):
            timms.backbone.set_submodule(name, DropPath(module.drop_prob))
    answers = []
    for each in (student, timms):
        torch.manual_seed(3)
        answers.append(each(images).cls_logits)
    assert torch.equal(*answers)


def test_a_copy_takes_paths_of_its_own() -> None:
    student, images = tiny_student(drop_path=0.5), make_batch().images
    copied = copy.deepcopy(student)
    factors = drawn(student, len(images))
    assert torch.equal(copied(images, paths=factors).cls_logits, student(images, paths=factors).cls_logits)
    assert not torch.equal(copied(images, paths=factors * 0).cls_logits, student(images, paths=factors).cls_logits)


def test_layers_that_are_computed_twice_draw_by_themselves() -> None:
    """timm's checkpointing repeats what PyTorch's generator drew."""
    gradients = []
    for twice in (False, True):
        student = tiny_student(drop_path=0.5)
        student.backbone.set_grad_checkpointing(twice)
        assert (student.draw_paths(4) is None) is twice
        torch.manual_seed(0)
        student(make_batch(4).images).cls_logits.square().sum().backward()
        gradients.append(student.backbone.blocks[1].mlp.fc2.weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_factors_are_cast_once_for_all_paths() -> None:
    counts = []
    for depth in (2, 5):
        student = of_depth(depth, 0.5)
        factors, images = drawn(student, 4), make_batch(4).images
        with torch.no_grad(), autocast(CPU, "bf16"), Operations() as operations:
            student(images, paths=factors)
        with torch.no_grad(), autocast(CPU, "bf16"), Operations() as without:
            student.eval()(images)
        counts.append((operations.counts - without.counts)["_to_copy"])
    assert counts == [1, 1]


def compiled(network: nn.Module, graphs: list[Any]) -> Any:
    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    return torch.compile(network, backend=backend)


@pytest.mark.parametrize("connected", [False, True], ids=["alone", "with connectors"])
def test_a_compiled_student_is_one_graph_without_a_generator_and_drops_the_same_paths(connected: bool) -> None:
    student: Any = tiny_student(drop_path=0.5)
    if connected:
        links = [Link("pooled", "pooled", "pooled", 32, 8)]
        student = ConnectedStudent(student, Connectors(links), links)
    graphs: list[Any] = []
    fast = compiled(student, graphs)
    for step in range(3):
        answers = []
        for network in (fast, student):
            torch.manual_seed(step)
            with autocast(CPU, "bf16"):
                answers.append(ask(network, make_batch(seed=step).images))
        assert torch.equal(answers[0].cls_logits, answers[1].cls_logits)
        answers[0].cls_logits.sum().backward()
    assert len(graphs) == 1  # neither broken nor compiled again
    assert not counters["graph_break"]
    called = " ".join(str(node.target) for node in graphs[0].graph.nodes)
    assert not any(draw in called for draw in ("bernoulli", "rand", "uniform", "dropout(p"))
