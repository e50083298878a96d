"""A student that learns from the average of its own weights, and one that learns from a finished run."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deit_kd.asking import evaluate, score_teacher
from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.distributed import process_group
from deit_kd.runs.average import AverageTeacher
from deit_kd.runs.lesson import connect
from deit_kd.runs.run import build_trainer, prepare
from deit_kd.schedules import Schedule
from deit_kd.teaching.ready import ready_lesson
from tests.forked import run_on_two
from tests.helpers import ONE_PROCESS, TINY, as_arguments, heads_in, records, refused, tiny
from tests.started import kill
from tests.tiny_parts import make_batch, tiny_student, tiny_trainer

ALPHA = {"start": 0, "end": 0.8, "from": 0.5, "until": 0.7, "shape": "linear"}
SMALL: dict[str, Any] = {
    "levit_128s": {"embed_dim": [16, 32, 48], "depth": [1, 1, 1], "num_heads": [2, 2, 2], "key_dim": 8},
    "efficientformerv2_s0": {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
}
OPTIONS: dict[str, Any] = {
    "teacher__name": None,
    "teacher__random_weights": None,
    "teacher__kind": "average",
    "distill__kind": "soft",
    "distill__alpha": ALPHA,
    "distill__temperature": 1.0,
    "train__epochs": 3,
    "train__batch_size": 16,
    "train__ema_decay": 0.75,  # warmed up after 4 of 9 steps
}


def own(root: Path, output: Path, **options: Any) -> list[str]:
    return tiny(root, output, **{**OPTIONS, **options})


def steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder) if record["kind"] == "step"]


@pytest.mark.parametrize("fusion", ["softmax", "logits"])
def test_its_answers_are_those_of_the_averages_own_evaluation(fusion: str) -> None:
    made = tiny_trainer(drop_path=0.3, ema=0.5)
    for step in range(3):
        made.step(iter([make_batch(8, seed=step)]), step)
    assert made.student.ema is not None
    batches = [make_batch(8, seed=9), make_batch(5, seed=10)]
    common: dict[str, Any] = {"classes": 3, "total": 13, "processes": ONE_PROCESS}
    scores = evaluate({"ema": made.student.ema.module}, batches, **common, precision="off", fusion=fusion)["ema"]
    taught, _ = score_teacher(AverageTeacher(made.student.ema.module, fusion=fusion), batches, **common)
    assert taught["top1"] == scores["heads"]["fused"]["top1"]
    assert taught["nll"] == pytest.approx(scores["heads"]["fused"]["nll"], rel=1e-5)


@pytest.mark.parametrize("name", ["levit_128s", "efficientformerv2_s0"])  # keep their attention's biases between calls
def test_its_answers_follow_all_its_weights(name: str) -> None:
    network = tiny_student(name=name, args=SMALL[name], image_size=64)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    teacher, batch = AverageTeacher(network), make_batch(2, side=64)
    teacher(batch)
    for path, parameter in network.named_parameters():
        if path.endswith("attention_biases"):
            nn.init.normal_(parameter, std=3.0)
    moved = teacher(batch).needed_logits()
    torch.testing.assert_close(moved, AverageTeacher(copy.deepcopy(network))(batch).needed_logits())


def test_it_is_the_engines_average_itself_and_gets_no_gradient(photos_root: Path, tmp_path: Path) -> None:
    config = parse_config(own(photos_root, tmp_path / "run"))[0]
    with process_group("cpu") as processes:
        run = prepare(config, processes)
        lesson = ready_lesson(run)
        made = build_trainer(connect(run, lesson), lesson)
    teacher = made.distiller.teacher
    assert made.student.ema is not None
    assert isinstance(teacher, AverageTeacher)
    assert teacher.network is made.student.ema.module
    batch = make_batch(4)
    made.distiller(batch, place=1.0).loss.backward()
    assert not teacher.network.training
    assert not teacher(batch).needed_logits().requires_grad
    assert all(parameter.grad is None for parameter in teacher.network.parameters())
    assert run.student.backbone.head_dist.weight.grad is not None


def test_its_heads_are_fused_as_the_recipe_scores_them(photos_root: Path, tmp_path: Path) -> None:
    run = prepare(parse_config(own(photos_root, tmp_path / "run", evaluate__fusion="logits"))[0], ONE_PROCESS)
    lesson, batch = ready_lesson(run), make_batch(4)
    teacher: Any = build_trainer(connect(run, lesson), lesson).distiller.teacher
    for head in (teacher.network.backbone.head, teacher.network.backbone.head_dist):
        nn.init.normal_(head.weight)  # or the two fusions are nearly the same
    heads = teacher.network(batch.images).logits.values()
    torch.testing.assert_close(teacher(batch).needed_logits(), (sum(heads) / 2).log_softmax(-1))


def test_it_teaches_after_its_warm_up_and_a_killed_run_ends_bit_for_bit(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"student__drop_path": 0.2, "train__checkpoint_every_steps": 1}
    assert main(["train", *own(photos_root, tmp_path / "whole", **options)]) == 0
    assert "teacher: the average of the student's own weights" in capsys.readouterr().out
    whole = steps(tmp_path / "whole")
    for done, step in enumerate(whole):
        alpha = Schedule(0, 0.8, 0.5, 0.7, "linear").at(done / len(whole))
        assert step["loss"] == pytest.approx((1 - alpha) * step["classification"] + alpha * step["distillation"])
    assert whole[-1]["distillation"] > 0
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["teacher"] is None
    killed = own(photos_root, tmp_path / "killed", **options)
    kill(killed, 8, tmp_path / "said.txt")
    assert main(["train", *killed, "--resume", "auto"]) == 0
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    for file in ("student/model.safetensors", "heads.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    said = refused(
        [
            "train",
            *tiny(
                photos_root,
                tmp_path / "next",
                teacher__name=None,
                teacher__random_weights=None,
                teacher__checkpoint=f"{tmp_path / 'whole'}:teacher",
            ),
        ],
        capsys,
    )
    assert "learned from its own average" in said


def test_a_guide_beside_it_gives_the_features_and_is_what_is_recorded(photos_root: Path, tmp_path: Path) -> None:
    terms = [{"kind": "relations", "blocks": [1], "stages": ["layer2"], "weight": {"start": 1, "until": 0.5}}]
    guide = {"guide__name": "test_resnet", "guide__random_weights": True, "distill__terms": terms}
    assert main(["train", *own(photos_root, tmp_path / "run", **guide)]) == 0
    made = steps(tmp_path / "run")
    assert [list(step.get("terms", {})) for step in made] == [["relations"]] * 6 + [[]] * 3  # to the end of its epoch
    assert made[-1]["distillation"] > 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["teacher"]["name"] == "test_resnet"


def test_two_processes_give_the_losses_of_one(photos_root: Path, tmp_path: Path) -> None:
    assert main(["train", *own(photos_root, tmp_path / "one")]) == 0
    run_on_two(["train", *own(photos_root, tmp_path / "two")], tmp_path / "said.txt")
    for here, there in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        for term in ("loss", "classification", "distillation"):
            assert here[term] == pytest.approx(there[term], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"train__ema_decay": 0}, "with train.ema_decay 0 no average of the weights is kept"),
        ({"train__ema_decay": 0.99}, "averages over 100 steps, and the run has 9"),
        ({"distill__alpha": 0.5}, "distill.alpha: is 0.5 at step 0 of the run's 9, but the average"),
        ({"distill__alpha": {**ALPHA, "from": 0.3}}, "at step 3 of the run's 9"),
        ({"distill__alpha": {**ALPHA, "from": 0, "until": 0.3, "shape": "constant"}}, "is 0.8 at step 3"),
        ({"distill__alpha": {"start": 0.8, "until": 0.1}}, "is 0.8 at step 0"),
        (
            {"distill__kind": "none", "distill__alpha": None, "distill__terms": [{"kind": "hard"}]},
            "distill.terms: weight of hard: is 1 at step 0",
        ),
        ({"teacher__store": "store"}, "no store can keep the answers of the student's own average"),
        ({"teacher__name": "test_resnet"}, "set teacher.name null, or teacher.kind network"),
        ({"distill__terms": [{"kind": "relations"}]}, "the average of the student's weights gives answers alone"),
    ],
)  # fmt: skip
def test_an_average_that_cannot_teach_is_one_line_and_writes_nothing(
    options: dict[str, Any], line: str, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refused(["train", *own(photos_root, tmp_path / "run", **options)], capsys)
    assert not (tmp_path / "run").exists()


def followed(said: str) -> list[str]:
    """Return the options that a refusal asks for."""
    if schedule := re.search(r"use a schedule such as (\{.*\})", said):
        return ["--distill.alpha", schedule[1]]
    if "add an online guide (guide.name, and guide.checkpoint or guide.fit.epochs)" in said:
        return ["--guide.name", "test_resnet", "--guide.fit.epochs", "1"]
    cure = re.search(r"; set (.*), or teacher.kind network$", said)
    assert cure is not None, said
    pairs = (setting.split(" ", 1) for setting in cure[1].split(" and "))
    return [part for key, value in pairs for part in (f"--{key}", value)]


def test_the_refusals_lead_from_a_recipe_with_a_teacher_to_a_run_without(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = [{"kind": "relations", "blocks": [1], "stages": ["layer2"]}]  # the recipe's are for deeper students
    options: dict[str, Any] = {
        "distill__alpha": None,
        "distill__terms": terms,
        "data__cache": "none",
        "teacher__fold": True,
        "guide__min_top1": 0,
        "guide__fit__batch_size": 16,
        "guide__fit__folder": tmp_path / "guides",
        "guide__fit__optim__warmup_epochs": 0,
    }
    arguments = ["train", "--config", "photos", *own(photos_root, tmp_path / "run", **options)]
    for _ in ("the keys of its network", "nobody to give features", "the constant alpha"):
        arguments += followed(refused(arguments, capsys))
    assert main(arguments) == 0


def test_a_store_of_its_answers_is_not_built(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["store", "build", *own(photos_root, None), "--store", str(tmp_path / "store")]
    assert "no store can keep the answers of the student's own average" in refused(arguments, capsys)
    assert not (tmp_path / "store").exists()


def test_a_finished_run_teaches_the_next_of_its_kind(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tinier = {
        "data__root": photos_root, "data__image_size": 32, "data__workers": 0, "data__cache": "none",
        "student__args": {"patch_size": 8, **TINY}, "optim__warmup_epochs": 0, "train__epochs": 1,
        "train__batch_size": 16, "train__device": "cpu", "teacher__min_top1": 0, "evaluate__report": False,
    }  # fmt: skip

    def generation(name: str, **options: Any) -> dict[str, Any]:
        assert (
            main(["train", "--config", "born_again", *as_arguments(**tinier, output=tmp_path / name, **options)]) == 0
        )
        return json.loads((tmp_path / name / "run.json").read_text())["teacher"]

    assert generation("first", distill__kind="none") is None
    for name, before in (("second", "first"), ("third", "second")):
        facts = generation(name, teacher__checkpoint=tmp_path / before)
        assert facts["source"] == str(tmp_path / before)
        taught, best = facts["score"]["top1"], heads_in(tmp_path / before)["heads"]
        assert taught == pytest.approx((best["fused"] or best["cls"])["top1"], abs=5)
    assert heads_in(tmp_path / "third")["heads"]["dist"] is not None
