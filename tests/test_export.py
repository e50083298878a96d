"""The table in docs/guide/exports.md, cell by cell: a student answers the same when read again, or is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from deit_kd import InputError
from deit_kd.cli import main
from deit_kd.exports import FORMATS, About, CannotHold, Choices, export, missing_libraries, read_again, write
from deit_kd.exports.compare import TOLERANCE
from deit_kd.exports.traced import Answering
from deit_kd.interfaces import Preprocessing
from deit_kd.models.create import create_model
from tests.helpers import refused

TABLE = Path(__file__).parent.parent / "docs" / "guide" / "exports.md"
CLASSES = tuple("abcde")
TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}

# row of the table: timm name, arguments beside TINY, image size; those "without" have no distillation token
STUDENTS = {
    "deit_*_distilled": ("deit_tiny_distilled_patch16_224", {}, 32),
    "pit_*_distilled": ("pit_ti_distilled_224", None, 64),
    "levit_* with two heads": ("levit_128s", None, 64),
    "levit_conv_* with two heads": ("levit_conv_128s", None, 64),
    "levit_* without a distillation head (heads averaged)": ("levit_128s", None, 64),
    "levit_384_s8 (stem of stride 8)": ("levit_384_s8", None, 64),
    "repvit_* with two heads": ("repvit_m0_9", None, 64),
    "vit_*, deit_* (token pooling)": ("vit_tiny_patch16_224", {"patch_size": 8, "mlp_ratio": 2.0}, 32),
    "deit3_* (layer scale, no_embed_class)": ("deit3_small_patch16_224", {}, 32),
    "DINOv2 without registers": ("vit_small_patch14_dinov2", {}, 28),
    "norm before the blocks (pre_norm)": ("vit_tiny_patch16_224", {"pre_norm": True}, 32),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, 28),
    "average pooling": ("vit_tiny_patch16_224", {"global_pool": "avg"}, 32),
    "SwiGLU": ("vit_giant_patch14_dinov2", {}, 28),
    "eva, rotary positions (EVA-02, DINOv3)": ("vit_small_patch16_dinov3", {}, 32),
    "CLIP (pre_norm, epsilon 1e-5)": ("vit_base_patch16_clip_224", {}, 32),
    "CNN without a distillation token (distill.kind: none)": ("test_resnet", None, 32),
    "pit_* without a distillation token": ("pit_ti_224", None, 64),
    "vit_*, deit_* without a distillation token": ("deit_tiny_patch16_224", {}, 32),
    "deit3_* without a distillation token": ("deit3_small_patch16_224", {}, 32),
}


SMALL: dict[str, dict[str, Any]] = {
    "pit": {"base_dims": (16, 16, 16), "depth": (1, 1, 1), "heads": (1, 1, 1)},
    "levit": {"embed_dim": (16, 32, 48), "depth": (1, 1, 1), "num_heads": (2, 2, 2), "key_dim": 8},
    "repvit": {"embed_dim": (8, 16, 24, 32), "depth": (1, 1, 1, 1)},
}


def arguments(row):
    _, extra, _ = STUDENTS[row]
    if extra is None:
        return SMALL.get(row.split("_")[0], {})
    return {**TINY, **extra}


def student(row):
    name, _, size = STUDENTS[row]
    torch.manual_seed(0)
    model = create_model(
        "student.name",
        name,
        image_size=size,
        distilled="without a distillation" not in row,
        num_classes=5,
        **arguments(row),
    ).eval()
    with torch.no_grad():  # what starts at 0 or 1 would hide that it was lost
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 or re.search("token|bias|^head", parameter_name):
                parameter.add_(0.3 * torch.randn_like(parameter))
        for norm in model.modules():
            if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
                norm.running_mean.add_(0.3 * torch.randn_like(norm.running_mean))
                norm.running_var.mul_(0.5 + torch.rand_like(norm.running_var))
    return model


def about(row, fusion="softmax"):
    name, _, size = STUDENTS[row]
    head = {"top1": 90.0, "top5": None, "nll": 0.5}
    return About(
        architecture=name,
        model_args=arguments(row),
        classes=CLASSES,
        preprocessing=Preprocessing(size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", 0.9),
        fusion=fusion,
        heads={"n": 10, "weights": "ema", "heads": {"cls": head, "dist": head, "fused": head}, "teacher": head},
        teacher={"name": "resnet50.a1_in1k", "origin": "timm's resnet50.a1_in1k", "licence": "apache-2.0"},
        data="folder",
        recipe="seed: 0",
    )


def table():
    """Return ``{(row, format): reason or None}`` of docs/guide/exports.md."""
    text = TABLE.read_text()
    lines = text[text.index("| student |") :].partition("\n\n")[0].splitlines()
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
    assert all(distance <= TOLERANCE["fp32"] for distance in distances.values()), distances


@pytest.mark.parametrize(
    ("changed", "size", "reason"),
    [
        ({"act_layer": "silu"}, 64, "its activation is SiLU, in transformers' LeViT Hardswish"),
        ({"attn_act_layer": "gelu"}, 64, "its activation is GELU"),
        ({"embed_dim": (16, 32), "depth": (1, 1), "num_heads": (2, 2)}, 64, "it has 2 stages, transformers' LeViT 3"),
        ({}, (64, 96), "its images are not square"),
        ({"attn_ratio": 1.5}, 64, "its attention or MLP widens by a fraction"),
        ({"mlp_ratio": 1.5}, 64, "its attention or MLP widens by a fraction"),
    ],
)
def test_levit_that_transformers_cannot_build_is_refused_before_anything_is_written(tmp_path, changed, size, reason):
    model = timm.create_model("levit_128s", num_classes=5, img_size=size, **{**SMALL["levit"], **changed})
    with pytest.raises(CannotHold, match=re.escape(reason)):
        write("transformers", model, tmp_path / "out", about("levit_* with two heads"))
    assert not list(tmp_path.iterdir())


def test_other_weights_are_found_out(tmp_path):
    row = "deit_*_distilled"
    write("timm", student(row), tmp_path / "out", about(row))
    other = student(row)
    with torch.no_grad():
        other.head_dist.bias[2] += 0.01
    assert read_again("timm", [(tmp_path / "out", other, about(row))])[0] > TOLERANCE["fp32"]


def test_nothing_is_left_of_an_export_that_differs(tmp_path, monkeypatch):
    off = "right = read\ndef read(*given): return [output + 1e-3 for output in right(*given)]"
    altered = dataclasses.replace(FORMATS["timm"], reader=f"{FORMATS['timm'].reader}\n{off}")
    monkeypatch.setitem(FORMATS, "timm", altered)
    row = "deit_*_distilled"
    with pytest.raises(InputError, match="answers differently when read again"):
        export("timm", student(row), tmp_path / "out", about(row))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_export_that_cannot_be_read(tmp_path, monkeypatch):
    broken = dataclasses.replace(FORMATS["torch-export"], reader="def read(folder, images): 1 / 0")
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
    cls_logits, dist_logits, fused = Answering(student("deit_*_distilled"), "softmax")(images)
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


needs_onnx = pytest.mark.skipif(bool(missing_libraries("onnx")), reason=f"needs {missing_libraries('onnx')}")
DISTILLED = "deit_*_distilled"


def opened(folder):
    """Return an exported model's facts and nodes, and what its file says of the machine that wrote it."""
    import onnx

    file = folder / "student.onnx"
    model = onnx.load(file)
    facts = {one.key: json.loads(one.value) for one in model.metadata_props}
    places = [str(place).encode() for place in (Path(torch.__file__).parents[1], Path(__file__).parents[1])]
    return facts, model, [place for place in places if place in file.read_bytes()]


@needs_onnx
def test_onnx_carries_what_a_deployer_needs_and_nothing_of_the_machine_that_wrote_it(tmp_path):
    said = dataclasses.replace(about(DISTILLED, "logits"), temperature={"cls": 1.5, "dist": 2.0, "fused": 1.25})
    choices = Choices(outputs=("fused", "cls"), opset=20, precision="fp16", dynamic_size=True)
    distance = export("onnx", student(DISTILLED), tmp_path / "out", said, choices)
    assert distance <= TOLERANCE["fp16"]
    facts, model, places = opened(tmp_path / "out")
    assert facts == json.loads((tmp_path / "out" / "config.json").read_text())
    assert facts == {
        "architecture": "deit_tiny_distilled_patch16_224",
        "classes": list(CLASSES),
        "image_size": 32,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bicubic",
        "crop_fraction": 0.9,
        "crop_mode": "center",
        "fusion": "logits",
        "temperature": {"cls": 1.5, "dist": 2.0, "fused": 1.25},
        "heads": ["cls", "dist"],
        "outputs": ["fused", "cls"],
        "precision": "fp16",
        "dynamic_size": True,
        "opset": 20,
    }
    assert [one.name for one in model.graph.output] == ["fused", "cls"]
    assert {known.domain: known.version for known in model.opset_import}[""] == 20
    assert places == []
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_torch_export_carries_its_facts_inside_and_nothing_of_the_machine_that_wrote_it(tmp_path):
    choices = Choices(outputs=("fused",), dynamic_size=True)
    write("torch-export", student(DISTILLED), tmp_path / "out", about(DISTILLED), choices)
    inside = {"config.json": ""}
    torch.export.load(tmp_path / "out" / "student.pt2", extra_files=inside)
    assert json.loads(inside["config.json"]) == json.loads((tmp_path / "out" / "config.json").read_text())
    assert json.loads(inside["config.json"])["outputs"] == ["fused"]
    content = (tmp_path / "out" / "student.pt2").read_bytes()
    assert str(Path(torch.__file__).parents[1]).encode() not in content
    assert str(Path(__file__).parents[1]).encode() not in content


def test_positions_of_one_size_are_refused_for_a_dynamic_size(tmp_path):
    row = "eva, rotary positions (EVA-02, DINOv3)"
    with pytest.raises(CannotHold, match="its position embedding has a fixed size"):
        write("torch-export", student(row), tmp_path / "out", about(row), Choices(dynamic_size=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("timm", ["--outputs", "fused"], "timm has no choice of outputs"),
        ("torch-export", ["--opset", "19"], "torch-export has none"),
        ("onnx", ["--opset", "9"], "use 18 to 23"),
        ("onnx", ["--outputs", "cls", "cls"], "at most once"),
        ("onnx", ["--outputs", "teacher"], "at most once"),
        ("torch-export", ["--outputs", "dist"], "the student has cls"),
    ],
)
@needs_onnx
def test_a_choice_that_makes_no_sense_is_refused(runs, tmp_path, capsys, name, options, reason):
    to = ["--to", str(tmp_path / "out")]
    assert reason in refused(["export", str(runs / "plain"), "--format", name, *to, *options], capsys)
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_an_onnx_model_predicts_what_its_run_does(runs, tmp_path, capsys):
    assert main(["eval", str(runs / "distilled")]) == 0
    assert main(["export", str(runs / "distilled"), "--format", "onnx", "--to", str(tmp_path / "out")]) == 0
    fitted = json.loads((tmp_path / "out" / "config.json").read_text())["temperature"]
    assert fitted.keys() == {"cls", "dist", "fused"}
    photos = sorted(map(str, (runs / "photos" / "validation").rglob("*.png")))[:9]
    tables = []
    for place in (runs / "distilled", tmp_path / "out" / "student.onnx"):
        table = tmp_path / f"{place.stem}.csv"
        assert main(["predict", str(place), *photos, "--head", "all", "--csv", str(table)]) == 0
        tables.append([line.rpartition(",") for line in table.read_text().splitlines()[1:]])
    assert [row[0] for row in tables[0]] == [row[0] for row in tables[1]]
    ours, theirs = ([float(row[2]) for row in table] for table in tables)
    assert ours == pytest.approx(theirs, abs=2e-4)


@needs_onnx
def test_an_onnx_model_that_is_none_of_ours_is_refused(tmp_path, capsys):
    import onnx

    foreign = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    onnx.save(foreign, tmp_path / "foreign.onnx")
    for name in ("broken", "foreign", "absent"):
        assert f"{name}.onnx: " in refused(["predict", str(tmp_path / f"{name}.onnx"), "a.png"], capsys)
