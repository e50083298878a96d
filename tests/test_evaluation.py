"""``deit-kd eval``: every student, every split, exact numbers, and one clear line where it cannot be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from deit_kd.cli import main
from deit_kd.models.layouts import to_transformers
from tests.forked import run_on_two
from tests.helpers import MEAN, SEVEN_CLASSES, STD, Finished, assert_same_scores, heads_in, refused, tiny, write_photos
from tests.tiny_parts import write_transformers_folder

INPUT = ("--data.image_size", "16", "--data.workers", "0", "--train.precision", "off", "--train.device", "cpu")


def evaluate(folder: Path, *arguments: str) -> Any:
    """Evaluate and return what ``heads.json`` holds."""
    assert main(["eval", *arguments, "--to", str(folder)]) == 0
    return heads_in(folder)


def test_a_run_scores_as_it_did_at_its_end(runs: Path, tmp_path: Path) -> None:
    heads = evaluate(tmp_path, str(runs / "distilled"))
    assert heads["n"] == 35
    assert_same_scores(heads, heads_in(runs / "distilled"))


def exported(runs: Path) -> list[str]:
    return [str(runs / "distilled/student")]


def local_dir(runs: Path) -> list[str]:
    return [f"local-dir:{runs / 'distilled/student'}"]


def deit_file(runs: Path) -> list[str]:
    folder = runs / "deit"
    folder.mkdir()
    saved = json.loads((runs / "distilled/student/config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"label_names": saved["label_names"]}))  # else nobody knows them
    model = timm.create_model(f"local-dir:{runs / 'distilled/student'}", pretrained=True)
    torch.save({"model": model.state_dict()}, folder / "distilled.pth")
    args = '{"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}'
    shape = ["--student.name", "deit_tiny_distilled_patch16_224", "--student.args", args]
    return [str(folder / "distilled.pth"), *shape, "--data.crop_fraction", "1"]


def transformers_folder(runs: Path) -> list[str]:
    folder = runs / "transformers"
    pytest.importorskip("transformers")
    assert main(["export", str(runs / "distilled"), "--format", "transformers", "--to", str(folder)]) == 0
    return [str(folder)]


@pytest.mark.parametrize("source", [exported, local_dir, deit_file, transformers_folder])
def test_every_kind_of_source_gives_the_numbers_of_the_run(runs: Path, tmp_path: Path, source: Any) -> None:
    expected = evaluate(tmp_path / "run", str(runs / "distilled"))
    found = evaluate(tmp_path / "source", *source(runs), "--data.root", str(runs / "photos"), *INPUT)
    assert found["heads"] == expected["heads"]
    assert found["teacher"] is None


def assert_scores_of(run: Path, found: Any) -> None:
    """Assert that an evaluation holds the scores with which a run without distillation ended."""
    scores = heads_in(run)["heads"]["cls"]
    assert found["heads"]["cls"]["top1"] == pytest.approx(scores["top1"])
    assert found["heads"]["cls"]["nll"] == pytest.approx(scores["nll"], rel=1e-4)


def stock_vit_folder(runs: Path) -> str:
    """Write `plain` as transformers writes a ViT, whose processor says nothing of a crop."""
    state = to_transformers(load_file(runs / "plain/student/model.safetensors"))
    names = {name: re.sub("^deit", "vit", name).replace("cls_classifier", "classifier") for name in state}
    state = {names[name]: tensor for name, tensor in state.items()}
    seen = {"image_mean": MEAN, "image_std": STD, "size": {"height": 16, "width": 16}, "resample": 3}
    classes = sorted(SEVEN_CLASSES)
    return str(write_transformers_folder(runs / "stock", state, classes, seen, model_type="vit"))


def test_a_stock_vit_whose_processor_knows_no_crop_is_read(runs: Path, tmp_path: Path) -> None:
    """It brings both sides to its size."""
    photos = ["--data.root", str(runs / "photos"), *INPUT]
    expected = evaluate(tmp_path / "run", str(runs / "plain"), "--data.crop_mode", "squash")
    found = evaluate(tmp_path / "stock", stock_vit_folder(runs), *photos)
    assert found["heads"]["cls"]["nll"] == pytest.approx(expected["heads"]["cls"]["nll"], rel=1e-4)


AVERAGED = {"name": "efficientformer_l1", "args": {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}}


def test_a_saved_network_that_averages_its_two_heads_is_scored_as_it_answers(photos_root: Path, tmp_path: Path) -> None:
    options = {"student__name": AVERAGED["name"], "student__args": AVERAGED["args"], "data__image_size": 224}
    assert main(["train", *tiny(photos_root, tmp_path / "run", distill__kind="none", **options)]) == 0
    found = evaluate(tmp_path / "eval", str(tmp_path / "run/student"), "--data.root", str(photos_root), *INPUT[2:])
    assert_scores_of(tmp_path / "run", found)
    assert main(["export", str(tmp_path / "run"), "--format", "timm", "--to", str(tmp_path / "timm")]) == 0


def test_a_teacher_can_be_named_for_a_student_without_a_run(runs: Path, tmp_path: Path) -> None:
    options = ["--data.root", str(runs / "photos"), *INPUT]
    teacher = ["--teacher.name", "deit_tiny_patch16_224", "--teacher.checkpoint", str(runs / "plain")]
    shape = ["--teacher.args", '{"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}']
    heads = evaluate(tmp_path, str(runs / "distilled/student"), *options, *teacher, *shape)
    plain = heads_in(runs / "plain")
    assert heads["teacher"]["nll"] == pytest.approx(plain["heads"]["cls"]["nll"])


def test_another_teacher_that_is_named_after_a_run_is_asked_itself(
    finished: Finished, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fitted,) = (path for path in finished.teachers.iterdir() if path.is_dir())
    other = shutil.copytree(fitted, tmp_path / "other")
    state = load_file(other / "student/model.safetensors")
    state["fc.weight"] *= 0.5
    save_file(state, other / "student/model.safetensors")
    own = evaluate(tmp_path / "own", str(finished.folder))["teacher"]["nll"]
    assert own == pytest.approx(finished.heads["teacher"]["nll"])
    assert evaluate(tmp_path / "to", str(finished.folder), "--teacher.checkpoint", str(other))["teacher"]["nll"] != own
    timms = ["--teacher.name", "resnet18.a1_in1k", "--teacher.pretrained", "true"]
    assert "check the network" in refused(["eval", str(finished.folder), *timms], capsys)


def test_a_teacher_that_is_named_after_a_run_without_one_is_asked(
    finished: Finished, photos_root: Path, tmp_path: Path
) -> None:
    plain = tiny(photos_root, tmp_path / "plain", distill__kind="none", teacher__random_weights=None)
    assert main(["train", *plain]) == 0
    (fitted,) = (path for path in finished.teachers.iterdir() if path.is_dir())
    heads = evaluate(tmp_path / "to", str(tmp_path / "plain"), "--teacher.checkpoint", str(fitted))
    assert heads["teacher"]["nll"] == pytest.approx(finished.heads["teacher"]["nll"])
    assert heads["disagreement"]["names"] == ["truth", "cls", "teacher"]


def test_predictions_have_a_row_for_every_image(runs: Path, tmp_path: Path) -> None:
    heads = evaluate(tmp_path, str(runs / "distilled"))
    table = parquet.read_table(tmp_path / "predictions.parquet")
    assert table.num_rows == 35
    rows = table.to_pylist()
    assert rows[0]["path"] == "<b>cup/000.png"
    assert {len(row["cls_top5"]) for row in rows} == {5}
    assert {row["teacher_top1"] for row in rows} <= set(SEVEN_CLASSES)
    for head in ("cls", "dist", "fused_softmax", "fused_logits"):
        top1 = 100 * sum(row[f"{head}_top5"][0] == row["label"] for row in rows) / 35
        assert top1 == pytest.approx(heads["heads"][head]["top1"])
        assert all(row[f"{head}_top5_probability"] == sorted(row[f"{head}_top5_probability"])[::-1] for row in rows)


def test_a_second_student_is_compared_image_by_image(runs: Path, tmp_path: Path) -> None:
    heads = evaluate(tmp_path, str(runs / "distilled"), "--against", str(runs / "plain"))
    assert heads["disagreement"]["names"] == ["truth", "cls", "dist", "fused", "teacher", "plain"]
    plain = heads_in(runs / "plain")
    assert heads["disagreement"]["matrix"][0][-1] == pytest.approx(1 - plain["heads"]["cls"]["top1"] / 100)


@pytest.mark.parametrize(("split", "images"), [("train", 28), ("validation", 35), ("extra", 21)])
def test_any_split_can_be_scored(runs: Path, tmp_path: Path, split: str, images: int) -> None:
    root = shutil.copytree(runs / "photos", tmp_path / "photos")
    write_photos(root, {"extra": 3}, SEVEN_CLASSES)
    heads = evaluate(tmp_path / "out", str(runs / "distilled"), "--split", split, "--data.root", str(root))
    assert heads["n"] == images
    assert heads["by_class"]["support"] == [images // 7] * 7


def test_a_tree_without_split_folders_is_scored_whole(runs: Path, tmp_path: Path) -> None:
    root = shutil.copytree(runs / "photos/validation", tmp_path / "photos")
    assert evaluate(tmp_path / "out", str(runs / "distilled"), "--split", ".", "--data.root", str(root))["n"] == 35


def test_a_student_without_the_token_is_scored_by_its_class_head_and_says_so_once(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    heads = evaluate(tmp_path, str(runs / "plain"))
    assert [name for name, score in heads["heads"].items() if score is not None] == ["cls"]
    assert capsys.readouterr().out.count("no distillation head") == 1


def test_an_image_that_cannot_be_read_is_listed_and_left_out(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = shutil.copytree(runs / "photos", tmp_path / "photos")
    whole = evaluate(tmp_path / "whole", str(runs / "distilled"), "--data.root", str(root))
    (root / "validation/apple/002.png").write_bytes(b"no image")
    heads = evaluate(tmp_path / "out", str(runs / "distilled"), "--data.root", str(root))
    assert heads["n"] == 34
    assert list(heads["unreadable"]) == ["apple/002.png"]
    assert whole["by_class"]["support"][1] == heads["by_class"]["support"][1] + 1  # apple follows <b>cup
    assert "1 of 35 images cannot be read and are left out" in capsys.readouterr().out


def test_two_processes_count_exactly_as_one(runs: Path, tmp_path: Path) -> None:
    root = shutil.copytree(runs / "photos", tmp_path / "photos")
    (root / "validation/door/000.png").write_bytes(b"no image")  # shares of different size
    arguments = [str(runs / "distilled"), "--data.root", str(root)]
    alone = evaluate(tmp_path / "one", *arguments)
    run_on_two(["eval", *arguments, "--to", str(tmp_path / "two")], tmp_path / "said.txt")
    together = heads_in(tmp_path / "two")
    assert together["n"] == alone["n"] == 34
    assert together["unreadable"] == alone["unreadable"]
    assert together["disagreement"] == alone["disagreement"]
    assert together["by_class"] == alone["by_class"]
    tables = [parquet.read_table(tmp_path / folder / "predictions.parquet") for folder in ("one", "two")]
    assert tables[0].column("path").equals(tables[1].column("path"))
    assert together["heads"]["fused"]["nll"] == pytest.approx(alone["heads"]["fused"]["nll"], rel=1e-6)


def unknown_class(root: Path) -> list[str]:
    return ["--data.root", str(write_photos(root, {"train": 2, "validation": 1}, ("apple", "bread", "cup")))]


def no_images(root: Path) -> list[str]:
    write_photos(root, {"validation": 1}, SEVEN_CLASSES)
    for file in root.rglob("*.png"):
        file.write_bytes(b"no image")
    return ["--split", "validation", "--data.train_split", "validation", "--data.root", str(root)]


def empty_split(root: Path) -> list[str]:
    (root / "test").mkdir(parents=True)
    return ["--split", "test", "--data.root", str(root)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (unknown_class, ["7 classes", "the data have 3", "does not know 1 of them: 'cup' (nearest: <b>cup)"]),
        (no_images, ["none of the 7 images", "cannot be read as an image"]),
        (empty_split, ["no class folders"]),
    ],
)
def test_photos_that_cannot_be_scored_are_one_line(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: Any,
    words: list[str],
) -> None:
    to = tmp_path / "out"
    line = refused(["eval", str(runs / "distilled"), *options(tmp_path / "photos"), "--to", str(to)], capsys)
    assert [word for word in words if word not in line] == []
    assert not to.exists()


def unfinished(runs: Path, tmp_path: Path) -> str:
    folder = shutil.copytree(runs / "distilled", tmp_path / "unfinished")
    (folder / "heads.json").unlink()
    return str(folder)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (unfinished, ["not a finished run", "--resume auto"]),
        (lambda runs, tmp: str(tmp), ["is neither a run", "config.json"]),
        (lambda runs, tmp: str(tmp / "nowhere.pth"), ["is not there"]),
        (lambda runs, tmp: "deit_tinny_distilled_patch16_224", ["not a timm model", "deit_tiny_distilled"]),
        (lambda runs, tmp: "deit_tiny_distilled_patch16_224", ["1000 classes", "the data have 7"]),
        (lambda runs, tmp: "test_vit", ["the data have 7"]),
        (lambda runs, tmp: "--split", ["the first argument"]),
    ],
)
def test_a_student_that_cannot_be_had_is_one_line(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: Any,
    words: list[str],
) -> None:
    line = refused(["eval", source(runs, tmp_path), "--data.root", str(runs / "photos")], capsys)
    assert [word for word in words if word not in line] == []
