"""The teacher: frozen for ever, right input, right classes, and weights that are really loaded."""

from __future__ import annotations

import copy
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from deit_kd import Batch, Distiller, FrozenTeacher, InputError, Objective
from deit_kd.config import ANSWERS, effects
from deit_kd.models.tokens import read_heads
from deit_kd.teachers.fold import fold_batch_norms
from deit_kd.teachers.frozen import FusedHeads
from tests.helpers import CLASSES, MEAN, STD
from tests.tiny_parts import make_batch, save_teacher, seen_at, tiny_student, tiny_teacher


def plain_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=3).eval()


def train_a_step(frozen: FrozenTeacher) -> Distiller:
    student = tiny_student().train()
    distiller = Distiller(student, frozen, Objective("soft"))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    frozen.train()
    distiller(make_batch(4)).loss.backward()
    optimizer.step()
    return distiller


def test_it_stays_in_eval_whatever_is_asked() -> None:
    frozen = tiny_teacher()
    nn.ModuleList([frozen]).train()
    frozen.train(True)
    assert not any(module.training for module in frozen.modules())


def test_teacher_batchnorm_never_moves() -> None:
    frozen = tiny_teacher()
    before = {name: value.clone() for name, value in frozen.network.named_buffers()}
    train_a_step(frozen)
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in frozen.network.named_buffers())


def test_it_stays_frozen_when_it_is_copied_or_averaged() -> None:
    for copied in (copy.deepcopy(tiny_teacher()), ModelEmaV3(tiny_teacher()).train().module):
        assert not any(module.training for module in copied.train().modules())
        assert not any(parameter.requires_grad for parameter in copied.parameters())


def test_it_has_no_gradient() -> None:
    frozen = tiny_teacher()
    train_a_step(frozen)
    assert all(not p.requires_grad and p.grad is None for p in frozen.parameters())
    assert not frozen(make_batch(4)).logits.requires_grad


def test_the_students_gradient_flows_beside_it() -> None:
    student = train_a_step(tiny_teacher()).student
    assert isinstance(student, nn.Module)
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_it_sees_the_images_as_it_was_trained_on_them() -> None:
    raw = torch.rand(4, 3, 16, 16)
    own_mean, own_std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    def normalised(mean: Any, std: Any) -> Tensor:
        return (raw - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

    network = plain_network()
    frozen = FrozenTeacher(copy.deepcopy(network), student_mean=MEAN, student_std=STD, mean=own_mean, std=own_std)
    answered = frozen(make_batch(4)._replace(images=normalised(MEAN, STD))).logits
    torch.testing.assert_close(answered, network(normalised(own_mean, own_std)).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answered, network(normalised(MEAN, STD)), atol=1e-3)


def test_a_checkpoints_teacher_sees_the_students_normalisation(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "teacher")
    frozen = tiny_teacher(checkpoint=str(folder), student=seen_at(16, mean=(0.1, 0.2, 0.3)))
    assert torch.equal(frozen(make_batch(4)).logits, tiny_teacher(seed=7)(make_batch(4)).logits)


def test_the_recipes_mean_and_std_win(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "teacher")
    frozen = tiny_teacher(checkpoint=str(folder), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    raw = make_batch(4).images * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
    expected = tiny_teacher(seed=7)(make_batch(4)._replace(images=raw)).logits
    torch.testing.assert_close(frozen(make_batch(4)).logits, expected, rtol=1e-4, atol=1e-5)


def test_it_may_see_another_image_size() -> None:
    frozen = tiny_teacher(name="test_vit", image_size=32)
    assert frozen(make_batch(4, side=16)).logits.shape == (4, 3)


def test_the_same_batch_is_left_as_it_is() -> None:
    images = make_batch(4).images
    before = images.clone()
    tiny_teacher(mean=(0.5, 0.5, 0.5))(make_batch(4)._replace(images=images))
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_come_in_fp32_under_any_autocast(dtype: torch.dtype) -> None:
    frozen = tiny_teacher(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = frozen(make_batch(4)).logits
    assert inside.dtype == torch.float32
    assert torch.equal(inside, frozen(make_batch(4)).logits)


def test_the_distiller_is_no_owner_of_the_teacher() -> None:
    distiller = Distiller(tiny_student(), tiny_teacher(), Objective("hard"))
    assert not isinstance(distiller, nn.Module)
    assert not any("teacher" in name for name in distiller.student.state_dict())  # type: ignore[attr-defined]


def test_a_checkpoint_gives_its_weights(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "teacher")
    for place in (folder, folder / "model.safetensors"):
        assert torch.equal(
            tiny_teacher(checkpoint=str(place))(make_batch(4)).logits, tiny_teacher(seed=7)(make_batch(4)).logits
        )


def test_a_network_with_two_heads_teaches_the_mean_of_their_probabilities() -> None:
    backbone, images = tiny_student().eval().backbone, make_batch(4).images
    heads = read_heads(backbone, images).logits.values()
    mean = torch.stack([logits.softmax(-1) for logits in heads]).mean(0)
    torch.testing.assert_close(FusedHeads(backbone)(images).exp(), mean)


def test_what_is_too_fine_for_the_teachers_size_is_averaged_and_not_picked() -> None:
    stripes = torch.tensor([-1.0, 1.0, 1.0, -1.0]).repeat(8).expand(1, 3, 32, 32)
    batch = Batch(stripes, torch.eye(3)[:1], torch.tensor([0]))
    same: dict[str, Any] = {"student_mean": MEAN, "student_std": STD, "mean": MEAN, "std": STD}
    seen = FrozenTeacher(nn.Flatten(), **same, image_size=8)(batch).needed_logits()
    assert seen.view(3, 8, 8)[..., 1:-1].abs().max() < 0.2


@pytest.mark.parametrize("name", ["iformer_m_distilled", "levit_128s"])
def test_a_network_that_averages_its_two_heads_teaches_with_its_own_weights(tmp_path: Path, name: str) -> None:
    torch.manual_seed(7)
    own = timm.create_model(name, num_classes=3).eval()
    save_file({name: tensor.contiguous() for name, tensor in own.state_dict().items()}, tmp_path / "own.safetensors")
    frozen = tiny_teacher(name=name, checkpoint=str(tmp_path / "own.safetensors"), student=seen_at(224))
    images = torch.randn(2, 3, 224, 224)
    answer = frozen(Batch(images, torch.eye(3)[:2], torch.tensor([0, 1]))).logits
    with torch.no_grad():
        torch.testing.assert_close(answer, own(images), rtol=1e-4, atol=1e-5)


def test_a_run_folder_is_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save_teacher(tmp_path / "run" / "student")
    frozen = tiny_teacher(checkpoint=str(tmp_path / "run"))
    assert torch.equal(frozen(make_batch(4)).logits, tiny_teacher(seed=7)(make_batch(4)).logits)


@pytest.mark.parametrize("saved", [("bars", "rings", "dots"), ("stars", "rings", "bars", "dots")])
def test_classes_in_another_order_or_among_others_are_found_by_name(tmp_path: Path, saved: tuple[str, ...]) -> None:
    frozen = tiny_teacher(checkpoint=str(save_teacher(tmp_path / "teacher", saved)))
    columns = [saved.index(name) for name in CLASSES]
    everything = tiny_teacher(seed=7, classes=saved)(make_batch(4)).logits
    assert torch.equal(frozen(make_batch(4)).logits, everything[:, columns])


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        (("bars", "dots", "Rings"), r"1 of 3 classes have no column of the teacher: rings \(nearest: Rings\)"),
        (("bars", "dots"), "1 of 3 classes have no column of the teacher: rings"),
    ],
)
def test_a_class_that_the_teacher_does_not_name_is_refused(tmp_path: Path, saved: tuple[str, ...], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        tiny_teacher(checkpoint=str(save_teacher(tmp_path / "teacher", saved)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"args": {"num_classes": 1000}}, "teacher.args: num_classes cannot be given here"),
        ({"random_weights": False}, "has nothing to take its weights from; set one of"),
        ({"pretrained": True, "random_weights": True}, "pretrained and teacher.random_weights to take its weights"),
        ({"pretrained": True}, "check the network, or give a checkpoint"),
        ({"name": None}, "teacher.name: is not set"),
        ({"name": "resnet19"}, r"not a timm model \(nearest: resnet1"),
        (
            {"name": "test_vit", "args": {"global_pool": ""}, "student": seen_at(160)},
            r"returns \[2, 101, 3\] for two images, not \[2, 3",
        ),
        ({"checkpoint": "nowhere"}, "teacher.checkpoint: nowhere is not there"),
        ({"name": "test_vit", "student": seen_at(20)}, "image_size: 20 is not a multiple of teacher.name's patch"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused_in_one_line(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        tiny_teacher(**options)
    assert "\n" not in str(caught.value)


def test_without_a_network_pretrained_weights_are_refused_at_once() -> None:
    since = time.perf_counter()
    with pytest.raises(InputError, match="check the network"):
        tiny_teacher(name="regnety_160.deit_in1k", pretrained=True)
    assert time.perf_counter() - since < 20


class Bomb:
    """Unpickling it touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"model": bomb}])
@pytest.mark.parametrize("write", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_malicious_checkpoint_does_not_execute(tmp_path: Path, wrap: Any, write: Any) -> None:
    write(wrap(Bomb(tmp_path / "touched")), tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth"):
        tiny_teacher(checkpoint=str(tmp_path / "evil.pth"))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.safetensors", b""),
        ("weights.safetensors", b"x" * 100),
        ("weights.pth", b""),
        ("weights.pth", b"x" * 99),
    ],
)
def test_a_broken_checkpoint_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"teacher\.checkpoint: .*weights\.") as caught:
        tiny_teacher(checkpoint=str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds no state dict"):
        tiny_teacher(checkpoint=str(tmp_path / "list.pth"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_it_answers_on_the_gpu_as_on_the_cpu() -> None:
    frozen = tiny_teacher(device=torch.device("cuda"))
    there = frozen(make_batch(4).to(torch.device("cuda"))).logits.cpu()
    here = tiny_teacher()(make_batch(4)).logits
    assert (there - here).norm() < 5e-3 * here.norm()  # convolutions round to TF32


def with_statistics(name: str) -> FrozenTeacher:
    """Return a teacher whose batch norms have statistics and weights as after training."""
    teacher = tiny_teacher(name=name, image_size=32, channels_last=False)
    chance = torch.Generator().manual_seed(1)
    for module in teacher.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_mean, module.running_var, module.weight, module.bias):
                value.data = torch.rand(value.shape, generator=chance) + 0.5
    return teacher


def norms_of(teacher: FrozenTeacher) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in teacher.network.modules())


@pytest.mark.parametrize("name", ["test_resnet", "regnety_002", "test_efficientnet"])
def test_a_folded_teacher_answers_alike_without_its_norms(name: str) -> None:
    teacher, batch = with_statistics(name), make_batch(4, side=32)
    expected = teacher(batch).logits
    assert fold_batch_norms(name, teacher.network, 32) == norms_of(with_statistics(name))
    assert norms_of(teacher) == 0
    torch.testing.assert_close(teacher(batch).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_folded_teacher_gives_the_maps_that_a_guide_is_asked_for() -> None:
    teacher, batch = with_statistics("test_resnet"), make_batch(4, side=32)
    layer = teacher.layer_names()[-1]
    teacher.ask_for([layer])
    expected = teacher(batch).features[layer]
    fold_batch_norms("test_resnet", teacher.network, 32)
    torch.testing.assert_close(teacher(batch).features[layer], expected, rtol=1e-3, atol=1e-3)


def test_a_norm_whose_convolution_is_read_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.norm.running_mean.add_(1)

        def forward(self, images: Tensor) -> Tensor:
            found = self.convolution(images)
            return self.norm(found) + found

    with pytest.raises(InputError, match=r"teacher\.fold: twice answers differently"):
        fold_batch_norms("twice", Twice().eval(), 16)


def test_a_teacher_without_norms_is_not_folded() -> None:
    with pytest.raises(InputError, match=r"teacher\.fold: test_vit has no BatchNorm after a convolution"):
        tiny_teacher(name="test_vit", image_size=160, fold=True)


def test_folding_is_part_of_what_identifies_a_store() -> None:
    assert effects()["teacher.fold"] == ANSWERS
