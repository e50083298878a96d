"""How evaluation brings a photo to a square is timm's to name, and known wherever the square is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform, resolve_data_config

from deit_kd.cli import main
from deit_kd.config import Config, build_parser, differences, parse_config
from deit_kd.evaluation.sources import open_source
from deit_kd.interfaces import InputError, Preprocessing
from deit_kd.runs.photos import build_evaluation_transform
from deit_kd.teaching.store_identity import validation_identity
from deit_kd.views import evaluation_transform
from tests.helpers import MEAN, STD, Finished, evaluated, heads_in, refused, tiny, write_photos
from tests.tiny_parts import array_photos

MODES = ("center", "border", "squash")
PUBLISHED = ["coat_lite_medium_384.in1k", "deit3_small_patch16_224.fb_in1k", "tf_efficientnetv2_s.in21k_ft_in1k"]


def wide() -> Image.Image:
    """Return 60 x 30 pixels that grow brighter to the right."""
    return Image.linear_gradient("L").rotate(90).resize((60, 30)).convert("RGB")


@pytest.mark.parametrize("crop_mode", MODES)
@pytest.mark.parametrize("crop_fraction", [0.8, 1.0])
def test_each_mode_is_timms(crop_mode: str, crop_fraction: float) -> None:
    theirs = create_transform(
        (3, 16, 16), mean=MEAN, std=STD, interpolation="bicubic", crop_pct=crop_fraction, crop_mode=crop_mode
    )
    ours = evaluation_transform(Preprocessing(16, MEAN, STD, "bicubic", crop_fraction, crop_mode))
    torch.testing.assert_close(ours(wide()), theirs(wide()), rtol=0, atol=1e-6)


def test_the_modes_see_a_wide_photo_differently() -> None:
    views = {mode: evaluation_transform(Preprocessing(16, MEAN, STD, "bicubic", 1.0, mode))(wide()) for mode in MODES}
    assert views["border"][:, 0].abs().max() < 0.02  # the mean, rounded to a byte
    ends = {mode: float(view[0, 8, -1] - view[0, 8, 0]) for mode, view in views.items()}
    assert abs(ends["center"]) < 0.6 * abs(ends["squash"])  # which sees both ends of the photo
    assert abs(ends["border"]) > 0.9 * abs(ends["squash"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_scored_on_timms_own_views(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = parse_config(open_source(name).recipe, build_parser("eval"))
    cfg = timm.get_pretrained_cfg(name)
    theirs = create_transform(**resolve_data_config(pretrained_cfg=cfg.to_dict()))
    torch.testing.assert_close(build_evaluation_transform(config)(wide()), theirs(wide()), rtol=0, atol=1e-6)
    assert config.data.crop_mode == cfg.crop_mode
    assert "warning" not in capsys.readouterr().out


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.crop_mode: 'stretch' is unknown; use one of center, border"):
        parse_config(["--data.crop_mode", "stretch"])


@pytest.fixture(scope="module")
def squashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on wide photos that are squashed, and its photos beside it."""
    place = tmp_path_factory.mktemp("squashed")
    root = write_photos(place / "photos", {"train": 4, "validation": 4})
    for path in root.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((image.width * 3, image.height)).save(path)
    options = {"data__crop_mode": "squash", "teacher__name": None, "distill__kind": "none"}
    assert main(["train", *tiny(root, place / "run", **options)]) == 0
    return place / "run"


def test_a_student_is_saved_with_its_mode(squashed: Path) -> None:
    model = timm.create_model(f"local-dir:{squashed / 'student'}", pretrained=True)
    assert resolve_data_config(model=model)["crop_mode"] == "squash"


def score_of(folder: Path) -> Any:
    return heads_in(folder)["heads"]["cls"]


def test_a_run_and_its_saved_student_are_scored_alike(squashed: Path, tmp_path: Path) -> None:
    assert main(["eval", str(squashed)]) == 0
    trained = score_of(squashed)
    assert evaluated(squashed)["heads"]["cls"]["nll"] == pytest.approx(trained["nll"], rel=1e-5)
    photos = ["--data.root", str(squashed.parent / "photos"), "--train.precision", "off"]
    to = ["--train.device", "cpu", "--to", str(tmp_path / "to")]
    assert main(["eval", str(squashed / "student"), *photos, *to]) == 0
    assert score_of(tmp_path / "to")["nll"] == pytest.approx(trained["nll"], rel=1e-5)


def test_the_mode_matters_to_this_student(squashed: Path, tmp_path: Path) -> None:
    assert main(["eval", str(squashed), "--data.crop_mode", "center", "--to", str(tmp_path / "to")]) == 0
    assert score_of(tmp_path / "to")["nll"] != pytest.approx(score_of(squashed)["nll"], rel=1e-5)


def test_a_run_from_before_there_were_modes_goes_on_with_the_centre(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished.folder, tmp_path / "run")
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    del recipe["data"]["crop_mode"]
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["train", *finished.arguments, "--output", str(run), "--resume", "auto"]
    assert main(arguments) == 0
    said = refused([*arguments, "--data.crop_mode", "squash"], capsys)
    assert "data.crop_mode: 'center' in the run, 'squash' here" in said


@pytest.mark.parametrize(("crop_mode", "lines"), [("center", 0), ("squash", 1)])
def test_a_store_from_before_there_were_modes_holds_centres(crop_mode: str, lines: int) -> None:
    photos = array_photos(6)
    stored = validation_identity(Config(), photos)
    assert stored.pop("data.crop_mode") == "center"
    here = validation_identity(Config(data={"crop_mode": crop_mode}), photos)
    assert len(differences(stored, here, "in the store")) == lines
