"""Runs of one recipe over its folds are one student: each photo is scored by the run that has not learned from it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
import yaml

from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.evaluation.folds import folded_students
from deit_kd.evaluation.sources import open_source
from deit_kd.metrics import bootstrap_means, interval, mcnemar
from deit_kd.runs.photos import build_splits
from tests.helpers import STUDENT, heads_in, refused, tiny, write_photos

ARMS: dict[str, dict[str, Any]] = {
    "soft": {"distill__kind": "soft", "teacher__random_weights": None, "teacher__fit__epochs": 1},
    "none": {"distill__kind": "none", "teacher__random_weights": None},
}


def options_of(arm: str, home: Path, fold: int, **more: Any) -> dict[str, Any]:
    return {
        "train__batch_size": 6,
        "teacher__min_top1": 0,
        "teacher__fit__batch_size": 6,
        "teacher__fit__folder": str(home / "teachers"),
        "teacher__fit__optim__warmup_epochs": 0,
        "data__folds": 3,
        "data__fold": fold,
        **ARMS[arm],
        **more,
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 photos of 3 classes, and two recipes over 3 folds of them."""
    home = tmp_path_factory.mktemp("folds")
    write_photos(home / "photos", {"train": 6, "validation": 3})
    for arm in ARMS:
        for fold in range(3):
            assert main(["train", *tiny(home / "photos", home / f"{arm}-{fold}", **options_of(arm, home, fold))]) == 0
    return home


def runs_of(home: Path, *names: str) -> list[str]:
    return [str(home / f"{name}-{fold}") for name in names for fold in range(3)]


def predictions(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(folder / "predictions.parquet").to_pylist()
    return rows


@pytest.fixture(scope="module")
def joined(home: Path) -> dict[str, Any]:
    """What was found of both recipes together, by name."""
    assert main(["eval", *runs_of(home, "soft", "none"), "--to", str(home / "joined")]) == 0
    return {name: heads_in(home / "joined" / name) for name in ARMS}


def test_every_photo_is_scored_once_by_the_run_that_held_it_out(home: Path, joined: dict[str, Any]) -> None:
    rows = {row["path"]: row for row in predictions(home / "joined" / "soft")}
    files = {path.relative_to(home / "photos").as_posix() for path in (home / "photos").rglob("*.png")}
    assert rows.keys() == files
    assert joined["soft"]["n"] == len(files) == 27
    for fold in range(3):
        assert main(["eval", str(home / f"soft-{fold}"), "--to", str(home / "one")]) == 0
        of_fold = predictions(home / "one")
        assert len(of_fold) == 9
        for row in of_fold:
            for key, value in row.items():
                found = rows[row["path"]][key]
                assert found == (pytest.approx(value, rel=1e-5) if key.endswith("probability") else value)


def test_a_score_is_the_mean_over_all_photos(home: Path, joined: dict[str, Any]) -> None:
    by_fold = [heads_in(home / f"soft-{fold}") for fold in range(3)]
    for head in ("cls", "dist", "fused"):
        for key in ("top1", "nll"):
            mean = sum(heads["n"] * heads["heads"][head][key] for heads in by_fold) / 27
            assert joined["soft"]["heads"][head][key] == pytest.approx(mean)
    assert joined["soft"]["folds"]["top1"]["1"]["dist"] == pytest.approx(by_fold[1]["heads"]["dist"]["top1"])
    teacher = sum(heads["n"] * heads["teacher"]["top1"] for heads in by_fold) / 27
    assert joined["soft"]["teacher"]["top1"] == pytest.approx(teacher)


@pytest.mark.parametrize("head", ["fused", "cls", "dist"])
def test_two_recipes_are_compared_photo_by_photo(home: Path, joined: dict[str, Any], head: str) -> None:
    column = {"fused": "fused_softmax_top5"}.get(head, f"{head}_top5")
    soft, none = ({row["path"]: row for row in predictions(home / "joined" / name)} for name in ARMS)
    first = torch.tensor([row[column][0] == row["label"] for row in soft.values()])
    second = torch.tensor([none[path]["cls_top5"][0] == none[path]["label"] for path in soft])
    (row,) = (r for r in joined["soft"]["comparisons"] if (r["first"], r["second"]) == (head, "none"))
    difference = 100 * (first.double() - second.double())
    assert row["difference"] == pytest.approx(float(difference.mean()))
    assert row["interval"] == pytest.approx(interval(bootstrap_means(difference[:, None], 0)[:, 0]))
    assert {key: row[key] for key in ("only_first", "only_second", "p")} == mcnemar(first, second)


def test_the_same_runs_in_another_order_give_the_same_numbers(home: Path, joined: dict[str, Any]) -> None:
    assert main(["eval", *runs_of(home, "soft")[::-1], "--to", str(home / "backwards")]) == 0
    heads = heads_in(home / "backwards")
    assert heads["heads"] == joined["soft"]["heads"]


def test_missing_folds_are_named_and_students_compared_on_those_that_all_have(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [*runs_of(home, "soft")[:2], *runs_of(home, "none")[1:]]
    assert main(["eval", *runs, "--to", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "soft: no run of fold 2 of 3" in told
    assert "none: no run of fold 0 of 3" in told
    assert "compared on the folds that all of them have: 1" in told
    heads = heads_in(tmp_path / "soft")
    assert (heads["n"], heads["folds"]["missing"]) == (9, [0, 2])


def grouped(folders: list[Path]) -> list[tuple[str, list[int]]]:
    opened = [open_source(str(folder)) for folder in folders]
    students = folded_students([(source, parse_config(source.recipe)[0]) for source in opened])
    return [(student.name, list(student.runs)) for student in students]


@pytest.mark.parametrize(
    ("before", "after", "students"),
    [
        ("workers: 0", "workers: 3", 1),
        ("recipe: run", "recipe: other", 1),
        ("seed: 0", "seed: 1", 2),
        ("temperature: 3.0", "temperature: 2.0", 2),
        ("folds: 3", "folds: 4", 2),
    ],
)
def test_what_makes_another_student(home: Path, tmp_path: Path, before: str, after: str, students: int) -> None:
    folder = shutil.copytree(home / "soft-1", tmp_path / "soft-1")
    recipe = (folder / "config.yaml").read_text()
    assert before in recipe
    (folder / "config.yaml").write_text(recipe.replace(before, after))
    assert len(grouped([home / "soft-0", folder])) == students


def test_a_teacher_with_another_recipe_makes_another_student(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "soft-1", tmp_path / "other-1")
    facts = json.loads((folder / "run.json").read_text())
    teacher = shutil.copytree(facts["teacher"]["source"], tmp_path / "teacher")
    (folder / "run.json").write_text(json.dumps({**facts, "teacher": {**facts["teacher"], "source": str(teacher)}}))
    assert len(grouped([home / "soft-0", folder])) == 1
    recipe = (teacher / "config.yaml").read_text()
    (teacher / "config.yaml").write_text(recipe.replace("label_smoothing: 0.1", "label_smoothing: 0.2"))
    assert grouped([home / "soft-0", folder]) == [("soft", [0]), ("other", [1])]


@pytest.mark.parametrize("learner", ["student", "peer"])
def test_folds_that_start_from_runs_are_one_student_if_these_are(home: Path, tmp_path: Path, learner: str) -> None:
    def began_with(source: Path, fold: int) -> Path:
        folder = shutil.copytree(home / f"none-{fold}", tmp_path / f"{source.name}-of-{fold}")
        recipe = yaml.safe_load((folder / "config.yaml").read_text())
        if learner == "student":
            recipe["student"]["checkpoint"] = str(source)
        else:
            recipe["peers"] = [{"name": STUDENT, "checkpoint": str(source)}]
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
        return folder

    first, second = began_with(home / "soft-0", 0), began_with(home / "soft-1", 1)
    assert len(grouped([first, second])) == 1
    assert len(grouped([first, began_with(home / "none-1", 1)])) == 2
    assert len(grouped([first, home / "none-1"])) == 2


def test_two_runs_of_the_same_fold_are_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = shutil.copytree(home / "soft-1", tmp_path / "again")
    assert "is fold 1 of the same recipe as" in refused(["eval", *runs_of(home, "soft"), str(again)], capsys)


def leaks(home: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Return commands that would score or teach with what has learned from the photos held out."""
    (teacher,) = {json.loads((home / "soft-0" / "run.json").read_text())["teacher"]["source"]}
    own = {"teacher__fit__epochs": 0, "teacher__name": None}
    train = {
        "a fitted teacher": {**own, "teacher__checkpoint": teacher},
        "a student as the teacher": {**own, "teacher__checkpoint": str(home / "soft-0")},
        "a run's teacher": {**own, "teacher__checkpoint": f"{home / 'soft-0'}:teacher"},
        "one of several": {**own, "teacher__members": json.dumps([{"checkpoint": teacher}])},
        "a guide": {"distill__terms": '[{"kind": "guide"}]', "guide__checkpoint": teacher},
        "a pre-trained student": {"student__checkpoint": str(home / "none-0" / "student"), "student__args": "{}"},
    }
    commands = {
        name: ["train", *tiny(home / "photos", tmp_path / "run", **options_of("soft", home, 1, **options))]
        for name, options in train.items()
    }
    first, moved = str(home / "soft-0"), options_of("soft", home, 1, **train["a fitted teacher"])
    return {
        **commands,
        "photos that were moved": ["train", *tiny(tmp_path / "moved", tmp_path / "run", **moved)],
        "another fold typed": ["eval", first, "--data.fold", "1"],
        "no fold typed": ["eval", first, "--data.folds", "null", "--data.fold", "null"],
        "a second student": ["eval", first, "--against", str(home / "soft-1")],
        "other photos by the folds of these": ["eval", first, "--data.root", str(tmp_path / "others")],
    }


@pytest.mark.parametrize(
    "case",
    [
        "a fitted teacher",
        "a student as the teacher",
        "a run's teacher",
        "one of several",
        "a guide",
        "a pre-trained student",
        "photos that were moved",
        "another fold typed",
        "no fold typed",
        "a second student",
        "other photos by the folds of these",
    ],
)
def test_what_has_learned_from_the_photos_held_out_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    write_photos(tmp_path / "others", {"train": 3, "validation": 4})
    shutil.copytree(home / "photos", tmp_path / "moved")
    line = refused(leaks(home, tmp_path)[case], capsys)
    assert "held out fold 0 of 3" in line or "held out fold 1 of 3" in line
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_the_fold_teaches_with_a_share_of_its_photos(home: Path, tmp_path: Path) -> None:
    (teacher,) = {json.loads((home / "soft-0" / "run.json").read_text())["teacher"]["source"]}
    own = {"teacher__fit__epochs": 0, "teacher__name": None, "teacher__checkpoint": teacher, "data__per_class": 4}
    arguments = tiny(home / "photos", tmp_path / "run", **options_of("soft", home, 0, **own))
    assert len(build_splits(parse_config(arguments)[0]).train) == 12


def test_runs_of_other_classes_are_another_student(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "none-1", tmp_path / "other-1")
    facts = json.loads((home / "none-1" / "run.json").read_text())
    (tmp_path / "other-1" / "run.json").write_text(json.dumps({**facts, "classes": ["bars", "dots"]}))
    sources = [open_source(str(folder)) for folder in (home / "none-0", home / "none-2", tmp_path / "other-1")]
    students = folded_students([(source, source.own_config()) for source in sources])
    assert [list(student.runs) for student in students] == [[0, 2], [1]]


def test_all_of_other_photos_are_scored_where_folds_are_unset(home: Path, tmp_path: Path) -> None:
    root = write_photos(tmp_path / "others", {"train": 3, "validation": 4})
    unset = ["--data.folds", "null", "--data.fold", "null"]
    assert main(["eval", str(home / "soft-0"), "--data.root", str(root), *unset, "--to", str(tmp_path / "to")]) == 0
    assert heads_in(tmp_path / "to")["n"] == 12


def test_photos_that_have_moved_are_the_same(home: Path, tmp_path: Path) -> None:
    root = shutil.copytree(home / "photos", tmp_path / "moved")
    assert main(["eval", *runs_of(home, "none"), "--data.root", str(root), "--to", str(tmp_path / "to")]) == 0


def test_a_photo_that_is_added_since_is_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shutil.copytree(home / "photos", tmp_path / "moved")
    shutil.copy(root / "train" / "dots" / "000.png", root / "train" / "dots" / "new.png")
    assert "has other photos" in refused(["eval", *runs_of(home, "none"), "--data.root", str(root)], capsys)


@pytest.mark.parametrize("option", [["--against", "resnet18"], ["--diagnose", "true"], ["--split", "train"]])
def test_options_of_one_student_are_refused_for_several(
    home: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    assert "for one student" in refused(["eval", *runs_of(home, "soft"), *option], capsys)


def test_several_runs_without_folds_are_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["eval", str(runs / "distilled"), str(runs / "plain")], capsys)
    assert "is not a run of a fold" in line


@pytest.fixture(scope="module")
def page(home: Path) -> Path:
    """The report of both recipes."""
    assert main(["report", *runs_of(home, "soft", "none"), "--to", str(home / "page")]) == 0
    return home / "page"


def test_a_report_has_a_section_for_each_recipe(page: Path, joined: dict[str, Any]) -> None:
    html = (page / "report.html").read_text()
    assert re.findall(r'class="heads" data-run="(.*?)"', html) == ["soft", "none"]
    assert "curves, layers and images are those of soft-0" in html
    for name, heads in joined.items():
        assert heads_in(page / name) == heads


def test_a_report_names_the_folds_by_which_it_scores(page: Path, joined: dict[str, Any]) -> None:
    by_fold = [f"{fold}: {top1['fused']:.2f}" for fold, top1 in joined["soft"]["folds"]["top1"].items()]
    assert f"top-1 % of fused by fold of 3: {', '.join(by_fold)}" in (page / "report.html").read_text()


def test_a_run_of_a_fold_alone_is_reported_as_a_run(home: Path, tmp_path: Path) -> None:
    assert main(["report", str(home / "none-1"), "--to", str(tmp_path)]) == 0
    heads = heads_in(tmp_path)
    assert (heads["student"], heads["n"], "folds" in heads) == ("none-1", 9, False)
