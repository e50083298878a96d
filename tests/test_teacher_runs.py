"""Whole runs with every kind of teacher: mapped, several at once, an assistant, and one that must not teach."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deit_kd import Batch, FrozenTeacher, InputError
from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.console import console
from deit_kd.exports import missing_libraries
from deit_kd.jobs.train import train
from deit_kd.run_folder import HeadScores
from deit_kd.runs.parts import build_teacher
from deit_kd.teachers import EnsembleTeacher
from tests.helpers import ONE_PROCESS, assert_same_scores, evaluated, heads_in, refused, tiny
from tests.tiny_parts import seen_at, tiny_teacher

SYNSETS = ("n01440764", "n02102040", "n02979186")
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three classes that differ in colour: whatever can learn, learns them."""
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 8)):
        for name, colour in zip(SYNSETS, COLOURS, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(noise.normal(colour, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def recipe(photos: Path, output: Path, *options: str) -> list[str]:
    own = {
        "data__image_size": 32,
        "data__crop_fraction": None,
        "augment__erasing": 0,
        "student__name": "vit_tiny_patch16_224",
        "teacher__name": None,
        "teacher__random_weights": None,
        "optim__lr": 2e-3,
        "train__batch_size": 16,
        "train__log_every_steps": None,
    }
    return [*tiny(photos, output, **own), *options]


def run(photos: Path, output: Path, *options: str) -> HeadScores:
    config, _ = parse_config(recipe(photos, output, *options))
    return train(config)


@pytest.fixture(scope="module")
def assistant(photos, tmp_path_factory) -> Path:
    """A small supervised student that scores well enough to teach."""
    folder = tmp_path_factory.mktemp("runs") / "assistant"
    heads = run(photos, folder, "--distill.kind", "none", "--train.epochs", "12", "--augment.mixup", "0",
                "--augment.cutmix", "0", "--augment.color_jitter", "0")  # fmt: skip
    assert heads["heads"]["cls"]["top1"] > 90
    return folder


def facts(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_mapped_teacher_is_printed_and_recorded(photos, tmp_path):
    with console.capture() as capture:
        run(photos, tmp_path / "run", "--teacher.name", "test_resnet", "--teacher.random_weights", "true",
        "--teacher.label_set", "imagenet-1k", "--teacher.image_size", "48")  # fmt: skip
    told = capture.get()
    assert "teacher: n02102040 <- 217 n02102040" in told
    assert "teacher: test_resnet sees 48 px" in told
    assert "warning: the teacher has random weights" in told
    teacher = facts(tmp_path / "run")["teacher"]
    assert teacher["class_map"]["n02979186"] == [[482, "n02979186"]]
    assert teacher["random_weights"] is True
    assert teacher["image_size"] == 48


def test_assistant_chain_of_students(photos, assistant, tmp_path):
    """A run's student teaches the next; a distilled one through its fused head, and neither is named again."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(photos, first, "--teacher.checkpoint", str(assistant), "--student.checkpoint", str(assistant))
    assert facts(first)["teacher"]["name"] == "vit_tiny_patch16_224"
    heads = run(photos, second, "--teacher.checkpoint", str(first))
    fused = heads_in(first)["heads"]["fused"]
    assert heads["teacher"]["top1"] == fused["top1"]
    assert heads["teacher"]["nll"] == pytest.approx(fused["nll"], rel=1e-5)


def test_runs_teacher_teaches_the_next(photos, assistant, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run(photos, first, "--teacher.checkpoint", str(assistant), "--teacher.image_size", "48")
    run(photos, second, "--teacher.checkpoint", f"{first}:teacher")
    assert facts(second)["teacher"]["weights"] == facts(first)["teacher"]["weights"]
    assert facts(second)["teacher"]["image_size"] == 48


def test_fitted_teacher_of_a_distilled_name_is_its_plain_twin(photos, tmp_path):
    name = ["--teacher.name", "deit_tiny_distilled_patch16_224", "--teacher.min_top1", "0"]
    shape = ["--teacher.args", "{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}"]
    fit = ["--teacher.fit.epochs", "1", "--teacher.fit.batch_size", "16", "--teacher.fit.optim.warmup_epochs", "0",
           "--teacher.fit.folder", str(tmp_path / "teachers")]  # fmt: skip
    run(photos, tmp_path / "run", *name, *shape, *fit)
    assert facts(tmp_path / "run")["teacher"]["name"] == "deit_tiny_patch16_224"


def test_network_that_averages_its_two_heads_is_fitted_and_teaches(photos, tmp_path):
    fit = ["--teacher.fit.epochs", "1", "--teacher.fit.batch_size", "16", "--teacher.fit.optim.warmup_epochs", "0",
           "--teacher.fit.folder", str(tmp_path / "teachers")]  # fmt: skip
    shape = ["--teacher.args", "{embed_dim: [8, 16, 24, 32], depth: [1, 1, 1, 1]}", "--teacher.min_top1", "0"]
    heads = run(photos, tmp_path / "run", "--teacher.name", "repvit_m0_9", *shape, *fit)
    fitted = json.loads(next((tmp_path / "teachers").glob("*/heads.json")).read_text())["heads"]
    assert fitted["dist"] is None
    assert heads["teacher"]["nll"] == pytest.approx(fitted["cls"]["nll"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--teacher.name", "resnet19"], "teacher.name: 'resnet19' is not a timm model"),
        (["--teacher.name", "test_resnet", "--teacher.args", "{num_classes: 2}"], "teacher.args: num_classes cannot"),
        (["--teacher.name", "test_vit", "--data.image_size", "40"], "not a multiple of teacher.name's patch size"),
        (["--teacher.name", "test_resnet", "--teacher.fit.batch_size", "999"], "teacher.fit.batch_size: "),
    ],
)
def test_teacher_that_cannot_be_fitted_is_refused_with_its_own_key(photos, tmp_path, options, reason):
    fit = ["--teacher.fit.epochs", "1", "--teacher.fit.batch_size", "16", "--teacher.fit.folder", str(tmp_path)]
    with pytest.raises(InputError, match=reason):
        run(photos, tmp_path / "run", *fit, *options)


def test_run_without_a_teacher_has_none_to_lend(photos, assistant, tmp_path):
    with pytest.raises(InputError, match="learned from no teacher"):
        run(photos, tmp_path / "run", "--teacher.checkpoint", f"{assistant}:teacher")


def test_grafted_run_is_evaluated_from_its_own_weights(photos, assistant, tmp_path):
    folder = tmp_path / "grafted"
    with console.capture() as capture:
        heads = run(photos, folder, "--teacher.checkpoint", str(assistant), "--student.checkpoint", str(assistant))
    account = facts(folder)["student"]
    assert account["derived"]["dist_token"] == "cls_token"
    assert "weights: derived: " in capture.get()
    assert main(["eval", str(folder), "--diagnose", "true"]) == 0
    assert_same_scores(evaluated(folder), heads)
    diagnosis = json.loads((folder / "eval" / "validation" / "diagnosis.json").read_text())
    assert list(diagnosis["gallery"][0]["attention"]) == ["cls", "dist"]


@pytest.mark.parametrize(("name", "blocks"), [("vit_small_patch14_reg4_dinov2", 2), ("vit_small_patch16_dinov3", 0)])
def test_grafted_student_with_registers_is_seen_from_inside(photos, assistant, tmp_path, name, blocks):
    """Its registers stand between its tokens and its patches; the blocks of an Eva are not plain ones."""
    shape = "{embed_dim: 32, depth: 2, num_heads: 2}"
    size = ["--data.image_size", "28" if "14" in name else "32", "--student.name", name, "--student.args", shape]
    run(photos, tmp_path / "run", *size, "--teacher.checkpoint", str(assistant), "--evaluate.report", "true")
    diagnosis = json.loads((tmp_path / "run" / "report" / "diagnosis.json").read_text())
    assert [layer["layer"] for layer in diagnosis["tokens"]] == ["input", "block 1", "block 2"][: 1 + blocks]
    maps = diagnosis["gallery"][0]["attention"]
    assert list(maps) == (["cls", "dist"] if blocks else [])
    assert all(len(one["last block"]) == 2 for one in maps.values())


def test_teacher_with_classes_in_a_wrong_order_does_not_teach(photos, assistant, tmp_path, capsys):
    """Its file says that column 0 is the class that it calls 1."""
    mapping = tmp_path / "map.csv"
    mapping.write_text("class,teacher\n" + "".join(f"{name},{(i + 1) % 3}\n" for i, name in enumerate(SYNSETS)))
    output = tmp_path / "run"
    options = ["--teacher.checkpoint", str(assistant), "--teacher.class_map", str(mapping)]
    said = refused(["train", *recipe(photos, output, *options)], capsys)
    assert '{"n01440764": 0, "n02979186": 2, "n02102040": 1}' in said
    assert not output.exists()
    assert main(["train", *recipe(photos, output, *options, "--teacher.min_top1", "0")]) == 0


@pytest.mark.parametrize("is_stored", [False, True])
def test_teacher_with_two_classes_exchanged_does_not_teach(photos, assistant, tmp_path, capsys, is_stored):
    """It scores above guessing; what it says about the photos shows whose column is whose, from a store, too."""
    mapping, output = tmp_path / "map.csv", tmp_path / "run"
    mapping.write_text("class,teacher\n" + "".join(f"{name},{i}\n" for name, i in zip(SYNSETS, (0, 2, 1), strict=True)))
    options = ["--teacher.checkpoint", str(assistant), "--teacher.class_map", str(mapping), "--teacher.min_top1", "20"]
    if is_stored:
        assert main(["store", "build", *recipe(photos, output, *options), "--store", str(tmp_path / "store")]) == 0
        options += ["--teacher.store", str(tmp_path / "store")]
    error = refused(["train", *recipe(photos, output, *options)], capsys)
    assert "seem to be in another order" in error
    assert '{"n02102040": 1, "n02979186": 2}' in error
    assert not output.exists()


def test_teacher_that_answers_nan_does_not_teach(photos, assistant, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(assistant / "student" / "model.safetensors")
    state["blocks.0.attn.qkv.bias"] = torch.full_like(state["blocks.0.attn.qkv.bias"], float("nan"))
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((assistant / "student" / "config.json").read_text())
    with pytest.raises(InputError, match=r"not \[2, 3\] finite logits"):
        run(photos, tmp_path / "run", "--teacher.checkpoint", str(tmp_path))


def test_several_teachers_from_a_recipe(photos, assistant, tmp_path):
    members = tmp_path / "members.yaml"
    members.write_text(
        f"teacher:\n  combine: draw\n  members:\n    - {{checkpoint: {assistant}, weight: 3}}\n"
        "    - {name: test_resnet, random_weights: true, label_set: imagenet-1k, image_size: 48}\n"
    )
    run(photos, tmp_path / "run", "--config", str(members), "--evaluate.report", "true")
    teacher = facts(tmp_path / "run")["teacher"]
    assert [member["weight"] for member in teacher["members"]] == [0.75, 0.25]
    assert [member["image_size"] for member in teacher["members"]] == [32, 48]
    assert teacher["random_weights"] is True
    assert 'data-head="teacher"' in (tmp_path / "run" / "report" / "report.html").read_text()


def test_runs_student_leaves_for_timm(assistant, tmp_path):
    target = tmp_path / "export"
    assert main(["export", str(assistant), "--format", "timm", "--to", str(target)]) == 0
    assert {path.name for path in target.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert json.loads((target / "config.json").read_text())["label_names"] == list(SYNSETS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--format", "tim"], "use one of timm, local-dir, transformers, onnx, torch-export (nearest: timm)"),
        (
            ["--format", "transformers", "--precision", "fp16"],
            "transformers has no choice of outputs, precision or size",
        ),
        (["--format", "timm", "--to", "HERE"], "already exists"),
    ],
)
def test_export_that_cannot_be_is_refused(assistant, tmp_path, options, reason, capsys):
    if missing_libraries("transformers") and "transformers" in options:
        pytest.skip("needs transformers")
    options = [str(tmp_path) if option == "HERE" else option for option in options]
    assert reason in refused(["export", str(assistant), *options], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--teacher.checkpoint", "ASSISTANT", "--teacher.random_weights", "true"], "and teacher.random"),
        (["--teacher.name", "test_resnet", "--teacher.pretrained", "true", "--teacher.random_weights", "true"],
         "teacher.pretrained and teacher.random_weights"),
        (["--teacher.name", "test_resnet"], "nothing to take its weights from"),
    ],
)  # fmt: skip
def test_recipe_that_names_weights_twice_or_never_is_refused(photos, assistant, tmp_path, options, reason, capsys):
    options = [str(assistant) if option == "ASSISTANT" else option for option in options]
    assert reason in refused(["train", *recipe(photos, tmp_path / "run", *options)], capsys)


class Constant(torch.nn.Module):
    """A network that gives every image the same logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def constant(*logits):
    return FrozenTeacher(Constant(list(logits)), student_mean=MEAN, student_std=STD, mean=MEAN, std=STD)


def views(count, epoch=0, first=0):
    ids = torch.stack([torch.full((count,), epoch), torch.arange(first, first + count)], dim=1)
    return Batch(torch.zeros(count, 3, 4, 4), torch.zeros(count, 2), torch.zeros(count, dtype=torch.long), ids)


def test_mean_is_of_probabilities_not_of_logits():
    teachers = [constant(4.0, 0.0), constant(0.0, 1.0)]
    answer = EnsembleTeacher(teachers, [3, 1])(views(2)).logits
    expected = 0.75 * torch.tensor([4.0, 0.0]).softmax(-1) + 0.25 * torch.tensor([0.0, 1.0]).softmax(-1)
    torch.testing.assert_close(answer.exp(), expected.expand(2, 2))


def test_certain_teachers_give_finite_log_probabilities():
    answer = EnsembleTeacher([constant(200.0, 0.0), constant(300.0, 0.0)], [1, 1])(views(1)).logits
    assert answer.isfinite().all()


def test_draw_depends_on_the_view_alone():
    teacher = EnsembleTeacher([constant(0.0, 9.0), constant(9.0, 0.0)], [1, 3], "draw", seed=5)
    whole = teacher(views(64)).logits
    parts = torch.cat([teacher(views(16, first=first)).logits for first in range(0, 64, 16)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, teacher(views(64, epoch=1)).logits)


def test_draw_follows_the_weights():
    teacher = EnsembleTeacher([constant(0.0, 1.0), constant(1.0, 0.0), constant(1.0, 1.0)], [1, 3, 4], "draw")
    drawn = torch.cat([teacher.draw(views(4000, epoch=epoch).view_ids) for epoch in range(3)])
    shares = torch.bincount(drawn) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.125, 0.375, 0.5]), atol=0.02, rtol=0)


def test_draw_without_view_ids_is_the_mean():
    teachers = [constant(4.0, 0.0), constant(0.0, 1.0)]
    batch = views(2)._replace(view_ids=None)
    assert torch.equal(
        EnsembleTeacher(teachers, [1, 1], "draw")(batch).logits, EnsembleTeacher(teachers, [1, 1])(batch).logits
    )


@pytest.mark.parametrize(("weights", "combine"), [([1], "mean"), ([1, 0], "mean"), ([1, 1], "median")])
def test_ensemble_that_makes_no_sense_is_refused(weights, combine):
    with pytest.raises(InputError):
        EnsembleTeacher([constant(0.0, 1.0), constant(1.0, 0.0)], weights, combine)


def test_ensemble_stays_in_eval_without_gradient():
    teacher = EnsembleTeacher([constant(0.0, 1.0), constant(1.0, 0.0)], [1, 1])
    teacher.train()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(member.training for member in teacher.members)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distilled_teacher_answers_with_the_mean_of_its_softmaxes(tmp_path, dtype):
    import timm

    from deit_kd import head_probabilities
    from deit_kd.models.tokens import read_heads

    torch.manual_seed(0)
    network = timm.create_model(
        "deit_tiny_distilled_patch16_224", embed_dim=32, depth=2, num_heads=2, img_size=32, num_classes=3
    ).eval()
    torch.save(network.state_dict(), tmp_path / "t.pth")
    teacher = tiny_teacher(
        name="deit_tiny_distilled_patch16_224",
        checkpoint=str(tmp_path / "t.pth"),
        args={"embed_dim": 32, "depth": 2, "num_heads": 2},
        classes=("a", "b", "c"),
        student=seen_at(32),
        dtype=dtype,
    )
    batch = views(2)._replace(images=torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        expected = head_probabilities(read_heads(network, batch.images))["fused"]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(teacher(batch).logits.exp(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("members", [False, True])
def test_a_recipe_can_fold_the_norms_of_its_teachers(photos_root: Path, tmp_path: Path, members: bool) -> None:
    network = {"name": "test_resnet", "random_weights": True}
    named = {"teacher__name": None, "teacher__random_weights": None, "teacher__members": [network, network]}
    options = {"teacher__fold": True, "teacher__min_top1": 0, **(named if members else {})}
    config = parse_config(tiny(photos_root, tmp_path / "run", **options))[0]
    teacher = build_teacher(config, ("a", "b", "c"), ONE_PROCESS, None)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in teacher.modules())
    assert any("batch norms are folded" in line for line in teacher.lines())
