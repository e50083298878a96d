"""Runs whose student is guided by feature maps: until when, by whom, and what is left of it in the end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.console import console
from deit_kd.evaluation.curves import charts_of, read_records
from deit_kd.figures import line_charts
from deit_kd.interfaces import InputError, StudentOutput
from deit_kd.origins import recipe_of
from deit_kd.runs.lesson import _check_same
from deit_kd.teaching.fit import teacher_folder
from tests.forked import run_on_two
from tests.helpers import FULL, Finished, heads_in, records, refused, tiny, write_photos
from tests.started import kill
from tests.tiny_parts import folder_splits

EPOCHS, STEPS_PER_EPOCH = 4, 3
GUIDE = {"kind": "guide", "weight": {"start": 2.5, "until": 0.5}, "blocks": [0, 1], "stages": ["layer1", "layer2"]}
RELATIONS = {"kind": "relations", "blocks": [0, 1], "stages": ["layer1", "layer2"]}
OPTIONS: dict[str, Any] = {
    "data__image_size": 32,
    "distill__kind": "soft",
    "distill__terms": [GUIDE],
    "optim__clip_grad_norm": 1.0,
    "student__drop_path": 0.2,
    "train__epochs": EPOCHS,
    "train__batch_size": 16,
    "train__ema_decay": 0.8,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, photos_root: Path) -> Path:
    """A fitted CNN, and a second seed of it beside it."""
    home = tmp_path_factory.mktemp("teachers")
    options = {key: FULL[key] for key in FULL if key.startswith("teacher__")} | {"data__image_size": 32}
    for seed in (0, 1):
        arguments = tiny(
            photos_root, home / f"run-{seed}", **options, seed=seed, teacher__fit__folder=str(home / "kept")
        )
        assert main(["train", *arguments]) == 0
        (fitted,) = (home / "kept").iterdir()
        fitted.rename(home / f"seed-{seed}")
    return home


def guided(root: Path, output: Path, teacher: Path, **options: Any) -> list[str]:
    own = {"teacher__random_weights": None, "teacher__checkpoint": str(teacher / "seed-0"), "teacher__min_top1": 0}
    return tiny(root, output, **{**OPTIONS, **own, **options})


@pytest.fixture(scope="module")
def whole(photos_root: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A guided run that was never broken off."""
    home = tmp_path_factory.mktemp("guided")
    arguments = guided(photos_root, home / "run", teacher)
    assert main(["train", *arguments]) == 0
    return Finished(home / "run", teacher, arguments)


def steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder) if record["kind"] == "step"]


def assert_same_run(one: Path, other: Path) -> None:
    assert records(one) == records(other)
    for file in ("student/model.safetensors", "heads.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def test_the_guide_is_measured_until_it_is_over(whole: Finished) -> None:
    terms = [step["terms"] for step in steps(whole.folder)]
    assert [sorted(term) for term in terms] == [["guide"]] * 6 + [[]] * 6
    assert all(term["guide"]["weight"] == 2.5 and -1 <= term["guide"]["cosine"] <= 1 for term in terms[:6])
    assert terms[5]["guide"]["loss"] < terms[0]["guide"]["loss"]


@pytest.fixture(scope="module")
def stopped(photos_root: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with an alpha that ends in its third epoch, a guide that ends in its last one, and what it printed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    weights: dict[str, Any] = {
        "distill__alpha": {"start": 0.9, "until": 0.6},
        "distill__temperature": {"start": 4, "end": 2, "shape": "linear"},
        "distill__terms": [{**GUIDE, "weight": {"start": 2.5, "until": 0.9}}],
    }
    arguments = guided(photos_root, folder, teacher, **weights, train__log_every_steps=3)
    with console.capture() as capture:
        assert main(["train", *arguments]) == 0
    return folder, capture.get()


def test_a_record_ends_where_a_schedule_does_and_holds_what_changes(stopped: tuple[Path, str]) -> None:
    made = {step["step"]: step for step in steps(stopped[0])}
    assert list(made) == [3, 6, 8, 9, 11, 12]  # 0.6 and 0.9 of 12 steps are 7.2 and 10.8
    assert [made[step]["alpha"] for step in made] == [0.9, 0.9, 0.9, 0, 0, 0]
    assert [made[step]["terms"]["guide"]["weight"] for step in made] == [2.5] * 5 + [0]
    assert made[3]["temperature"] == pytest.approx(4 - 2 * 2 / 12)


def test_a_loss_that_has_ended_is_not_a_loss_of_zero(stopped: tuple[Path, str]) -> None:
    made = {step["step"]: step["distillation"] for step in steps(stopped[0])}
    assert all(made[step] > 0 for step in (3, 6, 8, 9))  # to the end of its epoch
    assert made[11] is made[12] is None
    assert "dist -, alpha 0)" in stopped[1]


def test_a_progress_line_shows_each_weight(stopped: tuple[Path, str]) -> None:
    assert re.search(r"dist \d\.\d{3}, alpha 0\.9\), guide \d\.\d{3} x 2\.5 \(cos -?\d\.\d\d\)", stopped[1])


def test_charts_mark_each_stop_where_it_is_and_in_its_own_colour(stopped: tuple[Path, str]) -> None:
    charts = charts_of({"run": read_records(stopped[0])})
    (distillation,), (guide,) = charts["loss"].marks, charts["terms"].marks
    assert (distillation.name, distillation.x) == ("distillation ends", 8)
    assert (guide.name, guide.x) == ("guide ends", 11)
    assert charts["connectors"].marks == charts["weights"].marks == [guide]
    colours = {line.name: line.colour for name in ("loss", "terms") for line in charts[name].series}
    assert (distillation.colour, guide.colour) == (colours["distillation"], colours["guide"])
    assert {line.name: list(line.y) for line in charts["weights"].series} == {
        "guide": [2.5] * 5 + [0],
        "alpha": [0.9] * 3 + [0] * 3,
    }


def test_an_axis_goes_to_the_end_of_the_run(whole: Finished) -> None:
    chart = charts_of({"run": read_records(whole.folder)})["terms"]
    assert (chart.series[0].x[-1], chart.marks[0].x) == (12, 6)
    assert line_charts([chart]).axes[0].get_xlim()[1] >= 12


def test_nothing_of_the_guide_is_in_the_student_and_its_average(whole: Finished) -> None:
    plain = guided(Path("unused"), whole.folder.parent / "plain", whole.teachers, distill__terms=[])
    arguments = [*plain, "--data.root", whole.arguments[whole.arguments.index("--data.root") + 1]]
    assert main(["train", *arguments]) == 0
    folders = (whole.folder.parent / "plain", whole.folder)
    theirs, ours = (load_file(folder / "student" / "model.safetensors") for folder in folders)
    assert {name: value.shape for name, value in theirs.items()} == {name: value.shape for name, value in ours.items()}
    with safe_open(next((whole.folder / "checkpoints").glob("step-*")), "pt") as checkpoint:
        connected = [name for name in checkpoint.keys() if "connectors" in name]  # noqa: SIM118 - no dict
    assert len(connected) == 4  # two weights and biases
    assert not any(name.startswith(".trainer.ema") for name in connected)


@pytest.mark.parametrize("before_step", [4, 6, 7, 10], ids=["before", "in its last step", "at the stop", "after"])
def test_a_run_killed_around_the_stop_ends_bit_for_bit(whole: Finished, tmp_path: Path, before_step: int) -> None:
    arguments = [*whole.arguments, "--output", str(tmp_path / "run"), "--train.checkpoint_every_steps", "1"]
    kill(arguments, before_step, tmp_path / "said.txt")
    assert main(["train", *arguments, "--resume", "auto"]) == 0
    assert_same_run(tmp_path / "run", whole.folder)


def test_two_processes_across_the_stop_give_the_losses_of_one(photos_root: Path, teacher: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "student__drop_path": 0.0,
        "distill__temperature": 1.0,
    }  # the path's seed names the process
    options["distill__terms"] = [GUIDE, {"kind": "pooled"}]  # DDP waits for the connectors of the one that goes on
    assert main(["train", *guided(photos_root, tmp_path / "one", teacher, **options)]) == 0
    two = guided(photos_root, tmp_path / "two", teacher, **options)
    run_on_two(["train", *two], tmp_path / "said.txt")
    assert "guide: ended after step 6" in (tmp_path / "said.txt").read_text()
    pairs = list(zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True))
    assert len(pairs) == EPOCHS * STEPS_PER_EPOCH
    for here, there in pairs:
        for term in ("loss", "classification", "distillation"):
            assert here[term] == pytest.approx(there[term], rel=1e-4)
        for kind, term in here["terms"].items():
            assert term == pytest.approx(there["terms"][kind], rel=1e-4)


def test_relations_alone_resume_bit_for_bit_and_two_processes_give_the_losses_of_one(
    photos_root: Path, teacher: Path, tmp_path: Path
) -> None:
    options = {"distill__terms": [RELATIONS], "distill__temperature": 1.0, "student__drop_path": 0.0}
    options |= {"train__epochs": 2, "train__checkpoint_every_steps": 1}
    assert main(["train", *guided(photos_root, tmp_path / "one", teacher, **options)]) == 0
    one = steps(tmp_path / "one")
    terms = [step["terms"]["relations"] for step in one]
    assert all(term["loss"] > 0 and -1 <= term["cosine"] <= 1 for term in terms)
    killed = guided(photos_root, tmp_path / "killed", teacher, **options)
    kill(killed, 4, tmp_path / "said.txt")
    assert main(["train", *killed, "--resume", "auto"]) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "one")
    run_on_two(["train", *guided(photos_root, tmp_path / "two", teacher, **options)], tmp_path / "said.txt")
    for here, there in zip(one, steps(tmp_path / "two"), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-4)
        assert here["terms"]["relations"] == pytest.approx(there["terms"]["relations"], rel=1e-4)


def test_a_stored_teacher_with_an_online_guide_is_both_online(
    whole: Finished, photos_root: Path, tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    record = {"teacher__store": store, "teacher__store_mode": "record", "teacher__store_top": 3}
    recorded = guided(photos_root, tmp_path / "recorded", whole.teachers, **record)
    assert main(["train", *recorded]) == 0
    assert_same_run(tmp_path / "recorded", whole.folder)
    # The recipe's own teacher gives the maps, as a guide that is named does.
    assert main(["train", *guided(photos_root, tmp_path / "read", whole.teachers, teacher__store=store)]) == 0
    guide = {"guide__name": "test_resnet", "guide__checkpoint": str(whole.teachers / "seed-0"), "guide__min_top1": 0}
    assert main(["train", *guided(photos_root, tmp_path / "named", whole.teachers, teacher__store=store, **guide)]) == 0
    assert_same_run(tmp_path / "read", tmp_path / "named")
    online, read = steps(whole.folder), steps(tmp_path / "read")
    for here, there in zip(online, read, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-3)  # stored logits are fp16
        assert [term["loss"] for term in here["terms"].values()] == pytest.approx(
            [term["loss"] for term in there["terms"].values()], rel=1e-3
        )


def test_a_guide_of_its_own_has_its_size_its_gate_and_its_place_in_the_records(
    photos_root: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = {
        "guide__name": "test_resnet",
        "guide__checkpoint": str(teacher / "seed-1"),
        "guide__min_top1": 0,
        "guide__image_size": 64,
        "distill__terms": [{**GUIDE, "stages": ["layer1", "layer3"]}],
        "train__epochs": 2,
    }
    assert main(["train", *guided(photos_root, tmp_path / "run", teacher, **guide)]) == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["teacher"]
    assert facts["guide"]["image_size"] == 64
    assert facts["guide"]["weights"] != facts["weights"]
    assert "guide: test_resnet, top-1" in capsys.readouterr().out
    again = guided(photos_root, tmp_path / "refused", teacher, **{**guide, "guide__min_top1": 100})
    assert "guide.min_top1: test_resnet scores" in refused(["train", *again], capsys)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("options", [{}, {"data__classes": ["12", "2", "30"], "data__rest": "0"}])
def test_a_teacher_is_fitted_to_classes_that_are_numbers_in_the_order_of_their_letters(
    options: dict[str, Any], tmp_path: Path
) -> None:
    root = write_photos(tmp_path / "photos", {"train": 3, "validation": 1}, ("12", "2", "30", "4"))
    fit = {key: FULL[key] for key in FULL if key.startswith("teacher__")} | {"teacher__min_top1": 0}
    fit |= {"teacher__fit__folder": str(tmp_path / "kept"), "teacher__fit__epochs": 1, "train__epochs": 1}
    small = {"train__batch_size": 4, "teacher__fit__batch_size": 4, "optim__warmup_epochs": 0}
    fit |= small | {"teacher__fit__optim__warmup_epochs": 0}
    assert main(["train", *tiny(root, tmp_path / "run", **{**OPTIONS, **fit, **options})]) == 0


def test_a_guide_alone_needs_no_token_and_is_fitted_in_the_same_command(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {key: value for key, value in FULL.items() if key.startswith("teacher__")}
    options |= {"distill__kind": "none", "teacher__fit__folder": str(tmp_path / "kept"), "teacher__checkpoint": None}
    assert main(["train", *guided(photos_root, tmp_path / "run", tmp_path, **{**options, "train__epochs": 2})]) == 0
    heads = heads_in(tmp_path / "run")
    assert heads["heads"]["dist"] is None
    assert heads["teacher"] is not None
    assert steps(tmp_path / "run")[0]["terms"]["guide"]["loss"] > 0
    said = r"guide: ended after step 3; memory peaked at (\S+) (MB|GB) and is (\S+) (MB|GB) now"
    ended = re.search(said, capsys.readouterr().out)
    assert ended is not None
    peak, now = (float(ended[at]) * (1 if ended[at + 1] == "MB" else 1000) for at in (1, 3))
    assert peak >= now - 1  # the system counts pages of a thread late


# A network that takes no other size than the one that its weights were trained at.
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


@pytest.mark.parametrize("role", ["teacher", "guide"])
def test_a_network_is_fitted_as_it_sees_photos_later(
    role: str, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"name": "swin_tiny_patch4_window7_224", "args": SWIN, "image_size": 32, "std": [0.5, 0.5, 0.5]}
    own |= {"min_top1": 0, "fit__epochs": 1, "fit__batch_size": 16, "fit__optim__warmup_epochs": 0}
    own["fit__folder"] = str(tmp_path / "kept")
    options = {f"{role}__{key}": value for key, value in own.items()}
    if role == "guide":
        relations = {"kind": "relations", "blocks": [1], "stages": ["layers.0"]}
        options |= {"distill__kind": "none", "distill__terms": [relations], "teacher__name": None}
    arguments = tiny(photos_root, tmp_path / "run", **{"teacher__random_weights": None, **options})
    assert main(["train", *arguments]) == 0
    (fitted,) = (path for path in (tmp_path / "kept").iterdir() if path.is_dir())
    seen = recipe_of(fitted).data
    assert (seen.image_size, seen.std) == (32, (0.5, 0.5, 0.5))
    assert recipe_of(tmp_path / "run").data.image_size == 16
    told = capsys.readouterr().out
    assert f"{role}: fitting swin_tiny_patch4_window7_224" in told
    assert main(["train", *arguments, "--output", str(tmp_path / "again")]) == 0
    assert f"{role}: found {fitted}" in capsys.readouterr().out
    wrong = [*arguments, "--output", str(tmp_path / "wrong"), f"--{role}.image_size", "34"]
    assert f"{role}.image_size: 34 is not a multiple of {role}.name's patch size 4" in refused(
        ["train", *wrong], capsys
    )


def test_the_folder_of_a_fit_depends_on_the_size_at_which_it_is_fitted(photos_root: Path) -> None:
    splits = folder_splits(photos_root)
    folders = []
    for student, own in ((32, None), (32, 32), (16, 32), (16, None), (16, 24)):
        options = {"data__image_size": student, "teacher__image_size": own, "teacher__fit__epochs": 1}
        config, _ = parse_config(tiny(photos_root, None, teacher__random_weights=None, **options))
        folders.append(teacher_folder(config, splits))
    assert folders[0] == folders[1] == folders[2]  # so what was fitted before is found again
    assert len(set(folders)) == 3


KEPT = {"name": "test_resnet", "random_weights": True}
WRONG_GUIDES: list[dict[str, Any]] = [
    {"checkpoint": "nowhere"},
    {"random_weights": True},
    {"fit__epochs": 1},
    {"name": "test_resnet"},
    {"name": "resnet19", "random_weights": True},
    {"name": "resnet19", "fit__epochs": 1},
    {"name": "test_resnet", "fit__epochs": 1, "fit__batch_size": 64},
    {"name": "test_resnet", "fit__epochs": 1, "fit__optim__name": "sdg"},
    {"name": "test_resnet", "fit__epochs": 1, "args": {"nonsense": 1}},
    {"name": "test_resnet", "pretrained": True, "random_weights": True},
    {"name": "convnext_tiny.dinov3_lvd1689m", "pretrained": True},
    {"name": "test_vit", "random_weights": True, "image_size": 30},
    {**KEPT, "class_map": "nowhere.json"},
    {**KEPT, "label_set": "imagenet-0"},
    {**KEPT, "args": {"num_classes": 2}},
    {**KEPT, "args": {"nonsense": 1}},
    {"checkpoint": "seed-0", "class_map": "turned.json"},
    {"checkpoint": "seed-1", "min_top1": 100},
    {"checkpoint": "seed-0", "name": "test_resnet", "args": {"act_layer": "gelu"}},
    {"checkpoint": "weights.pth", "name": "test_resnet"},
    {"checkpoint": "seed-0:teacher"},
]


@pytest.mark.parametrize("wrong", WRONG_GUIDES, ids=str)
def test_a_wrong_guide_is_refused_in_the_words_for_a_teacher_with_its_own_keys(
    wrong: dict[str, Any],
    photos_root: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(teacher)
    (teacher / "weights.pth").write_bytes(b"none")
    (teacher / "turned.json").write_text('{"bars": 1, "dots": 2, "rings": 0}')
    base = {**OPTIONS, "distill__kind": "none", "teacher__name": None, "teacher__random_weights": None}
    lines = {}
    for role in ("teacher", "guide"):
        own = base | {f"{role}__{key}": value for key, value in wrong.items()}
        lines[role] = refused(["train", *tiny(photos_root, tmp_path / "run", **own)], capsys)
    assert lines["guide"] != lines["teacher"]
    assert lines["guide"] == re.sub(r"(?<!:)\bteacher([.:])", r"guide\1", lines["teacher"])
    assert not (tmp_path / "run").exists()


def test_lines_about_a_guide_name_its_own_keys(
    photos_root: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"guide__name": "resnet18", "guide__checkpoint": str(teacher / "seed-0"), "guide__min_top1": 0}
    options = {"distill__kind": "none", "teacher__name": None, "teacher__checkpoint": None, "train__epochs": 1, **named}
    assert main(["train", *guided(photos_root, tmp_path / "run", teacher, **options)]) == 0
    told = capsys.readouterr().out
    assert "guide.name: resnet18 is ignored" in told
    assert "teacher.name" not in told


@pytest.mark.parametrize("kind", ["guide", "relations", "pooled"])
def test_a_feature_term_of_weight_0_loads_and_fits_no_guide(photos_root: Path, tmp_path: Path, kind: str) -> None:
    fit = {"guide__name": "test_resnet", "guide__fit__epochs": 1, "guide__fit__folder": str(tmp_path / "kept")}
    weight = {"start": 0, "until": 0.5} if kind == "guide" else 0
    terms = {"distill__terms": [{"kind": kind, "weight": weight}], **fit}
    for name, options in (("without", {}), ("with", terms)):
        assert main(["train", *tiny(photos_root, tmp_path / name, **options)]) == 0
    assert_same_run(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "kept").exists()


def test_a_wrong_stage_is_told_before_a_teacher_is_fitted(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {key: value for key, value in FULL.items() if key.startswith("teacher__")}
    options |= {"teacher__fit__folder": str(tmp_path / "kept"), "teacher__checkpoint": None}
    options["distill__terms"] = [{**GUIDE, "stages": ["layer1", "layer9"]}]
    said = refused(["train", *guided(photos_root, tmp_path / "run", tmp_path, **options)], capsys)
    assert "the teacher has no stage 'layer9'" in said
    assert not (tmp_path / "kept").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"distill__terms": [GUIDE, GUIDE]}, "distill.terms"),
        ({"distill__terms": [{**GUIDE, "weight": {"start": 1, "from": 0.5, "until": 0.5}}]}, "from 0.5 is not below"),
        ({"distill__terms": [{**GUIDE, "blocks": [0, 2]}]}, "the student has no block 2; use 0 to 1"),
        ({"distill__terms": [{**GUIDE, "grid": 3}]}, "cannot be averaged to one of 3 x 3"),
        ({"distill__terms": [{**GUIDE, "loss": "huber"}]}, "loss does not act on a term of kind guide"),
        ({"distill__terms": [RELATIONS, RELATIONS]}, "relations is there twice"),
        ({"distill__terms": [{**RELATIONS, "normalise": False}]}, "normalise does not act on a term of kind relations"),
        ({"distill__terms": [{**RELATIONS, "temperature": 0}]}, "must be above 0"),
        ({"distill__terms": [{**RELATIONS, "stages": ["layer1", "layer9"]}]}, "the teacher has no stage 'layer9'"),
        ({"distill__terms": [{**RELATIONS, "grid": 1}]}, "fewer than 3 places have no relations to compare"),
        ({"distill__terms": [], "guide__name": "test_resnet"}, "no term of distill.terms compares features"),
        (
            {"teacher__store": "store", "teacher__checkpoint": None, "teacher__name": None},
            "a label store gives answers alone; add an online guide",
        ),
        (
            {
                "distill__terms": [RELATIONS],
                "teacher__store": "store",
                "teacher__checkpoint": None,
                "teacher__name": None,
            },
            "a label store gives answers alone; add an online guide",
        ),
        (
            {"teacher__checkpoint": None, "teacher__name": None, "teacher__members": [{"name": "test_resnet"}]},
            "several teachers give answers alone; add an online guide",
        ),
        ({"student__args": {"patch_drop_rate": 0.5, "depth": 2}}, "drops patches has no maps"),
        ({"distill__kind": "none", "distill__alpha": 1, "distill__terms": []}, "nothing else teaches"),
        (
            {"distill__kind": "none", "distill__alpha": 1},
            "distill.terms: nothing teaches after 0.5 of the run; let a term last, or give the labels a weight",
        ),
        (
            {"distill__terms": [{**GUIDE, "blocks": [0, 0], "stages": ["layer1", "layer1"]}]},
            "blocks.0 and layer1 are compared twice; name each pair once",
        ),
        (
            {"distill__terms": [{**RELATIONS, "blocks": [0, 1, 1], "stages": ["layer1", "layer2", "layer2"]}]},
            "blocks.1 and layer2 are compared twice",
        ),
        (
            {"distill__terms": [{**GUIDE, "weight": {"start": 2.5, "from": 0.25, "until": 0.5}}]},
            "from 0.25 does not act with shape constant",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_writes_nothing(
    options: dict[str, Any],
    line: str,
    photos_root: Path,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert line in refused(["train", *guided(photos_root, tmp_path / "run", teacher, **options)], capsys)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_with_another_guide_is_refused(
    photos_root: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = {"guide__name": "test_resnet", "guide__min_top1": 0, "train__epochs": 2, "distill__kind": "none"}
    arguments = guided(photos_root, tmp_path / "run", teacher, **guide, guide__checkpoint=str(teacher / "seed-0"))
    assert main(["train", *arguments]) == 0
    shutil.rmtree(tmp_path / "run" / "student")
    other = ["--resume", "auto", "--guide.checkpoint", str(teacher / "seed-1")]
    assert "other weights for the guide" in refused(["train", *arguments, *other], capsys)


@given(scale=st.floats(1e-4, 1e4), seed=st.integers(0, 99))
def test_a_network_whose_answers_change_when_it_is_asked_is_refused_at_any_scale(scale: float, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    logits, noise = (torch.randn(2, 10, generator=chance) for _ in range(2))
    answer = StudentOutput(scale * logits)
    _check_same("the student", answer, StudentOutput((scale * logits).bfloat16().float()))
    with pytest.raises(InputError, match="the student answers differently when it is asked for features"):
        _check_same("the student", answer, StudentOutput(scale * (logits + noise)))
