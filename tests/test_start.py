"""Help and plain mistakes are told at once: nothing heavy is loaded before arguments and recipe are read."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from deit_kd.cli import VERBS
from deit_kd.config import Data
from tests.helpers import REPOSITORY

PHOTOS = str(REPOSITORY / "configs" / "photos.yaml")
CPU_SECONDS = 3.0  # a third of a second where this was written; torch and timm alone are five
HEAVY = {"torch", "torchvision", "timm", "scipy", "matplotlib", "sklearn", "tensorboard", "torchmetrics", "numpy"}
PROGRAM = """
import json, sys
from deit_kd.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print("\\n" + json.dumps([code, sorted(sys.modules)]))
"""

ANSWERS = [
    ([], "usage: deit-kd VERB"),
    (["store"], "usage: deit-kd store build"),
    *(([verb, "--help"], "--help") for verb in VERBS if verb not in ("data", "store")),
    (["data", "pack", "--help"], "--quality"),
    (["store", "build", "--help"], "--store"),
]

MISTAKES = [
    (["trian"], "trian: unknown verb"),
    (["store", "bild"], "store bild: unknown"),
    (["train", "--config", PHOTOS, "--distill.knd", "soft"], "distill.knd: unknown key (nearest: distill.kind"),
    (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
    (["train", "--config", PHOTOS, "--data.root", "nowhere"], "data.root: nowhere is not a folder"),
    (["train", "--config", PHOTOS], "data.root: is not set"),
    (["train", "--data.root", ".", "--student.checkpoint", "nowhere"], "student.checkpoint: nowhere is not there"),
    (
        ["train", "--data.root", ".", "--teacher.checkpoint", "no:teacher"],
        "teacher.checkpoint: no is not there",
    ),
    (["train", "--data.root", ".", "--teacher.class_map", "no.csv"], "teacher.class_map: no.csv is not there"),
    (["train", "--data.root", ".", "--teacher.store", "nowhere"], "teacher.store: nowhere is not there"),
    (["bench", "--data.root", "nowhere"], "data.root: nowhere is not a folder"),
    (["store", "build", "--data.root", "nowhere"], "data.root: nowhere is not a folder"),
    (["store", "check", "nowhere", "--data.root", "."], "teacher.store: nowhere is not there"),
    (["store", "info", "nowhere"], "teacher.store: nowhere is not there"),
    (["eval", "runs/nowhere"], "runs/nowhere: is not there"),
    (["eval", "resnet18", "--evaluate.fuson", "logits"], "evaluate.fuson: unknown key (nearest: evaluate.fusion"),
    (["eval", "resnet18", "--data.root", "nowhere"], "data.root: nowhere is not a folder"),
    (["predict", "nowhere", "a.png"], "nowhere: is not a run"),
    (["export", "nowhere", "--format", "onnx"], "nowhere: is not there"),
    (["quantize", "nowhere"], "nowhere: is not there"),
    (["report", "nowhere"], "runs: nowhere is not there"),
    (["plot", "nowhere"], "runs: nowhere is not there"),
    (["data", "check", "nowhere"], "data.root: nowhere is not a folder"),
]


def started(arguments: list[str], folder: Path) -> tuple[int, str, set[str], float]:
    """Run one command in `folder`; return its exit code, what it said, the modules it loaded and its CPU seconds."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=folder, capture_output=True, text=True)
    said, _, last = done.stdout.rstrip().rpartition("\n")
    code, modules = json.loads(last)
    return code, said + done.stderr, set(modules), spent() - before


@pytest.mark.parametrize(
    ("arguments", "expected", "exit_code"),
    [*((*case, 0) for case in ANSWERS), *((*case, 2) for case in MISTAKES)],
    ids=lambda value: " ".join(value)[-50:] if isinstance(value, list) else "",
)
def test_it_answers_without_loading_anything_heavy(
    arguments: list[str], expected: str, exit_code: int, tmp_path: Path
) -> None:
    code, said, modules, seconds = started(arguments, tmp_path)
    assert expected in said
    assert code == exit_code
    assert not modules & HEAVY
    assert seconds < CPU_SECONDS
    assert not list(tmp_path.iterdir())


def test_the_normalisation_that_is_written_out_is_timms() -> None:
    assert (Data().mean, Data().std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_the_package_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "deit_kd", "nonsense"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nonsense: unknown verb")
