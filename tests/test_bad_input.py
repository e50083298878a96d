"""Bad input gets one line on standard error, exit code 2, and nothing is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.distributed import Processes
from deit_kd.interfaces import InputError
from deit_kd.runs.opening import open_folder
from deit_kd.runs.photos import build_splits
from deit_kd.runs.run import prepare
from tests.helpers import ONE_PROCESS, STUDENT_ARGS, Finished, as_arguments, refused, snapshot, tiny, write_photos

KEYS = [
    ({"student__nmae": "x"}, "student.nmae: unknown key (nearest: student.name"),
    ({"distil__kind": "hard"}, "distil.kind: unknown key (nearest: distill.kind"),
    ({"teacher__fit__epoch": 1}, "teacher.fit.epoch: unknown key (nearest: teacher.fit.epochs"),
    ({"temperature": 3}, "temperature: unknown key (nearest: distill.temperature"),
    ({"batch_size": 8}, "batch_size: unknown key (nearest: train.batch_size"),
    ({"optim__learning_rate": 1e-3}, "optim.learning_rate: unknown key (nearest: optim.lr"),
    ({"distill__terms": [{"kind": "guide", "wieght": 2}]}, "distill.terms.0.wieght: unknown key (nearest: weight)"),
    ({"distill__terms": [{"kind": "guid"}]}, "distill.terms.0.kind: 'guid' is unknown; use one of guide, relations"),
    ({"distill__terms": [{"weight": 2}]}, "distill.terms.0.kind: is not set"),
    ({"peers": "resnet18"}, "peers: 'resnet18' is not a list; write [a, b]"),
    ({"peers": ["resnet18"]}, "peers.0: 'resnet18' is not a mapping; write {key: value}"),
    ({"config": "nowhere.yaml"}, "config: nowhere.yaml is neither a file nor a recipe of deit_kd"),
    ({"train__epochs": "many"}, "train.epochs: 'many' is not a whole number"),
    ({"train__epochs": 1.5}, "train.epochs: '1.5'"),
    ({"train__epochs": 0}, "train.epochs: '0' must be above 0"),
    ({"train__batch_size": -8}, "train.batch_size: '-8'"),
    ({"data__workers": -1}, "data.workers: '-1'"),
    ({"data__mean": "[1, 2]"}, "data.mean: '[1, 2]' is not a list of 3 numbers"),
    ({"data__mean": "[123.7, 116.3, 103.5]"}, "data.mean: (123.7, 116.3, 103.5) must be between 0 and 1"),
    ({"teacher__mean": "[123.7, 116.3, 103.5]"}, "teacher.mean: (123.7, 116.3, 103.5) must be between 0 and 1"),
    ({"teacher__min_top1": 0.7}, "teacher.min_top1: 0.7 must be in percent, 0 or at least 1; write 70 for that share"),
    ({"data__std": "[0.0, 1.0, 1.0]"}, "data.std: (0.0, 1.0, 1.0) must be above 0"),
    ({"data__download": "maybe"}, "data.download: 'maybe' is neither true nor false"),
    ({"data__validation_fraction": 1.0}, "data.validation_fraction: '1.0'"),
    ({"augment__scale": "[1.0, 0.2]"}, "augment.scale: (1.0, 0.2) must be [low, high]"),
    ({"augment__auto_augment": "banana"}, "augment.auto_augment: 'banana' is not a timm policy"),
    ({"augment__repeats": 40}, "augment.repeats: 40 is too many for 48 photos"),
    ({"distill__kind": "medium"}, "distill.kind: 'medium' is unknown; use one of none, soft, hard, standardised"),
    ({"distill__alpha": 1.5}, "distill.alpha: 1.5 must be between 0 and 1"),
    ({"distill__temperature": 0}, "distill.temperature: 0.0 must be above 0, start and end alike"),
    ({"optim__lr": "nan"}, "optim.lr: 'nan'"),
    ({"optim__name": "adamq"}, "optim.name: 'adamq'"),
    ({"optim__warmup_epochs": 1}, "optim.warmup_epochs: 1 is not below train.epochs 1"),
    ({"train__precision": "fp17"}, "train.precision: 'fp17'"),
    ({"train__compile": "fast"}, "train.compile: 'fast' does not fit; use true, false, reduce-overhead, max-"),
    ({"train__precision": "fp16"}, "train.precision: fp16 needs CUDA"),
    (
        {"train__compile": "reduce-overhead", "train__accumulation_steps": 2},
        "train.compile: reduce-overhead replays CUDA graphs, whose gradients do not outlive the next micro-batch",
    ),
    ({"train__device": "gpu"}, "train.device: 'gpu'"),
    ({"resume": "yes"}, "resume: 'True' does not fit; use auto or null"),
]
DATA = [
    ({"data__root": "nowhere"}, "data.root: nowhere is not a folder"),
    ({"data__root": None}, "data.root: is not set"),
    ({"data__name": "imagenet"}, "data.name: 'imagenet' is unknown; use one of folder, shards, hf, digits"),
    ({"data__name": "cifar10", "data__root": "nowhere"}, "--data.download true"),
    ({"data__train_split": "learn"}, "data.train_split: "),
    (
        {"distill__kind": "standardised", "data__classes": ["bars", "dots"], "train__batch_size": 16},
        "distill.kind: standardised logits of 2 classes are 1 and -1, whatever the logits, so nothing is learned",
    ),
    (
        {"distill__terms": [{"kind": "standardised"}], "data__classes": ["bars", "dots"], "train__batch_size": 16},
        "distill.terms: standardised logits of 2 classes",
    ),
    ({"train__batch_size": 9}, "train.batch_size: 9 is not a multiple of 2"),
    ({"train__batch_size": 20, "train__accumulation_steps": 4}, "train.batch_size: 20 is not a multiple of 8"),
    ({"train__batch_size": 64}, "train.batch_size: 64 is more than the 48 views of an epoch; use 48 or less"),
]
MODELS = [
    ({"student__name": None}, "student.name: is not set"),
    ({"student__name": "deit_tiny_destilled_patch16_224"}, "(nearest: deit_tiny_distilled_patch16_224"),
    ({"student__name": "vit_base_patch16_siglip_224"}, "has no class token for a distillation token"),
    ({"student__name": "levit_256d", "student__args": "{}", "data__image_size": 224}, "has no class token"),
    ({"data__image_size": 20}, "data.image_size: 20 is not a multiple of student.name's patch size 8; use 16 or 24"),
    ({"student__args": {**STUDENT_ARGS, "num_heads": 5}}, "student.name: "),
    ({"student__args": {**STUDENT_ARGS, "embed_dim": "wide"}}, "student.name: "),
    ({"student__args": {**STUDENT_ARGS, "depht": 2}}, "depht"),
    (
        {"student__args": {**STUDENT_ARGS, "img_size": 64}},
        "student.args: img_size cannot be given here; set the section's",
    ),
    (
        {"student__name": "deit_tiny_distilled_patch16_224.fb_in22k"},
        "'deit_tiny_distilled_patch16_224.fb_in22k' has a tag that timm does not know (nearest: deit_tiny_d",
    ),
    (
        {"student__name": "crossvit_tiny_240", "student__args": "{}", "distill__kind": "none", "data__image_size": 48},
        "data.image_size: 'crossvit_tiny_240' does not accept images of 48 pixels",
    ),
    ({"student__args": "[1]"}, "student.args: '[1]' is not a mapping; write {key: value}"),
    ({"student__checkpoint": "nowhere"}, "student.checkpoint: nowhere is not there"),
    ({"student__pretrained": True, "student__args": "{}", "data__image_size": 224}, "check the network"),
    ({"teacher__name": None}, "teacher.name: is not set"),
    ({"teacher__name": "resnet19"}, "teacher.name: 'resnet19' is not a timm model (nearest: "),
    ({"teacher__random_weights": None}, "has nothing to take its weights from"),
    ({"teacher__checkpoint": "."}, "teacher.checkpoint and teacher.random_weights to take its weights from"),
    ({"teacher__random_weights": None, "teacher__checkpoint": "nowhere"}, "teacher.checkpoint: nowhere is not there"),
    ({"teacher__random_weights": None, "teacher__pretrained": True}, "check the network"),
    ({"teacher__args": {"num_classes": 1000}}, "teacher.args: num_classes cannot be given here"),
    ({"teacher__fit__epochs": 1}, "teacher.random_weights and teacher.fit.epochs exclude each other"),
    (
        {"teacher__random_weights": None, "teacher__fit__epochs": 1, "teacher__fit__batch_size": 64},
        "teacher.fit.batch_size: 64 is more than the 48 views",
    ),
]


@pytest.mark.parametrize(("options", "expected"), KEYS + DATA + MODELS, ids=lambda value: str(value)[:50])
def test_options_that_cannot_be(
    options: dict[str, Any],
    expected: str,
    photos_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refused(["train", *tiny(photos_root, tmp_path / "run", **options)], capsys)
    assert list(tmp_path.iterdir()) == []


FEATURES = {"distill__kind": "none", "distill__alpha": 1, "distill__terms": [{"kind": "pooled"}]}


@pytest.mark.parametrize(
    ("split", "output", "options", "line"),
    [
        ("", None, {}, "runs/run-1 is below ., where every image is taken for a photo; name another folder"),
        ("", "bars/run", {}, "bars/run is below ."),
        ("train", "train/run", {}, "train/run is below train"),
        ("", "all/run", {**FEATURES, "data__root": "nowhere", "data__unlabelled": "all"}, "all/run is below all"),
    ],
)
def test_a_run_among_the_photos_would_be_a_class_of_the_next(
    split: str, output: Path | None, options: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path, {split: 1})
    (tmp_path / "nowhere").mkdir()
    monkeypatch.chdir(tmp_path)
    config = parse_config(tiny(Path("."), output, **options))[0]
    with pytest.raises(InputError, match=rf"^output: {re.escape(line)}"):
        open_folder(config, ONE_PROCESS, None, ())


def test_a_run_may_lie_beside_the_splits_of_its_photos(photos_root: Path) -> None:
    config = parse_config(tiny(photos_root, photos_root / "run"))[0]
    assert open_folder(config, ONE_PROCESS, None, ()) == (photos_root / "run", None)


def one_class(root: Path) -> None:
    for split in ("train", "validation"):
        for name in ("bars", "rings"):
            shutil.rmtree(root / split / name)


def no_classes(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def empty_root(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


TREES = [
    (empty_root, "holds no class folders"),
    (one_class, "has one class, 'dots'; add the folder of another"),
    (no_classes, "train holds no class folders"),
    (lambda root: shutil.rmtree(root / "validation" / "dots"), "differ between the splits (only in train: dots)"),
    (
        lambda root: (root / "train" / "dots").rename(root / "train" / "dot"),
        "only in train: dot; only in validation: d",
    ),
    (lambda root: [path.unlink() for path in (root / "train" / "dots").iterdir()], "no images (.jpg"),
    (lambda root: [path.unlink() for path in (root / "validation" / "dots").iterdir()], "in class dots"),
    (lambda root: shutil.rmtree(root / "train"), "data.train_split: "),
]


@pytest.mark.parametrize(("spoil", "expected"), TREES)
def test_folders_that_cannot_be(spoil: Any, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_photos(tmp_path / "photos", {"train": 4, "validation": 2})
    spoil(root)
    assert expected in refused(["train", *tiny(root, tmp_path / "run")], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_class_of_one_image_cannot_be_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_photos(tmp_path / "photos", {"": 1})
    assert "has 1 image(s), too few to split" in refused(["train", *tiny(root, tmp_path / "run")], capsys)


def test_a_process_without_a_validation_image_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", {"train": 8, "validation": 1})
    config, _ = parse_config(tiny(root, tmp_path / "run", augment__mixup=0, augment__cutmix=0))
    with pytest.raises(InputError, match="data: 3 validation images are fewer than 4 processes; use fewer"):
        prepare(config, Processes(0, 4, torch.device("cpu")), build_splits(config))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_photo_that_cannot_be_read_is_named(workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_photos(tmp_path / "photos", {"train": 4, "validation": 2})
    (root / "train" / "dots" / "002.png").write_bytes(b"broken")
    line = refused(["train", *tiny(root, tmp_path / "run", data__workers=workers)], capsys)
    assert f"error: {root}/train/dots/002.png: cannot be read as an image" in line


def test_a_loss_that_is_no_number_ends_the_run(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"optim__lr": 1e30, "optim__name": "sgd", "distill__kind": "none", "train__max_bad_steps": 3}
    arguments = tiny(photos_root, tmp_path / "run", **options)
    assert "the last 3 steps had no finite gradient" in refused(["train", *arguments], capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "(nearest: train)"),
        (["eval"], "the first argument names a run"),
        (["eval", "nowhere"], "'nowhere' is not a timm model"),
        (["predict", "nowhere", "a.png"], "nowhere: is not a run"),
        (["predict", "--head", "cls"], "the first argument names a run"),
    ],
)
def test_verbs_that_cannot_be(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(arguments, capsys)


RUN_CASES = [
    (["eval", "RUN", "--split", "test"], "test is not there; use one of train, validation, or . for"),
    (["eval", "RUN", "--to", "PHOTO"], "is a file"),
    (["eval", "RUN", "--data.root", "nowhere"], "data.root: nowhere is not a folder"),
    (["eval", "RUN", "--images", '["a.png"]'], "--images: names what --diagnose shows, and it is off; add --diagnose"),
    (["predict", "RUN"], "the following arguments are required: files; see deit-kd predict --help"),
    (["eval", "RUN", "--evaluate.fuson", "logits"], "evaluate.fuson: unknown key (nearest: evaluate.fusion"),
    (["predict", "RUN", "nowhere.png"], "nowhere.png: is not there"),
    (["predict", "RUN", "RUN/heads.json"], "heads.json: cannot be read as an image"),
    (["predict", "RUN", "PHOTO", "--head", "second"], "second"),
    (["predict", "RUN", "PHOTO", "--csv", "nowhere/out.csv"], "nowhere/out.csv"),
    (["plot", "RUN", "--to", "nowhere/out.png"], "--to: nowhere is not a folder; create it, or name a file other"),
    (["plot", "RUN", "--to", "curves.jpg"], "--to: curves.jpg would hold PNG; name a file that ends in .png"),
    (["data", "check", "PHOTO/../..", "--json", "nowhere/f.json"], "--json: nowhere is not a folder"),
]


@pytest.mark.parametrize(("arguments", "expected"), RUN_CASES, ids=lambda value: str(value)[:50])
def test_what_a_finished_run_cannot_do(
    arguments: list[str],
    expected: str,
    finished: Finished,
    photos_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = snapshot(finished.folder)
    photo = str(photos_root / "validation" / "dots" / "000.png")
    filled = [text.replace("RUN", str(finished.folder)).replace("PHOTO", photo) for text in arguments]
    assert expected in refused(filled, capsys)
    assert snapshot(finished.folder) == before
    assert list(tmp_path.iterdir()) == []


def test_photos_of_other_classes_are_not_scored(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_photos(tmp_path / "photos", {"train": 2, "validation": 2}, ("bars", "discs", "rings"))
    line = refused(["eval", str(finished.folder), "--data.root", str(root)], capsys)
    assert "does not know 1 of them: 'discs'" in line


def test_a_teacher_of_other_classes_is_refused(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_photos(tmp_path / "photos", {"train": 4, "validation": 2}, ("bars", "discs", "rings"))
    teacher = next(finished.teachers.iterdir())
    options = as_arguments(teacher__checkpoint=str(teacher), teacher__random_weights=False)
    line = refused(["train", *tiny(root, tmp_path / "run"), *options], capsys)
    assert "1 of 3 classes have no column of the teacher: discs" in line
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_never_overwritten(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(finished.folder)
    assert "already holds a run; continue it with --resume auto" in refused(["train", *finished.arguments], capsys)
    assert snapshot(finished.folder) == before


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_a_folder_that_holds_something_else_is_never_written_to(
    resume: list[str], photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert "holds something that is not a run" in refused(["train", *tiny(photos_root, tmp_path), *resume], capsys)
    assert list(snapshot(tmp_path)) == ["thesis.tex"]


def test_an_output_that_is_a_file_is_refused(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        line = refused(["train", *tiny(photos_root, output)], capsys)
        assert line.endswith(f"output: {output} cannot be made ({tmp_path / 'file'} is a file); name a folder")


CHANGES = [
    ({"distill__temperature": 4}, "distill.temperature: 3.0 in the run, 4.0 here"),
    ({"seed": 1}, "seed: 0 in the run, 1 here"),
    ({"optim__lr": 2e-3}, "optim.lr: 0.001 in the run, 0.002 here"),
    ({"train__batch_size": 12}, "train.batch_size: 8 in the run, 12 here"),
    ({"student__args": {**STUDENT_ARGS, "depth": 1}}, "student.args: "),
    ({"augment__mixup": 0}, "augment.mixup: 0.8 in the run, 0.0 here"),
]


@pytest.mark.parametrize(("options", "expected"), CHANGES, ids=lambda value: str(value)[:50])
def test_another_recipe_is_not_resumed(
    options: dict[str, Any], expected: str, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished.folder)
    line = refused(["train", *finished.arguments, "--resume", "auto", *as_arguments(**options)], capsys)
    assert "was started with another recipe" in line
    assert expected in line
    assert snapshot(finished.folder) == before


def test_a_soft_run_goes_on_however_its_temperature_is_written(photos_root: Path, tmp_path: Path) -> None:
    arguments = ["train", *tiny(photos_root, tmp_path / "run", distill__kind="soft", distill__temperature=3.0)]
    assert main(arguments) == 0
    assert main([*arguments, "--resume", "auto", "--distill.temperature", "null"]) == 0
    recipe = tmp_path / "run" / "config.yaml"
    recipe.write_text(recipe.read_text().replace("temperature: 3.0", "temperature: null"))
    assert main([*arguments, "--resume", "auto"]) == 0


def test_other_photos_are_not_resumed(finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_photos(tmp_path / "photos", {"train": 17, "validation": 7})
    line = refused(["train", *finished.arguments, "--resume", "auto", "--data.root", str(root)], capsys)
    assert "data (train): other photos" in line
    assert "validation" not in line.partition("data (train)")[2]
