"""Whole runs in which a CNN's answers at places teach the patch tokens: online, from a label store, killed, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.distributed import process_group
from deit_kd.exports import missing_libraries
from deit_kd.runs.run import prepare
from deit_kd.schedules import Schedule
from deit_kd.store import LabelStore, epoch_part
from deit_kd.teaching.ready import ready_lesson
from deit_kd.teaching.recording import shares_of_dense
from tests.forked import run_on_two
from tests.helpers import assert_same_scores, evaluated, heads_in, records, refused, tiny
from tests.started import kill

DENSE: dict[str, Any] = {"kind": "dense", "weight": {"start": 1.0, "until": 0.6}}
OPTIONS: dict[str, Any] = {
    "teacher__image_size": 64,  # a grid of 2 x 2
    "distill__terms": [DENSE],
    "train__epochs": 3,
    "train__batch_size": 16,
    "student__drop_path": 0.2,
    "train__checkpoint_every_steps": 1,
}
THREE = ["cls", "dist", "patch", "fused", "fused_cls_dist", "fused_cls_patch", "fused_dist_patch"]


def dense(root: Path, output: Path | None, **options: Any) -> list[str]:
    return tiny(root, output, **{**OPTIONS, **options})


def steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder) if record["kind"] == "step"]


@pytest.fixture(scope="module")
def whole(photos_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the teacher online, whose dense term ends with its second epoch of three."""
    run = tmp_path_factory.mktemp("dense") / "whole"
    assert main(["train", *dense(photos_root, run)]) == 0
    return run


@pytest.fixture(scope="module")
def stored(photos_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of all that the run learns from."""
    store = tmp_path_factory.mktemp("dense") / "store"
    assert main(["store", "build", *dense(photos_root, None), "--store", str(store)]) == 0
    return store


def test_a_run_scores_three_heads_and_every_pair_and_lets_the_term_go_when_it_ends(whole: Path) -> None:
    assert list(heads_in(whole)["heads"]) == THREE
    epochs = [record for record in records(whole) if record["kind"] == "epoch"]
    assert all(list(epoch["model"]["heads"]) == THREE for epoch in epochs)
    assert heads_in(whole)["agreement"]["patch_teacher"] is not None
    losses = [step.get("terms", {}).get("dense", {}).get("loss") for step in steps(whole)]
    assert all(losses[:6])
    assert losses[-1] is None
    assert json.loads((whole / "student" / "config.json").read_text())["heads"] == ["cls", "dist", "patch"]


def test_an_evaluation_finds_what_the_run_did_and_every_head_predicts(
    whole: Path, photos_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(whole)]) == 0
    assert_same_scores(evaluated(whole), heads_in(whole))
    said = capsys.readouterr().out
    assert "patch" in said
    assert {"fused_cls_dist", "fused_cls_patch", "fused_dist_patch"} <= evaluated(whole)["heads"].keys()
    photo = str(next((photos_root / "validation").rglob("*.png")))
    assert main(["predict", str(whole), photo, "--head", "all"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["cls", "dist", "patch", "fused"]


def test_the_saved_student_answers_with_three_heads_by_itself_and_timms_export_says_what_it_leaves_out(
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    photos_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["export", str(whole), "--format", "timm", "--to", str(tmp_path / "timm")]) == 0
    assert "timm has no place for the head 'patch', and leaves it out; onnx keeps it" in capsys.readouterr().out
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["heads"] == ["cls", "dist"]
    shutil.copytree(whole / "student", tmp_path / "alone")
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "alone", "--data.root", str(photos_root), "--train.precision", "off"]) == 0
    (found,) = Path("runs/eval").iterdir()
    assert heads_in(found)["heads"]["patch"]["nll"] == pytest.approx(heads_in(whole)["heads"]["patch"]["nll"], rel=1e-4)


def test_the_report_shows_three_heads_and_every_pair(whole: Path, tmp_path: Path) -> None:
    assert main(["report", str(whole), "--to", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    for name in ("patch tokens", "fused, cls and dist alone", "fused, dist and patch alone"):
        assert name in page


@pytest.mark.skipif(bool(missing_libraries("onnx")), reason="needs onnx")
def test_int8_holds_the_weight_that_two_heads_share(whole: Path, tmp_path: Path) -> None:
    options = ["--format", "onnx", "--precision", "int8", "--to", str(tmp_path / "int8")]
    assert main(["export", str(whole), *options]) == 0
    outputs = json.loads((tmp_path / "int8" / "config.json").read_text())["outputs"]
    assert set(outputs) >= {"cls", "dist", "patch", "fused"}


@pytest.mark.skipif(bool(missing_libraries("onnx")), reason="needs onnx")
def test_an_onnx_model_predicts_with_three_heads_what_its_run_does(
    whole: Path, photos_root: Path, tmp_path: Path
) -> None:
    assert main(["export", str(whole), "--format", "onnx", "--to", str(tmp_path / "onnx")]) == 0
    photos = sorted(map(str, (photos_root / "validation").rglob("*.png")))[:5]
    tables = []
    for place in (whole, tmp_path / "onnx" / "student.onnx"):
        table = tmp_path / f"{place.stem}.csv"
        assert main(["predict", str(place), *photos, "--head", "all", "--csv", str(table)]) == 0
        tables.append([row.split(",") for row in table.read_text().splitlines()[1:]])
    assert [row[1] for row in tables[0][:4]] == ["cls", "dist", "patch", "fused"]
    for ours, theirs in zip(*tables, strict=True):
        assert ours[:3] == theirs[:3]
        assert float(ours[3]) == pytest.approx(float(theirs[3]), abs=2e-4)


@pytest.mark.parametrize(("device", "source"), [("cpu", "recorded"), ("cuda", "online"), ("cuda", "stored")])
def test_a_dry_run_rehearses_it(
    device: str, source: str, stored: Path, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("CUDA is here, and measured")
    options: dict[str, Any] = {"teacher__store": stored} if source == "stored" else {}
    if source == "recorded":
        options = {"teacher__store": tmp_path / "new", "teacher__store_mode": "record"}
    run = tmp_path / "run"
    assert main(["train", *dense(photos_root, run, train__device=device, **options), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "dry run: everything was built, nothing was written" in said
    assert ("for the label store" in " ".join(said.split())) == (source == "recorded")
    assert not run.exists()


def test_a_killed_run_ends_bit_for_bit(whole: Path, photos_root: Path, tmp_path: Path) -> None:
    killed = dense(photos_root, tmp_path / "killed")
    kill(killed, 5, tmp_path / "said.txt")
    assert main(["train", *killed, "--resume", "auto"]) == 0
    assert records(tmp_path / "killed") == records(whole)
    for file in ("student/model.safetensors", "heads.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (whole / file).read_bytes(), file


def test_two_processes_give_the_losses_of_one(photos_root: Path, tmp_path: Path) -> None:
    options = {"student__drop_path": 0.0, "train__epochs": 2}
    assert main(["train", *dense(photos_root, tmp_path / "one", **options)]) == 0
    run_on_two(["train", *dense(photos_root, tmp_path / "two", **options)], tmp_path / "said.txt")
    for here, there in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-4)
        assert here.get("terms", {}).get("dense") == pytest.approx(there.get("terms", {}).get("dense"), rel=1e-4)


def test_a_soft_term_follows_its_own_mix_and_temperature(photos_root: Path, tmp_path: Path) -> None:
    terms = [{"kind": "dense", "mode": "soft", "mix": 0.5, "temperature": 2.0}]
    run = tmp_path / "run"
    assert main(["train", *dense(photos_root, run, distill__kind="none", distill__terms=terms, train__epochs=1)]) == 0
    assert steps(run)[0]["terms"]["dense"]["loss"] > 0
    assert steps(run)[0]["distillation"] == 0
    assert list(heads_in(run)["heads"]) == THREE


def test_stored_classes_of_places_are_the_teachers_at_the_step_that_learns_from_them(
    stored: Path, photos_root: Path, tmp_path: Path
) -> None:
    config = parse_config(dense(photos_root, tmp_path / "run"))[0]
    with process_group("cpu") as processes:
        run = prepare(config, processes)
        teacher: Any = ready_lesson(run).answers
        teacher.ask_for_dense(True)
        store, mix = LabelStore(stored), Schedule(1, 0, shape="linear")
        for step, batch in enumerate(run.loader.batches(0)):
            share = mix.at(step / run.loader.total_steps)
            assert batch.view_ids is not None
            found = store.find(batch.view_ids)["dense"]
            assert found.dtype == torch.int16
            assert found.shape == (16, 2, 2)
            assert torch.equal(found, teacher(batch).mixed(share).argmax(-1).short())
            assert torch.equal(
                shares_of_dense(config, run.loader)(batch.view_ids), torch.full((16,), share, dtype=torch.float64)
            )


def test_a_run_on_stored_classes_of_places_is_the_online_run_bit_for_bit(
    stored: Path, whole: Path, photos_root: Path, tmp_path: Path
) -> None:
    assert main(["train", *dense(photos_root, tmp_path / "run", teacher__store=stored)]) == 0
    assert steps(tmp_path / "run") == steps(whole)
    there, here = (folder / "student/model.safetensors" for folder in (whole, tmp_path / "run"))
    assert here.read_bytes() == there.read_bytes()


def test_a_recording_run_fills_the_store_that_a_build_does(
    stored: Path, whole: Path, photos_root: Path, tmp_path: Path
) -> None:
    options = {"teacher__store": tmp_path / "store", "teacher__store_mode": "record"}
    assert main(["train", *dense(photos_root, tmp_path / "run", **options)]) == 0
    assert steps(tmp_path / "run") == steps(whole)
    for epoch in range(3):
        built, recorded = (LabelStore(folder).columns(epoch_part(epoch)) for folder in (stored, tmp_path / "store"))
        assert built.keys() == recorded.keys()
        assert all(torch.equal(column, recorded[name]) for name, column in built.items())


def test_parts_of_a_store_are_joined_with_their_places_and_a_check_and_info_know_them(
    stored: Path, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*dense(photos_root, None), "--store", str(tmp_path / "store"), "--batch_size", "16"]
    for part in ("1/2", "2/2"):
        assert main(["store", "build", *arguments, "--part", part]) == 0
    assert main(["store", "build", "--store", str(tmp_path / "store"), "--join"]) == 0
    for part in (*map(epoch_part, range(3)), "validation"):
        names = ["dense", "label"] if part != "validation" else ["label"]
        built, joined = (LabelStore(folder).columns(part) for folder in (stored, tmp_path / "store"))
        assert sorted(joined) == names
        assert all(np.array_equal(built[name], joined[name]) for name in names)
    assert main(["store", "check", str(tmp_path / "store"), *dense(photos_root, None), "--samples", "20"]) == 0
    capsys.readouterr()
    assert main(["store", "info", str(tmp_path / "store")]) == 0
    said = capsys.readouterr().out
    assert "only the hard label of 3 classes, the class of each of 2 x 2 places, 10 bytes" in said
    assert "only with these train.epochs and train.batch_size" in " ".join(said.split())


def with_other(store: Path, column: str, change: Callable[[torch.Tensor], torch.Tensor], place: Path) -> Path:
    """Copy a store to `place`, with another column in its first epoch."""
    shutil.copytree(store, place)
    name, made = epoch_part(0), LabelStore(place)
    columns = LabelStore(store).columns(name)
    (place / f"{name}.safetensors").unlink()
    made.write_piece(name, torch.arange(made.manifest["views"]), {**columns, column: change(columns[column])})
    made.finish(name)
    return place


def test_a_check_finds_the_places_of_other_views_and_needs_the_term_that_they_are_for(
    stored: Path, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_other(stored, "dense", lambda places: (places + 1) % 3, tmp_path / "store")
    said = refused(["store", "check", str(other), *dense(photos_root, None), "--samples", "60"], capsys)
    assert "disagrees with this teacher's answers to these views (dense)" in said
    without = ["store", "check", str(stored), *dense(photos_root, None, distill__terms=None)]
    assert "and this recipe has none; name the one that the store was built with" in refused(without, capsys)


def test_a_check_finds_the_vectors_of_other_views(
    vectors: Path, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny(photos_root, None, **POOLED), "--samples", "20"]
    assert main(["store", "check", str(vectors), *arguments]) == 0
    lines = [line.split(":")[0].strip() for line in capsys.readouterr().out.splitlines() if "(at most" in line]
    assert lines == ["argmax", "logits", "pooled"]
    other = with_other(vectors, "pooled", lambda rows: rows.roll(1, 0), tmp_path / "store")
    said = refused(["store", "check", str(other), *arguments], capsys)
    assert "disagrees with this teacher's answers to these views (pooled)" in said


def test_a_run_without_the_term_reads_a_store_with_places(stored: Path, photos_root: Path, tmp_path: Path) -> None:
    options = {"teacher__store": stored, "distill__terms": None, "train__batch_size": 8}
    assert main(["train", *dense(photos_root, tmp_path / "run", **options)]) == 0
    assert list(heads_in(tmp_path / "run")["heads"]) == ["cls", "dist", "fused"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"train__batch_size": 8}, "train.batch_size: 16 in the store, 8 here"),
        ({"train__epochs": 2}, "train.epochs: 3 in the store, 2 here"),
        (
            {"distill__terms": [{**DENSE, "mix": 0.5}]},
            "dense.mix: [1.0, 0.0, 0.0, 1.0, 'linear'] in the store",
        ),
        ({"distill__terms": [{**DENSE, "mode": "soft"}]}, "a dense term of mode soft learns from all logits"),
    ],
)
def test_a_store_whose_places_are_those_of_another_run_is_refused(
    options: dict[str, Any],
    line: str,
    stored: Path,
    photos_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refused(["train", *dense(photos_root, tmp_path / "run", teacher__store=stored, **options)], capsys)
    assert line in said
    assert not (tmp_path / "run").exists()


def test_a_store_without_places_is_refused_with_the_cure(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    options = {"distill__terms": None, "train__epochs": 1}
    assert main(["store", "build", *dense(photos_root, None, **options), "--store", str(store)]) == 0
    said = refused(["train", *dense(photos_root, tmp_path / "run", teacher__store=store)], capsys)
    assert "has no column for the dense term; build another store with this recipe (deit-kd store build)" in said


def test_with_a_constant_mix_views_repeat_and_any_batch_size_reads_them(photos_root: Path, tmp_path: Path) -> None:
    store, options = tmp_path / "store", {"distill__terms": [{**DENSE, "mix": 1.0}]}
    assert main(["store", "build", *dense(photos_root, None, **options), "--store", str(store), "--epochs", "1"]) == 0
    reading = {**options, "teacher__store": store, "train__batch_size": 8, "train__epochs": 2}
    assert main(["train", *dense(photos_root, tmp_path / "run", **reading)]) == 0


def test_a_falling_mix_needs_every_epoch_of_the_run(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    assert main(["store", "build", *dense(photos_root, None), "--store", str(store), "--epochs", "1"]) == 0
    said = refused(["train", *dense(photos_root, tmp_path / "run", teacher__store=store)], capsys)
    assert "holds 1 epoch of views, and the run has 3, but the dense labels of a view belong to one step" in said


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"teacher__name": "test_vit", "teacher__args": {}},
            "test_vit is a VisionTransformer, whose last features are tokens",
        ),
        ({"teacher__name": "mobilenetv3_small_050"}, "has more than a norm and a linear layer after the pooling"),
        ({"teacher__image_size": 32}, "has a last map of one place at 32 px"),
        ({"teacher__kind": "average"}, "the average of the student's weights is no CNN"),
        ({"teacher__head": False, "distill__kind": "none"}, "teacher.head: false gives no logits for dense labels"),
        ({"student__name": "levit_128s", "student__args": {}}, "has no distillation token"),
        ({"distill__terms": [{"kind": "dense", "mix": 2}]}, "must be between 0 and 1"),
        (
            {"distill__terms": [{"kind": "dense", "temperature": 2}]},
            "temperature does not act on a dense term of mode hard",
        ),
        ({"distill__terms": [{"kind": "dense", "loss": "huber"}]}, "loss does not act on a term of kind dense"),
        ({"distill__terms": [DENSE, DENSE]}, "dense is there twice"),
    ],
)
def test_what_cannot_teach_at_places_is_one_line_and_writes_nothing(
    options: dict[str, Any], line: str, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"data__image_size": 64} if options.get("student__name") else {}
    assert line in refused(["train", *dense(photos_root, tmp_path / "run", **sizes, **options)], capsys)
    assert not (tmp_path / "run").exists()


POOLED: dict[str, Any] = {
    "distill__terms": [{"kind": "pooled", "loss": "huber"}],
    "distill__kind": "soft",
    "train__epochs": 2,
    "train__batch_size": 16,
}


@pytest.fixture(scope="module")
def vectors(photos_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the teacher's pooled vectors."""
    store = tmp_path_factory.mktemp("pooled") / "store"
    assert main(["store", "build", *tiny(photos_root, None, **POOLED), "--store", str(store)]) == 0
    return store


def test_a_run_on_stored_vectors_is_the_online_run_within_fp16_rounding_and_loads_no_teacher(
    vectors: Path, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny(photos_root, tmp_path / "online", **POOLED)]) == 0
    nobody = {"teacher__name": None, "teacher__random_weights": None, "teacher__store": vectors}
    capsys.readouterr()
    assert main(["train", *tiny(photos_root, tmp_path / "stored", **POOLED, **nobody)]) == 0
    assert "guide" not in capsys.readouterr().out
    for here, there in zip(steps(tmp_path / "stored"), steps(tmp_path / "online"), strict=True):
        assert here["terms"]["pooled"]["loss"] == pytest.approx(there["terms"]["pooled"]["loss"], rel=1e-2)
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-2)


def test_stored_vectors_are_the_teachers_in_fp16(vectors: Path, photos_root: Path, tmp_path: Path) -> None:
    config = parse_config(tiny(photos_root, tmp_path / "run", **POOLED))[0]
    with process_group("cpu") as processes:
        run = prepare(config, processes)
        teacher: Any = ready_lesson(run).answers
        teacher.ask_for(("pooled",))
        batch = next(iter(run.loader.batches(0)))
        assert batch.view_ids is not None
        found = LabelStore(vectors).find(batch.view_ids)["pooled"]
        assert torch.equal(found, teacher(batch).features["pooled"].half())


def test_a_store_without_vectors_is_refused_with_the_cure_unless_the_teacher_is_named(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, plain = tmp_path / "store", {**POOLED, "distill__terms": None, "train__epochs": 1}
    assert main(["store", "build", *tiny(photos_root, None, **plain), "--store", str(store)]) == 0
    options = {**POOLED, "teacher__store": store}
    unnamed = {**options, "teacher__name": None, "teacher__random_weights": None}
    said = refused(["train", *tiny(photos_root, tmp_path / "run", **unnamed)], capsys)
    assert "has no column for the pooled term; build another store with this recipe" in said
    assert main(["train", *tiny(photos_root, tmp_path / "named", **options)]) == 0


def test_a_teacher_that_cannot_answer_at_places_is_refused_before_it_is_fitted(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = {"teacher__fit__epochs": 1, "teacher__fit__folder": str(tmp_path / "teachers")}
    options = {"teacher__name": "test_vit", "teacher__random_weights": None, "distill__terms": [DENSE], **fit}
    said = refused(["train", *tiny(photos_root, tmp_path / "run", **options)], capsys)
    assert "dense logits need a CNN whose head is mean pooling and one linear layer" in said
    assert not (tmp_path / "teachers").exists()
