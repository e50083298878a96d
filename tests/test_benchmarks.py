"""The programs behind the figures of docs/, each on a recipe of seconds: what measures must still run."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch

from benchmarks.zoo import same
from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.interfaces import InputError
from tests.helpers import ONE_PROCESS, REPOSITORY, STUDENT, as_arguments, heads_in, tiny

Program = Callable[..., str]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Run a benchmark with arguments; return what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        import_module(name).main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a benchmark."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return import_module


@pytest.fixture
def gpu(benchmark: Callable[[str], Any]) -> Any:
    """The program for a GPU; its sections are ``gpu.SECTIONS``."""
    return benchmark("gpu")


@pytest.fixture
def folds(benchmark: Callable[[str], Any]) -> Any:
    """The program for arms times folds."""
    return benchmark("folds")


def test_growth_prints_four_tables(photos_root: Path, tmp_path: Path, program: Program) -> None:
    found = tmp_path / "growth.json"
    recipe = tiny(photos_root, tmp_path / "run", distill__kind="soft")
    options = ["--rounds", "1", "--sizes", "16", "32", "--models", STUDENT, "--classes", "3", "20"]
    printed = program("growth", *recipe, *options, "--json", str(found))
    assert printed.count("| ms an image |") == 3
    assert "| epochs stored" in printed
    assert json.loads(found.read_text())["image, ms an image"].keys() == {"16 px", "32 px"}


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_against_timm_times_both_sides(
    photos_root: Path, tmp_path: Path, program: Program, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    against_timm = benchmark("against_timm")
    if not torch.cuda.is_available():  # a fork cannot go backward beside it
        monkeypatch.setattr(
            against_timm, "FRESH", multiprocessing.get_context("fork")
        )  # spares both sides their imports
    monkeypatch.setattr(against_timm, "REST_SECONDS", 0.0)
    found = tmp_path / "against.json"
    options = ["--rounds", "1", "--steps", "2", "--json", str(found)]
    recipe = {"augment__mixup": 0, "augment__cutmix": 0, "data__workers": 1}
    program("against_timm", *tiny(photos_root, tmp_path / "run", **recipe), *options)
    measured = json.loads(found.read_text())
    assert len(measured["rates"]) == 5
    assert all(rate > 0 for rates in measured["rates"].values() for rate in rates)
    assert len(measured["ratios"]) == 3


def test_decoders_take_turns(photos_root: Path, program: Program) -> None:
    pytest.importorskip("torchcodec")
    printed = program("decoders", "--root", str(photos_root / "train"), "--photos", "4", "--longer_side", "40")
    rows = [line.split("│")[1:7] for line in printed.splitlines() if "│ image" in line or "│ array" in line]
    assert [row[0].strip() for row in rows] == ["image", "array"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:])


def test_records_of_all_logits_lose_less_than_those_of_one(photos_root: Path, tmp_path: Path, program: Program) -> None:
    printed = program("store_divergence", *tiny(photos_root, tmp_path / "run"))
    rows = {cells[1].strip(): float(cells[3]) for cells in (line.split("|") for line in printed.splitlines()[3:])}
    assert rows.keys() == {"1", "all"}
    assert rows["all"] < 1e-4 < rows["1"]


def test_spans_of_an_average_are_compared_in_one_run(photos_root: Path, tmp_path: Path, program: Program) -> None:
    printed = program("average_span", *tiny(photos_root, tmp_path / "run"), "--shares", "0.5")
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in printed.splitlines() if "%" in line]
    assert [row[:3] for row in rows[-2:]] == [["0 %", "0", "none"], ["50 %", "3", "0.66667"]]
    assert not (tmp_path / "run").exists()


@pytest.fixture
def seeds(runs: Path, tmp_path: Path) -> Path:
    """A folder of two evaluated runs, as they are named for their seeds."""
    for run, name in (("plain", "none-0"), ("distilled", "hard-0")):
        shutil.copytree(runs / run, tmp_path / "seeds" / name)
        assert main(["eval", str(tmp_path / "seeds" / name)]) == 0
    return tmp_path / "seeds"


def test_heads_are_compared_over_seeds(seeds: Path, program: Program) -> None:
    printed = program("compare_heads", str(seeds), "--variants", "hard", "--seeds", "0")
    rows = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines() if "│ hard" in line]
    heads = heads_in(seeds / "hard-0")["heads"]
    assert len(rows) == 4
    for name in ("cls", "dist"):
        assert [row[3] for row in rows if row[2] == name] == [f"{heads[name]['top1']:.1f}"]


def test_answers_are_kept_and_compared(seeds: Path, tmp_path: Path, program: Program) -> None:
    arms = {}
    for name in ("none", "hard"):
        arms[name] = str(shutil.copytree(seeds / f"{name}-0/eval/validation", tmp_path / name))
    file = str(tmp_path / "answers.parquet")
    program("kept_answers", file, "--add", arms["none"])
    program("kept_answers", file, "--add", arms["hard"], arms["none"])  # one of them again
    printed = program("kept_answers", file, "--base", "none")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    heads = heads_in(Path(arms["hard"]))["heads"]
    found = {(arm, head): top1 for arm, head, top1, *_ in rows}
    assert len(found) == len(rows)
    assert found["hard", "dist"] == f"{heads['dist']['top1']:.1f}"
    (plain,) = (row for row in rows if row[:2] == ["none", "cls"])
    assert plain[3:] == ["", "", ""]
    predictions = Path(arms["hard"]) / "predictions.parquet"
    parquet.write_table(parquet.read_table(predictions)[:5], predictions)
    with pytest.raises(InputError, match=r"is of other photos than .*answers.parquet; name another file"):
        program("kept_answers", file, "--add", arms["hard"])
    with pytest.raises(InputError, match=r"--base: 'soft' is not in .*; use one of hard, none"):
        program("kept_answers", file, "--base", "soft")


def test_zoo_judges_the_smallest_model_of_every_family(tmp_path: Path, program: Program) -> None:
    page = tmp_path / "zoo.md"
    printed = program("zoo", "--modules", "convit", "pit", "starnet", "--processes", "1", "--markdown", str(page))
    assert "3 families: nothing wrong, no traceback" in printed
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    assert rows == [
        "| `convit` | ConVit | token, class token | `convit_tiny` | works, grafted | works | works |",
        "| `pit` | PoolingVisionTransformer | token, class token | `pit_ti_224` | works, as `pit_ti_distilled_224` "
        "| works | works |",
        "| `starnet` | StarNet |  | `starnet_s050` | refused [1] | works | works |",
    ]
    assert "1. student.name: the model is a …, which a distillation token cannot be grafted onto" in page.read_text()


def test_zoo_tells_logits_that_differ_from_those_that_are_rounded() -> None:
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert same(logits * (1 + 1e-5), logits)
    assert not same(logits * 1.01, logits)
    assert not same(logits.flip(0), logits)
    assert not same(logits * torch.nan, logits * torch.nan)


def test_fine_tuning_is_compared_with_scratch(runs: Path, tmp_path: Path, program: Program) -> None:
    options = as_arguments(
        data__image_size=16,
        data__workers=0,
        augment__auto_augment="null",
        student__args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
        teacher__name="test_resnet",
        teacher__min_top1=0,
        train__batch_size=4,
        teacher__fit__batch_size=4,
        evaluate__report=False,
    )
    printed = program(
        "finetune", "--root", str(runs / "photos"), "--output", str(tmp_path / "out"),
        *("--epochs", "2", "--teacher-epochs", "1", "--seeds", "0"), *options,
        *("--only", "fine-tuned, guide until 0.5", "fine-tuned, plain", "from scratch, distilled"),
    )  # fmt: skip
    assert "graft: total variation" in printed
    assert len([line for line in printed.splitlines() if line.endswith("% top-1")]) == 3


def test_arms_are_trained_over_folds_and_compared(
    photos_root: Path, tmp_path: Path, program: Program, folds: Any
) -> None:
    arms = tmp_path / "arms.yaml"
    arms.write_text("none: {distill.kind: none}\nsoft: {distill.kind: soft, distill.alpha: 0.9}\n")
    fit: dict[str, Any] = {
        "random_weights": None,
        "min_top1": 0,
        "fit__epochs": 1,
        "fit__batch_size": 8,
        "fit__optim__warmup_epochs": 0,
        "fit__folder": str(tmp_path / "teachers"),
    }
    recipe = tiny(photos_root, tmp_path, **{f"teacher__{key}": value for key, value in fit.items()})
    planned = Namespace(folds=2, only=[1], to=tmp_path / "to")
    jobs = folds.plan(planned, ["--evaluate.report", "false", *recipe], folds.read_arms(arms, None))
    (plain, needed_by_plain), (_, (needed,)) = jobs.items()
    assert needed_by_plain == []
    program("folds", *needed.command[2:])  # here, where all is imported; the last one gets a process of its own
    assert main(["train", *plain.command[2:]]) == 0
    options = ["--arms", str(arms), "--to", str(tmp_path / "to"), "--folds", "2", "--only", "1", *recipe]
    said = program("folds", *options)
    assert said.count("begins: ") == said.count("done: ") == 1
    printed = program("folds", *options)
    assert "begins: " not in printed
    assert "soft: no run of fold 0 of 2" in printed
    heads = heads_in(tmp_path / "to/joined/soft")
    (row, *_) = (row for row in heads["comparisons"] if row["second"] == "none")
    assert f"{row['difference']:+.2f}" in printed
    (teacher,) = (file.parent for file in tmp_path.glob("teachers/*/heads.json"))
    assert json.loads((tmp_path / "to/soft-1/run.json").read_text())["teacher"]["source"] == str(teacher)


@pytest.mark.parametrize("file", ["arms.yaml", "family.yaml"])
def test_the_arms_that_are_given_can_be_planned(file: str, photos_root: Path, tmp_path: Path, folds: Any) -> None:
    arms = folds.read_arms(REPOSITORY / "benchmarks" / file, None)
    common = ["--config", str(REPOSITORY / "configs" / "photos.yaml"), "--data.root", str(photos_root)]
    jobs = folds.plan(Namespace(folds=3, only=[1], to=tmp_path), common, arms)
    assert len(jobs) == len(arms)
    assert len({fit.folder for fits in jobs.values() for fit in fits}) == 1
    terms = {}
    for job, fits in jobs.items():
        config, _ = parse_config(list(job.command[2:]))
        name = job.folder.name.removesuffix("-1")
        terms[name] = [term.kind for term in config.distill.terms]
        untaught = name in ("none", "average", "peers")
        assert [str(fit.folder) for fit in fits] == ([] if untaught else [config.teacher.checkpoint])
    assert terms["none"] == terms["soft"] == terms["standardised"] == []
    assert terms.get("guide-alone", ["guide"]) == ["guide"]


def test_a_guide_is_fitted_before_the_arms_and_named_by_its_fold(photos_root: Path, tmp_path: Path, folds: Any) -> None:
    terms = {"distill.terms": [{"kind": "guide"}]}
    arms = {
        "fitted": {**terms, "guide.name": "resnet10t", "guide.fit.epochs": 2},
        "teacher's": {**terms, "guide.checkpoint": "{teacher}"},
    }
    common = ["--config", str(REPOSITORY / "configs" / "photos.yaml"), "--data.root", str(photos_root)]
    fitted, taken = folds.plan(Namespace(folds=3, only=[2], to=tmp_path), common, arms).items()
    guides = [parse_config(list(job.command[2:]))[0].guide for job, _ in (fitted, taken)]
    assert [guide.checkpoint for guide in guides] == [str(fitted[1][1].folder), str(taken[1][0].folder)]
    assert guides[0].fit.epochs == 0
    with pytest.raises(InputError, match="--arms: plain and same are the same recipe"):
        folds.plan(Namespace(folds=3, only=[2], to=tmp_path), common, {"plain": {}, "same": {"distill.alpha": 0.9}})


def test_a_run_whose_teacher_could_not_be_fitted_is_left_out(
    tmp_path: Path, folds: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = (sys.executable, "-c", "print('error: no photos'); exit(2)")
    fit, plain = (folds.Job(tmp_path / name, tmp_path / f"{name}.log", broken) for name in ("fit", "plain"))
    taught = folds.Job(tmp_path / "taught", tmp_path / "taught.log", ("nothing",))
    assert not folds.work_all({plain: [], taught: [fit]}, at_once=2)
    said = capsys.readouterr().out
    assert f"failed: {plain.folder} (error: no photos; see {plain.log})" in said
    assert f"left out, without its teacher: {taught.folder}" in said


def test_steps_of_arms_are_timed_at_two_places(photos_root: Path, tmp_path: Path, program: Program) -> None:
    guide = {"kind": "guide", "blocks": [0, 1], "stages": ["layer1", "layer2"], "weight": {"start": 1.0, "until": 0.5}}
    recipe = tiny(photos_root, tmp_path / "run", data__image_size=32, distill__kind="soft", distill__terms=[guide])
    arms = tmp_path / "arms.yaml"
    arms.write_text("guide: {}\npeers: {peers: [{name: resnet10t}], distill.kind: none, distill.terms: []}\n")
    said = program("step_times", *recipe, "--arms", str(arms), "--rounds", "2", "--steps", "1")
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith(("| guide", "| peers"))]
    assert [[name.strip(), first.strip()] for name, _, first, *_ in rows if first.strip() == "1"] == [["guide", "1"]]
    assert all(float(rate) > 0 for _, early, _, late, _ in rows for rate in (early, late))
    assert "guide: a step at 0.25 of the run takes" in said
    assert not (tmp_path / "run").exists()


def test_a_gpus_program_measures_every_section_at_toy_size(gpu: Any, tmp_path: Path, program: Program) -> None:
    marked = tmp_path / "test_marked.py"
    marked.write_text("import pytest\n@pytest.mark.gpu\ndef test_one(): pass\ndef test_two(): pass\n")
    marked.write_text(marked.read_text() + "@pytest.mark.gpu\ndef test_three(): assert 0\n")
    printed = program("gpu", "--toy", "--output", str(tmp_path / "out"), "--tests", str(marked))
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    sections = found["sections"]
    assert list(sections) == [*gpu.SECTIONS, "goals"]
    rows = {name: [row for row in section["rows"] if "failed" not in row] for name, section in sections.items()}
    assert not [name for name, section in sections.items() if section.get("failed") or section.get("left_out")]
    assert all(rows.values())
    columns = ("images/s", "floor, ms", "µs a view", "µs an image", "of its floor", "launches")
    figures = [row[column] for table in rows.values() for row in table for column in columns if column in row]
    assert len(figures) > 30
    assert min(figures) > 0
    assert [rows["tests"][0][count] for count in ("passed", "failed tests", "skipped")] == [1, 1, 0]
    assert "test_three" in rows["tests"][0]["which failed"]
    assert len({(row["teacher"], row["executor"], row["cache"]) for row in rows["loops"]}) == 3 * 5
    page = (tmp_path / "out/gpu.md").read_text()
    assert all(f"## {section['title']}" in page for section in sections.values())
    assert len(found["slowest"]) == 3
    assert [line for line in printed.splitlines() if line[:3] in ("1. ", "2. ", "3. ")] == [
        f"{place}. {text}" for place, text in enumerate(found["slowest"], 1)
    ]


def test_a_gpus_program_says_what_it_had_no_time_for(gpu: Any, tmp_path: Path, program: Program) -> None:
    program("gpu", "--toy", "--output", str(tmp_path), "--minutes", "0")
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert all(sections[name]["left_out"] and not sections[name]["rows"] for name in gpu.SECTIONS)
    assert {row["reached"] for row in sections["goals"]["rows"]} == {"not measured"}
    assert "No time was left for: machine." in (tmp_path / "gpu.md").read_text()


def test_a_point_that_fails_or_hangs_leaves_the_others(gpu: Any, tmp_path: Path) -> None:
    def fail() -> list[Any]:
        raise ValueError("no\nkernel")

    points = {"bad": fail, "good": lambda: [{"images/s": 1.0}], "slow": lambda: time.sleep(60), "late": fail}
    setup = gpu.Setup(gpu.TOY, ONE_PROCESS, None, tmp_path, "tests")
    result = gpu.run(gpu.Section("a section", 1, lambda setup: points.items()), setup, seconds=2.0)
    assert result.pop("seconds") < 30
    assert result == {
        "title": "a section",
        "rows": [{"images/s": 1.0}],
        "failed": {"bad": "ValueError: no kernel"},
        "left_out": ["slow", "late"],
    }


def test_goals_and_what_loses_most_follow_from_the_tables(gpu: Any) -> None:
    step = {"student": "DeiT-Ti", "batch": 1024, "floor / step": 0.8, "idle": 0.01}
    step["slowest kernels"] = [{"kernel": "norm", "share": 0.25}]
    loop = {"executor": "device", "cache": "device", "images/s": 19_000, "of the step": 0.9, "idle": 0.1}
    view = {"what": "RandAugment", "µs a view": 10.0, "made by": "Triton"}
    tables = {
        "steps": [{**step, "mode": mode, "images/s": rate} for mode, rate in (("eager", 12_000), ("compiled", 21_000))],
        "loops": [{**loop, "teacher": "stored", "of its floor": 0.9}],
        "views": [view, {**view, "what": "crop and resize", "µs a view": 7.0}],
    }
    assert [row["reached"] for row in gpu.verdict.goals(tables)] == ["yes", "not measured", "yes", "no", "no"]
    losses = gpu.verdict.slowest(tables)
    assert [(loss.what.split(",")[0], round(loss.share, 2)) for loss in losses] == [
        ("view of the executor", 0.5),
        ("step of DeiT-Ti", 0.2),
        ("loop", 0.1),
    ]
    assert "crop and resize (7 µs)" in losses[0].cure
    assert "norm (25%)" in losses[1].cure


def test_a_floor_is_the_longer_of_arithmetic_and_traffic(gpu: Any) -> None:
    card, floor = (import_module(f"on_gpu.{name}") for name in ("card", "floor"))
    matrix, other, rate = torch.ones(10, 10), torch.ones(10, 10), 100.0
    cases = {
        "products": (lambda: matrix @ other, 2000 / rate, 1200 / rate),
        "updates": (lambda: torch._foreach_add_([matrix], 1.0), 0, 800 / rate),
        "others": (lambda: matrix.view(-1).relu_(), 0, 800 / rate),  # the view moves nothing
    }
    for kind, (act, of_flops, of_bytes) in cases.items():
        for measured in (card.Card(rate, rate, 0.0), card.Card(rate, 10 * rate, 0.0)):
            with floor.Floor(measured) as counted:
                act()
            of_flops_now = of_flops * rate / measured.matmul_rate
            assert getattr(counted, kind) == pytest.approx(max(of_flops_now, of_bytes)), kind
            assert counted.unfused_seconds == pytest.approx(getattr(counted, kind))


def test_a_busy_device_counts_overlapping_kernels_once(gpu: Any) -> None:
    profile = import_module("on_gpu.profile")
    assert profile.union([(3, 5), (0, 2), (1, 4), (7, 8), (7, 7.5)]) == 6
    assert profile.idle_share(profile.Profile(0.75, 1, []), 1.0) == 0.25
    assert profile.idle_share(profile.Profile(None, 1, []), 1.0) is None


@pytest.mark.skipif(shutil.which("strace") is None, reason="it counts with strace")
def test_two_machines_of_two_processes_are_stopped_and_one_goes_on() -> None:
    """It fails unless losses are those of one process, and all but the first of a machine leave its photos alone."""
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, str(REPOSITORY / "benchmarks" / "machines.py"), "--machines", "2", "--processes", "2"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the losses are those of one process" in done.stdout
    assert "| any other | 0 |" in done.stdout


def test_signals_prints_a_row_for_each_number_of_processes(program: Program) -> None:
    out = program("signals", "--processes", "2", "4", "--seconds", "0.6")
    assert [line.split()[1] for line in out.splitlines()[2:]] == ["2", "4"]
