"""Students in integers: rounded while they train, converted afterwards, and what each head loses."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deit_kd.cli import main
from deit_kd.config import Config, build_parser, parse_config
from deit_kd.evaluation.sources import load_student, open_source
from deit_kd.exports import missing_libraries
from deit_kd.interfaces import StudentOutput
from deit_kd.jobs.quantize import _lines, training_options
from deit_kd.metrics import compare_heads
from deit_kd.models.integers import RoundedLinear, kept_in_float, rounded_linears, to_integers
from deit_kd.students import TimmStudent, open_quantized, save_quantized
from deit_kd.students.quantized import _packed, _unpacked
from tests.helpers import ONE_PROCESS, STUDENT_ARGS, evaluated, heads_in, records, refused, snapshot, tiny
from tests.started import kill
from tests.tiny_parts import tiny_student

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
needs_onnx = pytest.mark.skipif(bool(missing_libraries("onnx")), reason="needs onnx, onnxscript, onnxruntime")

ABOUT = {
    "architecture": "deit_tiny_distilled_patch16_224",
    "classes": ["bars", "dots", "rings"],
    "image_size": 16,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "crop_fraction": 1.0,
    "crop_mode": "center",
    "fusion": "softmax",
}
LEVIT = {"name": "levit_128s", "image_size": 64, "args": {"embed_dim": [16, 32, 48], "depth": [1, 1, 1]}}
SHARE = {8: 0.03, 4: 0.03}  # of the largest logit: an activation next to a half may be rounded the other way


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned scanned digits, from labels and from a teacher that was fitted to them."""
    home = tmp_path_factory.mktemp("learned")
    options: dict[str, Any] = {
        "data__name": "digits",
        "augment__scale": [0.8, 1.0],
        "augment__horizontal_flip": 0.0,
        "augment__mixup": 0.0,
        "augment__cutmix": 0.0,
        "augment__erasing": 0.0,
        "augment__color_jitter": 0.0,
        "student__args": {**STUDENT_ARGS, "embed_dim": 64},
        "teacher__random_weights": None,
        "teacher__min_top1": 0,
        "teacher__fit__epochs": 2,
        "teacher__fit__folder": str(home / "teachers"),
        "distill__kind": "soft",
        "optim__lr": 4e-3,
        "train__batch_size": 64,
        "train__epochs": 6,
        "train__log_every_steps": 20,
    }
    assert main(["train", *tiny(None, home / "run", **options)]) == 0
    return home / "run"


@pytest.fixture(scope="module")
def before(learned: Path) -> dict[str, bytes]:
    """The files of the digits' run before anything is made of it."""
    return snapshot(learned)


@pytest.fixture(scope="module")
def in_integers(learned: Path, before: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders of the digits' student in 8 and in 4 bits, neither trained for it."""
    home = tmp_path_factory.mktemp("integers")
    for bits in (8, 4):
        options = ["--bits", str(bits), "--epochs", "0", "--to", str(home / str(bits))]
        assert main(["quantize", str(learned), *options]) == 0
    return {bits: home / str(bits) for bits in (8, 4)}


def rounded(bits: int, **options: Any) -> TimmStudent:
    """Return a tiny student with rounded layers and heads that are not all but zero."""
    student = tiny_student(bits=bits, **options)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "head" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return student.eval()


def images(count: int = 8, size: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_rows_become_integers_between_equal_ends() -> None:
    weight = torch.tensor([[0.7, -0.32, 0.05], [0.0, 0.0, 0.0], [-7.0, 1.0, 3.4]])
    integers, scale = to_integers(weight, 4)
    assert integers.tolist() == [[7, -3, 0], [0, 0, 0], [-7, 1, 3]]
    assert scale.flatten().tolist() == pytest.approx([0.1, torch.finfo(torch.float32).eps / 7, 1.0])
    assert to_integers(weight, 8)[0][2].tolist() == [-127, 18, 62]


@pytest.mark.parametrize("width", [1, 2, 15, 16])
def test_integers_of_4_bits_lie_two_in_a_byte(width: int) -> None:
    integers = torch.arange(-8, 8, dtype=torch.int8)[:width].repeat(3, 1)
    packed = _packed(integers)
    assert packed.shape == (3, (width + 1) // 2)
    assert torch.equal(_unpacked(packed, width), integers)


def test_a_gradient_passes_straight_through_to_weights_inputs_and_biases() -> None:
    linear = nn.Linear(6, 4)
    layer = RoundedLinear(linear, 4)
    values = torch.randn(5, 6, requires_grad=True)
    layer(values).sum().backward()
    integers, scale = to_integers(layer.weight, 4)
    assert layer.weight is linear.weight
    assert values.grad is not None
    assert torch.allclose(values.grad, (integers * scale).sum(0).expand(5, 6), atol=1e-6)
    assert torch.allclose(layer.weight.grad, values.detach().sum(0).expand(4, 6), atol=0.05)
    assert torch.equal(layer.bias.grad, torch.full((4,), 5.0))


def test_every_weight_of_a_student_gets_a_gradient_under_bf16() -> None:
    student = rounded(4).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = student(images())
        (output.cls_logits.square().sum() + output.dist_logits.square().sum()).backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []
    assert all(layer.weight.grad.abs().max() > 0 for layer in rounded_linears(student.backbone).values())


def test_the_tensors_of_a_rounded_student_are_those_of_a_plain_one() -> None:
    plain, student = tiny_student(), tiny_student(bits=4)
    assert plain.state_dict().keys() == student.state_dict().keys()
    assert all(torch.equal(tensor, student.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert not torch.allclose(plain.eval()(images())[0], student.eval()(images())[0])


def test_heads_keep_8_bits_and_everything_but_linear_layers_stays_in_floating_point() -> None:
    backbone = tiny_student(bits=4).backbone
    bits = {path: layer.bits for path, layer in rounded_linears(backbone).items()}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = {f"blocks.{block}.{part}": 4 for block in range(2) for part in parts}
    assert bits == {**blocks, "head": 8, "head_dist": 8}
    expected = {"cls_token", "dist_token", "pos_embed", "patch_embed.proj", "blocks.*.norm1", "blocks.*.norm2", "norm"}
    assert kept_in_float(backbone).keys() == {*expected, "biases"}


def test_a_batch_norm_is_named_once_with_all_its_numbers_and_what_it_counts_is_not_in_floating_point() -> None:
    backbone = rounded(8, **LEVIT).backbone
    kept = kept_in_float(backbone)
    assert kept["stem.conv1.bn"] == 3 * backbone.get_submodule("stem.conv1.bn").num_features  # its biases are elsewhere
    integers = sum(layer.weight.numel() for layer in rounded_linears(backbone).values())
    state = backbone.state_dict().values()
    assert sum(kept.values()) + integers == sum(tensor.numel() for tensor in state if tensor.is_floating_point())


def test_of_many_parts_in_floating_point_the_largest_are_printed() -> None:
    speed = {"images_per_second": {}, "over_fp32": {}, "device": "CPU", "threads": 1, "batch": 1}
    heads = {"bytes": {}, "float": {f"part{number}": number for number in range(1, 12)}, "speed": speed}
    largest = ", ".join(f"part{number} {number}" for number in range(11, 3, -1))
    assert _lines(heads)[-1] == f"in floating point: {largest}, and 6 in 3 others"


@needs_torchao
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"name": "vit_tiny_patch16_224"},  # a token is grafted onto it
        {"name": "vit_tiny_patch16_224", "distilled": False},
        {"patches": True},  # a third head, on the patches
        LEVIT,
    ],
    ids=["token", "grafted", "one head", "patches", "no token"],
)
def test_a_rounded_student_answers_as_its_integers_do(tmp_path: Path, bits: int, options: dict[str, Any]) -> None:
    student, size = rounded(bits, **options), options.get("image_size", 16)
    name = student.backbone.pretrained_cfg["architecture"]
    save_quantized(student, tmp_path, {**ABOUT, "architecture": name, "image_size": size})
    opened = open_quantized(tmp_path).student
    with torch.inference_mode():
        ours, theirs = student(images(size=size)).logits, opened(images(size=size)).logits
    assert len(ours) == (3 if "patches" in options else 1 if options.get("distilled") is False else 2)
    assert ours.keys() == theirs.keys()
    for head, logits in ours.items():
        assert (logits - theirs[head]).abs().max() <= SHARE[bits] * logits.abs().max(), head


@needs_torchao
def test_8_bits_are_those_of_torchaos_own_quantisation(tmp_path: Path) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    save_quantized(rounded(8), tmp_path, ABOUT)
    plain = tiny_student().eval()
    plain.load_state_dict(rounded(8).state_dict())
    quantize_(plain.backbone, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    with torch.inference_mode():
        ours, theirs = open_quantized(tmp_path).student(images()), plain(images())
    assert (ours.cls_logits - theirs.cls_logits).abs().max() <= SHARE[8] * theirs.cls_logits.abs().max()


def test_what_heads_lose_is_counted_photo_by_photo() -> None:
    before = StudentOutput(torch.tensor([[2.0, 0], [2, 0], [0, 2], [0, 2]]), torch.tensor([[0.0, 1]] * 4))
    after = before._replace(
        cls_logits=before.cls_logits.flip(1).index_copy(0, torch.tensor([3]), torch.tensor([[0, 2.0]]))
    )
    found = compare_heads(before, after, torch.tensor([0, 0, 0, 1]), "softmax", seed=0)
    assert (found["cls"]["before"]["top1"], found["cls"]["after"]["top1"]) == (75.0, 50.0)
    assert (found["cls"]["only_before"], found["cls"]["only_after"]) == (2, 1)
    assert found["cls"]["difference"] == pytest.approx({"top1": -25.0, "nll": 0.5})
    assert found["cls"]["intervals"]["top1"][0] < -25 < found["cls"]["intervals"]["top1"][1]
    assert found["dist"]["difference"] == {"top1": 0.0, "nll": 0.0}
    assert found["dist"]["intervals"] == {"top1": [0.0, 0.0], "nll": [0.0, 0.0]}


@needs_torchao
def test_the_float_run_is_not_touched_and_is_what_is_compared_with(
    learned: Path, in_integers: dict[int, Path], before: dict[str, bytes]
) -> None:
    assert snapshot(learned) == before
    trained = heads_in(learned)["heads"]
    for head, cost in heads_in(in_integers[8])["cost"]["integers"].items():
        assert cost["before"] == pytest.approx({key: trained[head][key] for key in cost["before"]}, abs=1e-4)


@needs_torchao
def test_every_head_in_8_bits_is_close_to_floating_point_and_smaller(in_integers: dict[int, Path]) -> None:
    heads = heads_in(in_integers[8])
    assert heads["cost"]["integers"].keys() == {"cls", "dist", "fused"} == heads["heads"].keys()
    assert heads["heads"]["cls"]["top1"] > 70
    for cost in heads["cost"]["integers"].values():
        assert abs(cost["difference"]["top1"]) < 2
        assert abs(cost["difference"]["nll"]) < 0.02
    four = heads_in(in_integers[4])
    assert (
        four["cost"]["integers"]["fused"]["difference"]["nll"]
        != heads["cost"]["integers"]["fused"]["difference"]["nll"]
    )
    assert four["bytes"]["integers"] < heads["bytes"]["integers"] < heads["bytes"]["float"] / 2
    file = in_integers[8] / "quantized.safetensors"
    assert heads["bytes"]["integers"] == file.stat().st_size
    dtypes = {name: tensor.dtype for name, tensor in load_file(file).items()}
    assert dtypes["blocks.0.mlp.fc1.weight"] is torch.int8
    assert dtypes["patch_embed.proj.weight"] is torch.float32


@needs_torchao
def test_what_was_measured_is_told(in_integers: dict[int, Path]) -> None:
    heads, card = heads_in(in_integers[8]), (in_integers[8] / "README.md").read_text()
    speed = heads["speed"]
    assert speed["over_fp32"]["integers"]["least"] <= speed["over_fp32"]["integers"]["most"]
    assert speed["images_per_second"]["integers"]["median"] > 0
    assert speed["device"] in card
    assert card.count("| integers | ") == 3
    assert ", cls_token 64, " in card
    assert card.index("## Weights of 8 bits") < card.index("## Classes") < card.index("## Recipe")


@needs_torchao
def test_a_clean_process_opens_the_integers_and_gives_the_same_logits(
    in_integers: dict[int, Path], tmp_path: Path
) -> None:
    script = (
        "import sys, torch\n"
        "from safetensors.torch import load_file, save_file\n"
        "from deit_kd.students import open_quantized\n"
        "images = load_file(sys.argv[1])['images']\n"
        "with torch.inference_mode():\n"
        "    for bits, folder in zip((8, 4), sys.argv[3:]):\n"
        "        output = open_quantized(folder).student(images)\n"
        "        save_file(output.logits, f'{sys.argv[2]}/{bits}')\n"
    )
    save_file({"images": images()}, tmp_path / "images")
    arguments = [tmp_path / "images", tmp_path, in_integers[8], in_integers[4]]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, timeout=250)
    for bits in (8, 4):
        found = load_file(tmp_path / str(bits))
        with torch.inference_mode():
            output = open_quantized(in_integers[bits]).student(images())
        assert torch.equal(found["cls"], output.cls_logits)
        assert torch.equal(found["dist"], output.dist_logits)


@needs_torchao
def test_a_folder_of_integers_predicts_and_is_not_scored_as_weights(
    in_integers: dict[int, Path], photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = str(photos_root / "train" / "bars" / "000.png")
    assert main(["predict", str(in_integers[4]), photo, "--head", "all", "--csv", str(tmp_path / "table.csv")]) == 0
    rows = [line.split(",") for line in (tmp_path / "table.csv").read_text().splitlines()[1:]]
    assert [row[1] for row in rows] == ["cls", "dist", "fused"]
    assert {row[2] for row in rows} <= set(map(str, range(10)))
    teaching = {"teacher__name": None, "teacher__random_weights": None}
    for arguments in (["eval"], ["train", *tiny(photos_root, tmp_path / "next", **teaching), "--teacher.checkpoint"]):
        assert "holds integers" in refused([*arguments, str(in_integers[4])], capsys)


@needs_torchao
@needs_onnx
def test_onnx_in_int8_is_scored_beside_it(in_integers: dict[int, Path], learned: Path, tmp_path: Path) -> None:
    heads = heads_in(in_integers[8])
    assert heads["cost"].keys() == heads["speed"]["over_fp32"].keys() - {"fp32"} == {"integers", "onnx int8"}
    assert abs(heads["cost"]["onnx int8"]["fused"]["difference"]["top1"]) < 2
    assert heads["bytes"]["onnx int8"] < heads["bytes"]["float"] / 1.3  # a graph this small is mostly nodes
    assert "onnx int8" not in heads_in(in_integers[4])["cost"]
    options = ["--format", "onnx", "--precision", "int8", "--to", str(tmp_path / "int8")]
    assert main(["export", str(learned), *options]) == 0
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["precision"] == "int8"
    assert (tmp_path / "int8" / "student.onnx").read_bytes() == (in_integers[8] / "onnx" / "student.onnx").read_bytes()


@needs_torchao
def test_training_for_4_bits_starts_from_the_run_learns_from_it_and_recovers(
    learned: Path, in_integers: dict[int, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(learned), "--bits", "4", "--epochs", "2", "--to", str(out)]) == 0
    config = open_source(str(out / "run")).own_config()
    assert (config.student.bits, config.student.checkpoint) == (4, str(learned))
    assert (config.teacher.checkpoint, config.teacher.fit.epochs) == (str(learned), 0)
    assert (config.train.epochs, config.optim.lr) == (2, pytest.approx(4e-4))
    assert json.loads((out / "run" / "run.json").read_text())["student"]["source"] == str(learned)
    nll = [heads_in(folder)["cost"]["integers"]["fused"]["difference"]["nll"] for folder in (in_integers[4], out)]
    assert nll[1] < nll[0]
    saved = load_file(out / "run" / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert saved.keys() == load_file(learned / "student" / "model.safetensors").keys()
    integers, _ = to_integers(saved["blocks.1.mlp.fc2.weight"], 4)
    assert torch.equal(_unpacked(load_file(out / "quantized.safetensors")["blocks.1.mlp.fc2.weight"], 256), integers)


@needs_torchao
def test_a_student_with_one_head_is_quantised_and_trained_too(runs: Path, tmp_path: Path) -> None:
    options = ["--bits", "4", "--epochs", "1", "--to", str(tmp_path / "out")]
    assert main(["quantize", str(runs / "plain"), *options]) == 0
    assert heads_in(tmp_path / "out")["cost"]["integers"].keys() == {"cls"}
    assert [term.kind for term in open_source(str(tmp_path / "out" / "run")).own_config().distill.terms] == ["pooled"]


@needs_torchao
def test_the_recipes_own_teacher_can_teach_instead(learned: Path, tmp_path: Path) -> None:
    options = ["--bits", "4", "--epochs", "1", "--recipe_teacher", "true", "--to", str(tmp_path / "out")]
    assert main(["quantize", str(learned), *options]) == 0
    config = open_source(str(tmp_path / "out" / "run")).own_config()
    assert (config.teacher.checkpoint, config.distill.alpha) == (f"{learned}:teacher", 0.5)
    assert config.distill.temperature == 3.0


@pytest.fixture(scope="module")
def of_4_bits(photos_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that trains for 4 bits from the start, and its options."""
    home = tmp_path_factory.mktemp("of_4_bits")
    options = {"student__bits": 4, "student__drop_path": 0.2, "train__epochs": 2, "train__ema_decay": 0.5}
    options |= {"train__checkpoint_every_steps": 1}
    assert main(["train", *tiny(photos_root, home / "run", **options)]) == 0
    return home / "run", tiny(photos_root, home / "killed", **options)


def test_a_killed_run_of_4_bits_ends_bit_for_bit(of_4_bits: tuple[Path, list[str]], tmp_path: Path) -> None:
    whole, arguments = of_4_bits
    kill(arguments, 8, tmp_path / "said.txt")
    assert main(["train", *arguments, "--resume", "auto"]) == 0
    killed = whole.parent / "killed"
    assert records(killed) == records(whole)
    for file in ("student/model.safetensors", "student/config.json", "heads.json"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_run_of_4_bits_is_scored_rounded_by_whatever_name(of_4_bits: tuple[Path, list[str]], tmp_path: Path) -> None:
    run, _ = of_4_bits
    assert main(["eval", str(run)]) == 0
    assert evaluated(run)["heads"]["cls"]["nll"] == pytest.approx(heads_in(run)["heads"]["cls"]["nll"], abs=1e-5)
    shutil.copytree(run / "student", tmp_path / "student")
    for place in (run / "student", tmp_path / "student"):
        source = open_source(str(place))
        config = source.own_config()
        student = load_student(source, config, source.classes or (), ONE_PROCESS)
        assert len(rounded_linears(student.backbone)) == 10


@pytest.mark.parametrize("name", ["export", "teacher", "eight", "float"])
def test_what_a_run_of_4_bits_cannot_do_is_refused(
    of_4_bits: tuple[Path, list[str]], photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run, _ = of_4_bits
    teaching = {"teacher__name": None, "teacher__random_weights": None, "teacher__checkpoint": run}
    arguments, reason = {
        "export": (["export", str(run), "--format", "timm"], "answers through integers of 4 bits"),
        "teacher": (["train", *tiny(photos_root, tmp_path / "next", **teaching)], "a teacher here does not"),
        "eight": (["quantize", str(run), "--bits", "8"], "was trained for 4 bits, not 8; use --bits 4"),
        "float": (["train", *tiny(photos_root, run, train__epochs=2, resume="auto")], "student.bits: 4 in the run"),
    }[name]
    assert reason in refused(arguments, capsys)
    assert not (tmp_path / "next").exists()


REFUSED = {
    "3 bits": (["--bits", "3"], "--bits: 3 is not supported; use 8 or 4"),
    "epochs": (["--bits", "8", "--epochs", "-1"], "--epochs: -1 is below 0; 0 does not train"),
    "bits of the recipe": (["--student.bits", "3"], "student.bits: '3'"),
    "no such option": (["--bit", "4"], "bit: unknown key"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_cannot_work_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    options, reason = REFUSED[name]
    if name == "epochs" and importlib.util.find_spec("torchao") is None:
        pytest.skip("needs torchao")
    before = snapshot(runs / "distilled")
    assert reason in refused(["quantize", str(runs / "distilled"), *options], capsys)
    assert snapshot(runs / "distilled") == before


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not there; name the folder of a run" in refused(["quantize", str(tmp_path / "x")], capsys)
    assert "the first argument names a run" in refused(["quantize", "--bits", "8"], capsys)
    save_file({"head.weight": torch.zeros(3, 8)}, tmp_path / "weights.safetensors")
    assert "is neither a run nor" in refused(["quantize", str(tmp_path / "weights.safetensors")], capsys)


@pytest.mark.parametrize("place", ["onnx/model.onnx", "README.md", "student/config.json"])
def test_a_folder_of_others_is_left_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("mine")
    before = snapshot(tmp_path)
    line = refused(["quantize", str(runs / "distilled"), "--to", str(tmp_path)], capsys)
    assert "holds something that deit-kd quantize did not write" in line
    assert snapshot(tmp_path) == before


@needs_torchao
def test_a_run_of_4_bits_is_compared_with_its_weights_in_floating_point(
    of_4_bits: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run, _ = of_4_bits
    assert main(["quantize", str(run), "--to", str(tmp_path / "integers")]) == 0
    costs = heads_in(tmp_path / "integers")["cost"]["integers"]
    for head, scores in heads_in(run)["heads"].items():
        assert scores is None or costs[head]["before"]["nll"] != pytest.approx(scores["nll"], abs=1e-6), head


def test_training_for_4_bits_begins_and_ends_at_a_tenth_of_the_learning_rate(photos_root: Path, tmp_path: Path) -> None:
    flat = {"optim__lr": 1e-4, "optim__min_lr": 1e-4}
    assert main(["train", *tiny(photos_root, tmp_path / "run", **flat)]) == 0
    learning = learning_from(tmp_path / "run")
    assert (learning.optim.lr, learning.optim.min_lr) == (pytest.approx(1e-5), pytest.approx(1e-5))


def test_without_labels_the_run_alone_teaches_its_integers(photos_root: Path, tmp_path: Path) -> None:
    unlabelled = {"data__unlabelled": photos_root / "train", "distill__kind": "none", "distill__alpha": 1}
    terms = [{"kind": "soft"}]
    assert main(["train", *tiny(photos_root, tmp_path / "run", **unlabelled, distill__terms=terms)]) == 0
    learning = learning_from(tmp_path / "run")
    assert (learning.distill.kind, learning.distill.alpha) == ("none", 1)
    assert [term.kind for term in learning.distill.terms] == ["soft"]


def learning_from(run: Path) -> Config:
    """Return the recipe of training for 4 bits."""
    source = open_source(str(run))
    options = training_options(source, source.own_config(), 4, run / "quantized-4", epochs=1, as_before=False)
    return parse_config([*source.recipe, *options], build_parser("deit-kd quantize"))[0]


@needs_torchao
@needs_onnx
def test_an_onnx_model_that_int8_cannot_hold_is_left_out(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "distilled", run)
    weights = load_file(run / "student" / "model.safetensors")
    weights["norm.weight"][0] = 200  # one channel takes all of the 8 bits
    for head in ("head", "head_dist"):
        weights[f"{head}.weight"].normal_(generator=torch.Generator().manual_seed(1)).mul_(40)[:, 0] = 0
    save_file(weights, run / "student" / "model.safetensors")
    assert main(["quantize", str(run), "--to", str(tmp_path / "integers")]) == 0
    assert "onnx: left out, since its int8 does not hold this student" in capsys.readouterr().out
    assert heads_in(tmp_path / "integers")["cost"].keys() == {"integers"}
    assert not (tmp_path / "integers" / "onnx").exists()


@needs_torchao
def test_a_folder_that_holds_a_student_and_a_network_of_convolutions_are_refused(
    learned: Path, in_integers: dict[int, Path], photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["quantize", str(learned), "--bits", "4", "--to", str(in_integers[4])]
    assert "4 already exists; remove it" in refused(again, capsys)
    cnn = {"student__name": "test_resnet", "student__args": None, "distill__kind": "none", "student__bits": 8}
    assert "has no linear layers but its heads" in refused(
        ["train", *tiny(photos_root, tmp_path / "cnn", **cnn)], capsys
    )


@needs_torchao
@pytest.mark.parametrize("spoil", ["layers", "lost", "cut", "shape"])
def test_a_spoiled_folder_is_refused(
    in_integers: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: str
) -> None:
    shutil.copytree(in_integers[8], tmp_path / "spoiled")
    file, config = tmp_path / "spoiled" / "quantized.safetensors", tmp_path / "spoiled" / "config.json"
    state, facts = load_file(file), json.loads(config.read_text())
    if spoil == "layers":
        facts["layers"]["blocks.9.mlp.fc1"] = 8
    elif spoil == "lost":
        del state["blocks.0.norm1.weight"]
    elif spoil == "shape":
        state["head.weight"] = state["head.weight"][:, :-1].contiguous()
    config.write_text(json.dumps(facts))
    save_file(state, file)
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    said = refused(["predict", str(tmp_path / "spoiled"), "a.png"], capsys)
    assert "cannot be read" in said if spoil == "cut" else "do not fit its description" in said


def test_a_missing_torchao_is_named_with_its_extra(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    said = refused(["quantize", str(runs / "distilled")], capsys)
    assert said == 'error: quantize: needs torchao; pip install "deit-kd[quantize]"'


def test_a_torchao_that_does_not_fit_torch_is_said_in_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("raise ImportError('undefined symbol: aoti\\nand more')")
    (tmp_path / "torchao-0.1.dist-info").mkdir()
    (tmp_path / "torchao-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.1")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    reason = f"torchao 0.1 does not work with torch {torch.__version__} here (undefined symbol: aoti); install"
    assert reason in refused(["quantize", str(runs / "distilled")], capsys)
