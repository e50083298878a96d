"""The table in docs/export.md, cell by cell: a student answers the same when read again, or is refused."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import timm
import torch

from deit_kd import InputError
from deit_kd.exports import FORMATS, About, CannotHold, export, missing_libraries, read_again, write
from deit_kd.exports.compare import TOLERANCE
from deit_kd.exports.formats import AllHeads
from deit_kd.models import create_model

TABLE = Path(__file__).parent.parent / "docs" / "export.md"
CLASSES = tuple("abcde")
TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}

# row of the table: timm name, arguments beside TINY, image size; all but the last two have a distillation token
STUDENTS = {
    "deit_*_distilled": ("deit_tiny_distilled_patch16_224", {}, 32),
    "pit_*_distilled": ("pit_ti_distilled_224", None, 64),
    "vit_*, deit_* (token pooling)": ("vit_tiny_patch16_224", {"patch_size": 8, "mlp_ratio": 2.0}, 32),
    "deit3_* (layer scale, no_embed_class)": ("deit3_small_patch16_224", {}, 32),
    "DINOv2 without registers": ("vit_small_patch14_dinov2", {}, 28),
    "norm before the blocks (pre_norm)": ("vit_tiny_patch16_224", {"pre_norm": True}, 32),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, 28),
    "average pooling": ("vit_tiny_patch16_224", {"global_pool": "avg"}, 32),
    "SwiGLU": ("vit_giant_patch14_dinov2", {}, 28),
    "eva, rotary positions (EVA-02, DINOv3)": ("vit_small_patch16_dinov3", {}, 32),
    "CLIP (pre_norm, epsilon 1e-5)": ("vit_base_patch16_clip_224", {}, 32),
    "without a distillation token (distill.kind: none)": ("test_resnet", None, 32),
    "pit_* without a distillation token": ("pit_ti_224", None, 64),
}


def arguments(row):
    _, extra, _ = STUDENTS[row]
    if extra is None:
        small = {"base_dims": (16, 16, 16), "depth": (1, 1, 1), "heads": (1, 1, 1)}
        return small if row.startswith("pit") else {}
    return {**TINY, **extra}


def student(row):
    name, _, size = STUDENTS[row]
    torch.manual_seed(0)
    model = create_model(
        "student.name",
        name,
        image_size=size,
        distillation_token="without a distillation" not in row,
        num_classes=5,
        **arguments(row),
    ).eval()
    with torch.no_grad():  # what starts at 0 or 1 would hide that it was lost
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "token" in parameter_name or parameter_name.startswith("head"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def about(row, fusion="softmax"):
    name, _, size = STUDENTS[row]
    head = {"top1": 90.0, "top5": None, "nll": 0.5}
    return About(
        architecture=name,
        model_args=arguments(row),
        classes=CLASSES,
        image_size=size,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        interpolation="bicubic",
        crop_fraction=0.9,
        fusion=fusion,
        heads={"n": 10, "weights": "ema", "heads": {"cls": head, "dist": head, "fused": head}, "teacher": head},
        teacher={"name": "resnet50.a1_in1k", "origin": "timm's resnet50.a1_in1k", "licence": "apache-2.0"},
        data="folder",
        recipe="seed: 0",
    )


def table():
    """Return ``{(row, format): reason or None}`` of docs/export.md."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header = [re.sub("`", "", cell) for cell in cells[0]]
    return {
        (row[0], header[column]): None if row[column] == "yes" else row[column].removeprefix("no: ")
        for row in cells[2:]
        for column in range(1, len(header))
    }


def test_table_has_a_row_for_every_student_and_a_column_for_every_format():
    assert set(table()) == {(row, name) for row in STUDENTS for name in FORMATS}


@pytest.mark.parametrize(("row", "name"), [pair for pair, reason in table().items() if reason is not None])
def test_format_that_cannot_hold_a_student_is_refused_with_the_tables_reason(tmp_path, row, name):
    with pytest.raises(CannotHold, match=re.escape(table()[row, name])):
        write(name, student(row), tmp_path / "out", about(row))


@pytest.mark.parametrize("name", FORMATS)
def test_every_student_that_a_format_holds_answers_the_same_when_read_again(tmp_path, name):
    """In one clean process for all of them; timm's and transformers' forward is a mean, so heads are compared apart."""
    if missing := missing_libraries(name):
        pytest.skip(f"needs {', '.join(missing)}")
    rows = [row for (row, column), reason in table().items() if column == name and reason is None]
    fusions = itertools.cycle(("softmax", "logits"))
    written = [(tmp_path / str(number), student(row), about(row, next(fusions))) for number, row in enumerate(rows)]
    for folder, model, said in written:
        write(name, model, folder, said)
    distances = dict(zip(rows, read_again(name, written), strict=True))
    assert all(distance <= TOLERANCE for distance in distances.values()), distances


def test_other_weights_are_found_out(tmp_path):
    row = "deit_*_distilled"
    write("timm", student(row), tmp_path / "out", about(row))
    other = student(row)
    with torch.no_grad():
        other.head_dist.bias[2] += 0.01
    assert read_again("timm", [(tmp_path / "out", other, about(row))])[0] > TOLERANCE


def test_nothing_is_left_of_an_export_that_differs(tmp_path, monkeypatch):
    monkeypatch.setattr("deit_kd.exports.compare.read_again", lambda *_: [1e-3])
    row = "deit_*_distilled"
    with pytest.raises(InputError, match="answers differently when read again"):
        export("timm", student(row), tmp_path / "out", about(row))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_export_that_cannot_be_read(tmp_path, monkeypatch):
    broken = FORMATS["torch-export"].__class__(FORMATS["torch-export"].write, "", "def read(folder, images): 1 / 0")
    monkeypatch.setitem(FORMATS, "torch-export", broken)
    row = "deit_*_distilled"
    with pytest.raises(InputError, match="ZeroDivisionError"):
        export("torch-export", student(row), tmp_path / "out", about(row))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "local-dir"])
def test_reader_needs_nothing_of_ours(name):
    assert "deit_kd" not in FORMATS[name].reader


def test_plain_timm_fails_loudly_on_a_grafted_local_dir(tmp_path):
    row = "registers"
    write("local-dir", student(row), tmp_path / "out", about(row))
    with pytest.raises(RuntimeError, match="cls_token"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)


def test_outputs_are_cls_dist_and_fused():
    images = torch.randn(2, 3, 32, 32)
    cls_logits, dist_logits, fused = AllHeads(student("deit_*_distilled"), "softmax")(images)
    torch.testing.assert_close(fused, (cls_logits.softmax(-1) + dist_logits.softmax(-1)) / 2)


def test_transformers_preprocessor_is_the_students(tmp_path):
    row = "deit_*_distilled"
    write("transformers", student(row), tmp_path / "out", about(row))
    preprocessor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert preprocessor["image_mean"] == [0.5, 0.5, 0.5]
    assert preprocessor["crop_size"] == {"height": 32, "width": 32}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_norm_eps"] == 1e-6
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c", "3": "d", "4": "e"}


def test_model_card_says_what_it_is(tmp_path):
    row = "deit_*_distilled"
    write("timm", student(row), tmp_path / "out", about(row))
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "resnet50.a1_in1k",
        "licence of the weights: apache-2.0",
        "| fused (softmax) | 90.00 |",
        "4. e",
        "seed: 0",
    ):
        assert fact in card
