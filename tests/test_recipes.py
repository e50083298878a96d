"""The recipes that come with the package: what their headers say is true, and each of them trains."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from typing import Any

import pytest

from deit_kd.cli import main
from deit_kd.config import Config, parse_config
from deit_kd.config.shipped import RECIPES
from deit_kd.runs.opening import open_folder
from deit_kd.runs.photos import build_splits
from deit_kd.teaching.fit import teacher_folder
from deit_kd.teaching.store_identity import identity
from tests.helpers import ONE_PROCESS, REPOSITORY, TINY, as_arguments, heads_in, records, refused, tiny, write_photos

COST = re.compile(  # \S is a multiplication sign
    r"# Cost.*: (?P<epochs>\d+) epochs \S (?P<views>[\d,]+) views \S "
    r"\(3 \S (?P<student>[\d.]+) \+ (?P<teacher>[\d.]+)\) GFLOP / (?P<rate>\d+) TFLOP/s = "
    r"(?P<hours>[\d.]+) GPU-hours\.\n"
    r"# With a label store: (?:(?P<alone>[\d.]+) GPU-hours|the same, since the guide stays online)\. "
    r"Store: (?P<stored>\d+) epochs \S (?P<rows>[\d,]+) views \S (?P<bytes>\d+) bytes = (?P<disk>[\d.]+) GB\.\n"
    r"(?:# Teacher: (?P<fit>\d+) epochs \S (?P<fitted>[\d,]+) views \S 3 \S (?P<net>[\d.]+) GFLOP / (?P<its_rate>\d+) "
    r"TFLOP/s = (?P<fit_hours>[\d.]+) GPU-hours\.\n)?"
)
FAMILY = [name for name, path in RECIPES.items() if "GPU-hours" in path.read_text()]


def recipe(name: str) -> Config:
    return parse_config(["--config", name])[0]


def toy(name: str, root: Path, output: Path) -> list[str]:
    """Return the arguments of a run of a recipe whose networks, photos, steps and precision are tiny."""
    section, is_cnn = recipe(name).teacher, str(recipe(name).student.name).startswith("resnet")
    teacher: dict[str, Any] = {}
    if section.kind == "network":
        teacher |= {"teacher__name": "test_resnet", "teacher__args": {}, "teacher__min_top1": 0}
        teacher |= {"teacher__pretrained": False, "teacher__random_weights": not section.fit.epochs}
    if section.fit.epochs:
        short = {"epochs": 1, "batch_size": 16, "optim__warmup_epochs": 0, "folder": output.parent / "teachers"}
        teacher |= {f"teacher__fit__{key}": value for key, value in short.items()}
    if recipe(name).peers:
        teacher["peers"] = [{"name": "test_resnet"}]
    sizes = {
        "data__name": "folder",
        "data__root": root,
        "data__classes": "null",
        "data__image_size": 32,
        "data__workers": 0,
        "student__pretrained": False,
        **({"student__name": "test_resnet"} if is_cnn else {"student__args": {"patch_size": 8, **TINY}}),
        "optim__warmup_epochs": 0,
        "train__epochs": 1,
        "train__batch_size": 8,
        "train__compile": False,
        "train__device": "cpu",
        "train__precision": '"off"',
        "train__log_every_steps": 1,
        "evaluate__report": False,
        "output": output,
    }
    return ["--config", name, *as_arguments(**teacher, **sizes)]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_at_toy_size(name: str, photos_root: Path, tmp_path: Path) -> None:
    assert main(["train", *toy(name, photos_root, tmp_path / "run")]) == 0
    assert records(tmp_path / "run")[-1]["step"] > 0
    assert heads_in(tmp_path / "run")["n"] > 0


def test_the_family_is_there() -> None:
    imagenet = {"imagenet_tiny", "imagenet_small", "imagenet_base", "imagenet100", "finetune_384"}
    assert imagenet | {"imagenette", "cifar10", "cifar100", "finetune_deit3_small"} <= set(FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_a_header_holds_the_commands_for_one_gpu_and_for_eight(name: str) -> None:
    one, eight, *_ = (line.removeprefix("# ").split() for line in RECIPES[name].read_text().splitlines())
    assert one[:4] == ["python", "train.py", "--config", f"configs/{name}.yaml"]
    assert eight[:6] == ["torchrun", "--nproc-per-node", "8", "train.py", "--config", f"configs/{name}.yaml"]
    for options in (one[2:], eight[4:]):
        chosen = parse_config(options)[0]
        assert chosen.data.root is not None
        assert chosen.train.batch_size == recipe(name).train.batch_size


@pytest.mark.parametrize("name", FAMILY)
def test_a_header_says_what_was_published_and_what_was_measured(name: str) -> None:
    header = RECIPES[name].read_text().partition("\ndata:")[0]
    assert re.search(r"Not yet measured|measured here: \d", header, re.IGNORECASE)
    assert ("Published: " in header) == bool(re.search(r"table \d", header))


@pytest.mark.parametrize("name", FAMILY)
def test_the_cost_of_a_recipe_is_what_its_arithmetic_gives(name: str) -> None:
    found, config = COST.search(RECIPES[name].read_text()), recipe(name)
    assert found is not None, "the header has no arithmetic"
    text = {key: value for key, value in found.groupdict().items() if value is not None}
    of = {key: float(value.replace(",", "")) for key, value in text.items()}
    hours = of["epochs"] * of["views"] / (of["rate"] * 3.6e6)
    assert of["epochs"] == of["stored"] == config.train.epochs
    assert hours * (3 * of["student"] + of["teacher"]) == pytest.approx(of["hours"], rel=0.02)
    assert of["stored"] * of["rows"] * of["bytes"] / 1e9 == pytest.approx(of["disk"], rel=0.03)
    if "alone" in of:
        assert hours * 3 * of["student"] == pytest.approx(of["alone"], rel=0.02)
    assert ("alone" in of) == (not config.distill.needs_features)
    assert ("fit" in of) == bool(config.teacher.fit.epochs)
    if "fit" in of:
        assert of["fit"] == config.teacher.fit.epochs
        spent = of["fit"] * of["fitted"] * 3 * of["net"] / (of["its_rate"] * 3.6e6)
        assert spent == pytest.approx(of["fit_hours"], rel=0.03)


@pytest.mark.parametrize("name", FAMILY)
def test_the_page_of_recipes_repeats_each_header(name: str) -> None:
    page = (REPOSITORY / "docs" / "guide" / "recipes.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    found = COST.search(RECIPES[name].read_text())
    assert found is not None
    assert [cell.strip() for cell in row.split("|")[6:9]] == [
        found["hours"],
        found["alone"] or "",
        f"{found['disk']} GB",
    ]


def test_every_recipe_is_on_the_page_of_recipes() -> None:
    page = (REPOSITORY / "docs" / "guide" / "recipes.md").read_text()
    assert [name for name in RECIPES if f"\n| `{name}` |" not in page] == []


@pytest.mark.parametrize("named", ["imagenet_small", "imagenet_small.yaml", "configs/imagenet_small.yaml"])
def test_a_recipe_is_found_by_its_name_and_by_its_path(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for options in (["--config", named], [f"--config={named}"]):
        assert parse_config(options)[0].student.name == "deit_small_distilled_patch16_224"
        assert parse_config(options)[0].recipe == "imagenet_small"


def test_a_file_comes_before_the_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").write_text("seed: 7\n")
    (tmp_path / "cifar10").mkdir()
    monkeypatch.chdir(tmp_path)
    assert recipe("photos").seed == 7
    assert recipe("cifar10").data.name == "cifar10"


NEITHER = "is neither a file nor a recipe of deit_kd;"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("imagenet_smal", f"{NEITHER} name one (nearest: imagenet_small"),
        ("configs/cifar11.yaml", f"{NEITHER} name one (nearest: cifar10"),
        ("qqq", f"{NEITHER} name one (assistant, "),
        ("elsewhere/photos.yaml", f"{NEITHER} say --config photos"),
        (".", "is a folder; name the recipe file in it"),
    ],
)
def test_a_recipe_that_is_not_there_is_refused_with_the_nearest(
    named: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(["train", "--config", named], capsys).startswith(f"error: config: {named} {said}")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, and the sdist that it was made from."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")  # as pyproject.toml requires
    home = tmp_path_factory.mktemp("dist")
    (home / "source").mkdir()
    for file in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        copy(REPOSITORY / file, home / "source")
    for room in ("configs", "deit_kd"):
        copytree(REPOSITORY / room, home / "source" / room, symlinks=True, ignore=ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(home), str(home / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return home


def test_recipes_are_once_in_the_wheel_and_once_in_the_sdist(built: Path) -> None:
    wheel, sdist = next(built.glob("*.whl")), next(built.glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    recipes = sorted(name for name in names if name.endswith(".yaml"))
    assert recipes == [f"deit_kd/recipes/{name}.yaml" for name in RECIPES]
    assert {"deit_kd/data/class_lists/imagenet100.txt", "deit_kd/templates/report.html.jinja"} <= set(names)
    with tarfile.open(sdist) as opened:
        files = [member for member in opened.getmembers() if member.name.endswith(".yaml")]
        assert sorted(Path(file.name).stem for file in files) == sorted(RECIPES)
        assert all(file.isfile() for file in files)


def test_what_a_wheel_installs_trains_without_the_repository(built: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "PHOTOS", {"train": 4, "val": 2})
    install = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(tmp_path / "site")]
    wheel = str(next(built.glob("*.whl")))
    subprocess.run([sys.executable, "-m", "pip", "install", *install, wheel], check=True, capture_output=True)
    program = "import sys; from deit_kd.cli import main; import deit_kd; print(deit_kd.__file__); sys.exit(main())"
    arguments = ["train", *toy("imagenet_small", tmp_path / "PHOTOS", tmp_path / "run")]
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert heads_in(tmp_path / "run")["n"] == 6


def test_a_path_in_a_recipe_may_begin_with_a_tilde(
    photos_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "map.json").write_text("{}")
    paths = {"teacher__class_map": "~/map.json", "teacher__fit__folder": "~/kept"}
    config = parse_config(tiny(photos_root, Path("~/run"), **paths))[0]
    splits = build_splits(config)
    assert open_folder(config, ONE_PROCESS, None, ())[0] == tmp_path / "run"
    assert teacher_folder(config, splits).parent == tmp_path / "kept"
    assert identity(config, splits)["teacher.class_map"] is not None
