"""The verbs from end to end: a run, what lies in its folder, and what can be done with it."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from deit_kd import TimmStudent, head_probabilities
from deit_kd.cli import main
from deit_kd.config import Config
from deit_kd.data import load_image
from deit_kd.interfaces import Preprocessing
from deit_kd.runs.photos import build_splits
from deit_kd.runs.viewing import build_training_loader
from deit_kd.views import evaluation_transform
from tests.helpers import (
    CLASSES,
    FULL,
    MEAN,
    ONE_PROCESS,
    STD,
    Finished,
    assert_same_scores,
    evaluated,
    heads_in,
    records,
    refused,
    snapshot,
    tiny,
)

SCORE = {"top1", "top5", "nll"}
SCORE_HEADS = ("cls", "dist", "fused")


def test_a_run_folder_holds_what_its_map_says(finished: Finished) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "heads.json", "student"}
    assert not any(name.endswith(".partial") for name in snapshot(finished.folder))
    kept = sorted(path.name for path in (finished.folder / "checkpoints").iterdir())
    assert kept == ["best.safetensors", "step-000000010.safetensors", "step-000000012.safetensors"]
    assert list((finished.folder / "tensorboard").glob("events*"))


def test_nothing_in_a_run_is_a_pickle(finished: Finished) -> None:
    files = [path for path in finished.folder.rglob("*") if path.is_file() and "tfevents" not in path.name]
    assert {path.suffix or path.name for path in files} == {".lock", ".yaml", ".jsonl", ".json", ".safetensors"}


def test_config_yaml_is_the_resolved_recipe(finished: Finished) -> None:
    config = Config.model_validate(yaml.safe_load((finished.folder / "config.yaml").read_text()))
    assert config.distill.temperature == 3.0
    assert config.augment.repeats == FULL["augment__repeats"]


def test_the_student_sees_other_views_than_those_its_teacher_learned(finished: Finished, tmp_path: Path) -> None:
    fit = Config.model_validate(yaml.safe_load((next(finished.teachers.iterdir()) / "config.yaml").read_text()))
    own = Config.model_validate(yaml.safe_load((finished.folder / "config.yaml").read_text()))
    alike = own.model_copy(update={"augment": fit.augment, "train": fit.train})
    photos = build_splits(own).train
    taught, seen = (
        [batch.images for batch in build_training_loader(config, photos, ONE_PROCESS).batches(0)]
        for config in (fit, alike)
    )
    assert not any(torch.equal(one, other) for one in torch.cat(taught) for other in torch.cat(seen))


def test_heads_json_has_the_promised_keys(finished: Finished) -> None:
    heads = finished.heads
    assert set(heads) == {"n", "unreadable", "weights", "heads", "teacher", "agreement"}
    assert (heads["n"], heads["weights"]) == (21, "ema")
    assert list(heads["heads"]) == ["cls", "dist", "fused"]
    assert all(set(score) == SCORE for score in [*heads["heads"].values(), heads["teacher"]])
    assert set(heads["agreement"]) == {"cls_teacher", "dist_teacher", "cls_dist"}


def test_topk_is_in_percent_and_agreement_a_fraction(finished: Finished) -> None:
    for score in [*finished.heads["heads"].values(), finished.heads["teacher"]]:
        images = score["top1"] * 21 / 100
        assert images == pytest.approx(round(images))
        assert score["top5"] is None  # of 3 classes
    assert all(0 <= value <= 1 for value in finished.heads["agreement"].values())


def test_the_teacher_learned_something(finished: Finished) -> None:
    assert finished.heads["teacher"]["top1"] > 60


def test_metrics_hold_step_and_epoch_records(finished: Finished) -> None:
    found = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in found if record["kind"] == "step"]
    epochs = [record for record in found if record["kind"] == "epoch"]
    assert [record["step"] for record in steps] == [4, 6, 8, 12]
    assert [record["step"] for record in epochs] == [6, 12]
    wanted = {"loss", "classification", "distillation", "lr", "images_per_second", "epoch"}
    assert all(wanted <= record.keys() for record in steps)
    assert all(set(record["ema"]["heads"]) == set(record["model"]["heads"]) == set(SCORE_HEADS) for record in epochs)
    assert epochs[-1]["ema"]["heads"] == finished.heads["heads"]
    assert epochs[-1]["teacher"] == finished.heads["teacher"]


def images_of(root: Path) -> torch.Tensor:
    transform = evaluation_transform(Preprocessing(16, MEAN, STD, "bicubic", 1.0))
    return torch.stack([transform(load_image(path)) for path in sorted(root.glob("validation/*/*.png"))])


def test_timm_loads_the_student_and_gives_the_mean_of_its_heads(finished: Finished, photos_root: Path) -> None:
    model = timm.create_model(f"local-dir:{finished.folder / 'student'}", pretrained=True).eval()
    images = images_of(photos_root)
    with torch.no_grad():
        output = TimmStudent(model)(images)
        assert output.dist_logits is not None
        torch.testing.assert_close(model(images), (output.cls_logits + output.dist_logits) / 2)
        top1 = (head_probabilities(output)["fused"].argmax(-1) == torch.arange(21) // 7).float().mean().item()
    assert 100 * top1 == pytest.approx(finished.heads["heads"]["fused"]["top1"])
    assert model.pretrained_cfg["label_names"] == list(CLASSES)


def test_the_student_is_the_average_of_the_last_epoch(finished: Finished) -> None:
    newest = load_file(sorted((finished.folder / "checkpoints").iterdir())[-1])
    student = load_file(finished.folder / "student" / "model.safetensors")
    assert student
    assert all(torch.equal(newest[f".trainer.ema.backbone.{name}"], student[name]) for name in student)


def test_no_checkpoint_holds_the_teacher(finished: Finished) -> None:
    names = load_file(sorted((finished.folder / "checkpoints").iterdir())[-1]).keys()
    assert {name.split(".")[2] for name in names if name.startswith(".trainer")} == {"student", "ema", "optimizer"}
    assert not any("layer1" in name or "bn" in name for name in names)


def test_eval_gives_the_same_numbers_again(finished: Finished, photos_root: Path) -> None:
    assert main(["eval", str(finished.folder)]) == 0
    assert_same_scores(evaluated(finished.folder), finished.heads)


def test_eval_scores_other_photos_and_another_fusion(finished: Finished, photos_root: Path, tmp_path: Path) -> None:
    root = shutil.copytree(photos_root, tmp_path / "photos")
    for path in root.glob("validation/*/*.png"):
        if int(path.stem) >= 2:
            path.unlink()
    arguments = ["--data.root", str(root), "--evaluate.fusion", "logits", "--evaluate.batch_size", "4"]
    assert main(["eval", str(finished.folder), *arguments, "--to", str(tmp_path / "to")]) == 0
    assert heads_in(tmp_path / "to")["n"] == 6


def test_eval_scores_the_training_split(finished: Finished) -> None:
    assert main(["eval", str(finished.folder), "--split", "train"]) == 0
    assert evaluated(finished.folder, "train")["n"] == 48


def predicted(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    capsys.readouterr()
    assert main(["predict", *arguments]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_predict_writes_path_head_class_and_probability(
    finished: Finished, photos_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(path) for path in sorted(photos_root.glob("validation/*/*.png"))]
    rows = predicted([str(finished.folder), *files], capsys)
    model = timm.create_model(f"local-dir:{finished.folder / 'student'}", pretrained=True).eval()
    with torch.no_grad():
        values, labels = head_probabilities(TimmStudent(model)(images_of(photos_root)))["fused"].max(-1)
    assert [row["path"] for row in rows] == files
    assert [row["class"] for row in rows] == [CLASSES[label] for label in labels]
    assert [float(row["probability"]) for row in rows] == pytest.approx(values.tolist(), abs=1e-4)
    assert {row["head"] for row in rows} == {"fused"}


@pytest.mark.parametrize(("head", "answers"), [("cls", ["cls"]), ("dist", ["dist"]), ("all", ["cls", "dist", "fused"])])
def test_predict_answers_with_any_head(
    head: str, answers: list[str], finished: Finished, photos_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = str(photos_root / "train" / "dots" / "003.png")
    rows = predicted([str(finished.folder), photo, "--head", head], capsys)
    assert [row["head"] for row in rows] == answers


def test_predict_takes_photos_of_any_kind_and_writes_a_file(finished: Finished, tmp_path: Path) -> None:
    for name, mode in (("grey, old.png", "L"), ("clear.png", "RGBA"), ("large.jpg", "RGB")):
        Image.new(mode, (90, 31)).save(tmp_path / name)
    files = sorted(str(path) for path in tmp_path.iterdir())
    assert main(["predict", str(finished.folder), *files, "--csv", str(tmp_path / "out.csv")]) == 0
    assert [row["path"] for row in csv.DictReader((tmp_path / "out.csv").read_text().splitlines())] == files


def test_predict_takes_every_image_below_a_folder(
    finished: Finished, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos_root / "validation"
    files = [str(path) for path in sorted(folder.glob("*/*.png"))]
    one = str(photos_root / "train" / "dots" / "003.png")
    assert predicted([str(finished.folder), str(folder), one], capsys) == predicted(
        [str(finished.folder), *files, one], capsys
    )
    assert "has no images (.jpg" in refused(["predict", str(finished.folder), str(tmp_path)], capsys)
    assert "is not there" in refused(["predict", str(finished.folder), str(tmp_path / "nowhere")], capsys)


@pytest.mark.parametrize("where", ["stdout", "file"])
def test_predict_answers_for_the_good_photos_and_names_each_bad_one(
    where: str, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / name) for name in ("a.png", "broken.jpg", "c.png", "text.png")]
    for file in files[::2]:
        Image.new("RGB", (40, 31)).save(file)
    for file in files[1::2]:
        Path(file).write_bytes(b"no image")
    table = tmp_path / "out.csv"
    options = ["--evaluate.batch_size", "1"] if where == "stdout" else ["--csv", str(table)]
    capsys.readouterr()
    assert main(["predict", str(finished.folder), *files, *options]) == 1
    said = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(said.out if where == "stdout" else table.read_text())))
    assert [row["path"] for row in rows] == files[::2]
    assert [line.split(": cannot")[0] for line in said.err.splitlines()] == [
        f"left out: {file}" for file in files[1::2]
    ]


def test_the_teacher_of_a_run_is_scored_on_the_runs_photos(finished: Finished, tmp_path: Path) -> None:
    assert main(["eval", f"{finished.folder}:teacher", "--to", str(tmp_path / "to"), "--data.workers", "0"]) == 0
    found = heads_in(tmp_path / "to")
    assert (found["n"], found["heads"]["cls"]["top1"]) == (21, pytest.approx(finished.heads["teacher"]["top1"]))


def train_again(finished: Finished, output: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert main(["train", *finished.arguments, "--output", str(output), "--train.epochs", "1", *options]) == 0
    return capsys.readouterr().out


def test_a_fitted_teacher_is_found_again(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished.teachers)
    said = train_again(finished, tmp_path / "run", capsys, "--distill.kind", "hard", "--data.workers", "0")
    assert f"teacher: found {next(finished.teachers.iterdir())}" in said
    assert snapshot(finished.teachers) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--seed", "3"], "seed: 0 there, 3 here"),
        (["--teacher.fit.optim.lr", "0.002"], "teacher.fit.optim.lr: 0.004 there, 0.002 here"),
        (["--data.mean", "[0.5, 0.5, 0.5]"], "mean: item 0 is 0.485 there, 0.5 here"),
        (["--data.image_size", "24"], "image_size: 16 there, 24 here"),
        (["--data.cache_size", "20"], "cache_size: None there, 20 here"),
    ],
)
def test_any_difference_fits_anew_and_is_named(
    options: list[str], reason: str, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teachers = shutil.copytree(finished.teachers, tmp_path / "teachers")
    fit = ["--teacher.fit.folder", str(teachers), "--teacher.fit.epochs", "2"]
    said = train_again(finished, tmp_path / "run", capsys, "--data.workers", "0", *fit, *options)
    assert re.search(r"teacher: fitting test_resnet from scratch, since an existing one differs: (.*)", said)
    assert reason in said
    assert len(list(teachers.iterdir())) == 2


def test_a_fit_that_goes_on_is_not_called_anew(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teachers = shutil.copytree(finished.teachers, tmp_path / "teachers")
    (fitted,) = (path for path in teachers.iterdir() if path.is_dir())
    other = shutil.copytree(fitted, teachers / "test_resnet-another")
    key = json.loads((other / "teacher_key.json").read_text())
    (other / "teacher_key.json").write_text(json.dumps({**key, "seed": 7}))
    for file in ("heads.json", "teacher_key.json"):
        (fitted / file).unlink()
    options = ["--data.workers", "0", "--teacher.fit.folder", str(teachers)]
    said = train_again(finished, tmp_path / "run", capsys, *options)
    assert "teacher: fitting test_resnet (resumed)\n" in said
    assert "anew" not in said


def test_a_fitted_teacher_that_lost_its_weights_is_to_be_deleted(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teachers = shutil.copytree(finished.teachers, tmp_path / "teachers")
    (fitted,) = (path for path in teachers.iterdir() if path.is_dir())
    shutil.rmtree(fitted / "student")
    options = ["--data.workers", "0", "--teacher.fit.folder", str(teachers), "--output", str(tmp_path / "run")]
    said = refused(["train", *finished.arguments, *options], capsys)
    assert f"{fitted} has lost student/model.safetensors; " in said
    assert f"delete {fitted} and train it again" in said
    shutil.rmtree(fitted)
    assert "teacher: fitting test_resnet" in train_again(finished, tmp_path / "run", capsys, *options[:4])


def test_a_fit_that_is_refused_speaks_of_its_own_folder(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fitted,) = (path for path in finished.teachers.iterdir() if path.is_dir())
    taken = tmp_path / "teachers" / fitted.name
    taken.mkdir(parents=True)
    (taken / "thesis.tex").write_text("precious")
    options = ["--teacher.fit.folder", str(tmp_path / "teachers"), "--output", str(tmp_path / "run")]
    said = refused(["train", *finished.arguments, *options], capsys)
    assert f"teacher.fit.folder: {taken} holds something that is not a run" in said


@pytest.mark.parametrize("options", [[], ["--data.fraction", "0.5"]])
def test_other_photos_fit_anew(
    options: list[str], finished: Finished, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(photos_root, tmp_path / "photos")
    (root / "train" / "dots" / "000.png").rename(root / "train" / "dots" / "renamed.png")
    teachers = shutil.copytree(finished.teachers, tmp_path / "teachers")
    own = ["--data.workers", "0", "--data.root", str(root), "--teacher.fit.folder", str(teachers)]
    said = " ".join(train_again(finished, tmp_path / "run", capsys, *own, *options).split())
    assert f"teacher: fitting test_resnet, since none in {teachers} was fitted on these photos" in said


def test_the_fitted_teacher_is_scored_before_the_first_step(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = train_again(finished, tmp_path / "run", capsys, "--data.workers", "0")
    top1 = finished.heads["teacher"]["top1"]
    assert said.index(f"teacher: test_resnet, top-1 {top1:.2f} % on 21 images") < said.index("step 4/")


def heads_of(arguments: list[str], folder: Path) -> Any:
    assert main(["train", *arguments]) == 0
    return heads_in(folder)


def test_without_distillation_only_the_class_head_is_scored(photos_root: Path, tmp_path: Path) -> None:
    heads = heads_of(tiny(photos_root, tmp_path / "run", distill__kind="none"), tmp_path / "run")
    assert heads["weights"] == "model"
    assert heads["heads"]["dist"] is heads["heads"]["fused"] is heads["teacher"] is None
    assert set(heads["agreement"].values()) == {None}
    saved = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert not any("dist" in name for name in saved)


def test_a_run_on_bf16_with_everything_of_deits_recipe(photos_root: Path, tmp_path: Path) -> None:
    options = {"augment__auto_augment": "rand-m9-mstd0.5-inc1", "augment__repeats": 3, "train__precision": "bf16"}
    assert heads_of(tiny(photos_root, tmp_path / "run", **options), tmp_path / "run")["n"] == 21


def test_a_student_starts_from_another_runs_weights(finished: Finished, photos_root: Path, tmp_path: Path) -> None:
    options = {"student__checkpoint": str(finished.folder), "optim__lr": 1e-12, "optim__min_lr": 0, "augment__mixup": 0}
    heads = heads_of(tiny(photos_root, tmp_path / "run", **options), tmp_path / "run")
    for head in SCORE_HEADS:
        assert heads["heads"][head]["nll"] == pytest.approx(finished.heads["heads"][head]["nll"], rel=1e-3)


def test_without_an_output_a_run_gets_the_next_free_number(
    photos_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine-7").mkdir(parents=True)
    (tmp_path / "runs" / "mine-old").mkdir()
    assert main(["train", *tiny(photos_root, Path("x"))[:-2], "--recipe", "mine", "--distill.kind", "none"]) == 0
    assert (tmp_path / "runs" / "mine-8" / "heads.json").is_file()


def test_an_image_size_that_differs_for_the_teacher(photos_root: Path, tmp_path: Path) -> None:
    options = {"teacher__name": "test_vit", "teacher__image_size": 32, "teacher__mean": "[0.5, 0.5, 0.5]"}
    assert heads_of(tiny(photos_root, tmp_path / "run", **options), tmp_path / "run")["teacher"] is not None


def test_the_records_of_two_equal_runs_are_equal(photos_root: Path, tmp_path: Path) -> None:
    for name, workers in (("first", 0), ("second", 1)):
        options = {"data__workers": workers, "student__drop_path": 0.2, "train__ema_decay": 0.9}
        assert main(["train", *tiny(photos_root, tmp_path / name, **options)]) == 0
    assert records(tmp_path / "first") == records(tmp_path / "second")
