"""``deit-kd quantize``: a run's student as integers, and what that costs each of its heads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from deit_kd.asking import Answers, collect
from deit_kd.config import Config, Distill, Guide, TeacherSection, TermSection, as_options
from deit_kd.console import console, say, size_text
from deit_kd.data import Photos
from deit_kd.distributed import Processes
from deit_kd.evaluation.described import described
from deit_kd.evaluation.sources import Source, load_student
from deit_kd.evaluation.speed import images_per_second
from deit_kd.exports import About, CannotHold, Choices, export, missing_libraries
from deit_kd.exports.opened import OpenedModel, open_exported
from deit_kd.files import check_writable, write_json
from deit_kd.interfaces import InputError, StudentOutput, counted
from deit_kd.metrics import compare_heads
from deit_kd.models.integers import BITS, kept_in_float
from deit_kd.origins import recipe_of
from deit_kd.places import TEACHER_OF_RUN
from deit_kd.run_folder import HEADS_FILE, QUANTIZED_FILE, read_facts
from deit_kd.runs import parts
from deit_kd.runs.held_out import check_own_fold
from deit_kd.runs.photos import build_evaluation_loader, build_splits, with_labels
from deit_kd.students import TimmStudent, int8_kernels, open_quantized, save_quantized

CPU = Processes(0, 1, torch.device("cpu"))
ONNX_FOLDER = "onnx"
TRAINING_FOLDER = "run"
OWN_FILES = {QUANTIZED_FILE, "config.json", "README.md", HEADS_FILE, ONNX_FOLDER, TRAINING_FOLDER}
INTEGERS, IN_ONNX = "integers", "onnx int8"


def check_quantize(source: Source, config: Config, bits: int | None, to: str | None) -> tuple[int, Path]:
    """Return the bits and the folder of a quantised student, once it is known that it can be made.

    Args:
        source: the student.
        config: its recipe.
        bits: of the weights; None is what the run was trained for, or 8.
        to: the folder; None is ``RUN/quantized-<bits>``.

    Raises:
        InputError: the source is not a run, the bits are not supported or not those that it was trained for, the
            student has no linear layers, torchao is missing or does not work, or the folder holds a student already.
    """
    if source.run is None:
        raise InputError(f"{source.name}: is neither a run nor a checkpoint of one; name the folder of a run")
    own = config.student.bits
    bits = bits or own or 8
    if bits not in BITS:
        raise InputError(f"--bits: {bits} is not supported; use {' or '.join(map(str, BITS))}")
    if own not in (None, bits):
        raise InputError(f"--bits: {source.name} was trained for {own} bits, not {bits}; use --bits {own}")
    of_checkpoint = "" if source.checkpoint is None else f"-{source.checkpoint.stem}"
    folder = source.run / f"quantized-{bits}{of_checkpoint}" if to is None else Path(to)
    if (folder / HEADS_FILE).is_file():
        raise InputError(f"--to: {folder} already exists; remove it, or name another folder")
    check_writable("--to", folder)
    found = {path.name.removeprefix(".").removesuffix(".partial") for path in folder.glob("*")}
    # What was broken off may be done again.
    if found and not (found <= OWN_FILES and found & {QUANTIZED_FILE, TRAINING_FOLDER}):
        raise InputError(f"--to: {folder} holds something that deit-kd quantize did not write; name another folder")
    int8_kernels()
    _rounded(source, config, bits)
    return bits, folder


def training_options(
    source: Source, config: Config, bits: int, folder: Path, epochs: int, as_before: bool
) -> list[str]:
    """Return the options of quantisation-aware training that follow the run's own recipe.

    It starts from the run's weights, a tenth of its learning rate and no warm-up. The run itself teaches it with soft
    labels, or through its pooled features if it has one head.

    Args:
        source: the run.
        config: its recipe.
        bits: of the weights.
        folder: of the quantised student; the training is a run in it, which resumes.
        epochs: of the training.
        as_before: learn from the recipe's teacher and terms instead.

    Raises:
        InputError: its second head is to learn as before, and has learned from peers alone.
    """
    if as_before and config.learns_from_peers and not config.distill.has_token:
        raise InputError("--recipe_teacher: the recipe has peers and no teacher; leave it out, so that the run teaches")
    run = str(source.checkpoint or source.run)
    options = {
        "student.checkpoint": run,
        "student.pretrained": "false",
        "student.new_heads": "false",
        "student.bits": str(bits),
        "peers": "[]",
        "optim.lr": repr(config.optim.lr / 10),
        "optim.min_lr": repr(config.optim.min_lr / 10),
        "optim.warmup_epochs": "0",
        "train.epochs": str(epochs),
        "train.ema_decay": "null",
        "recipe": f"quantized-{bits}",
        "output": str(folder / TRAINING_FOLDER),
        "resume": "auto",
    }
    typed = [part for key, value in options.items() for part in (f"--{key}", value)]
    return typed + (_same_teacher(source, config) if as_before else _own_teacher(source, config, run))


def _own_teacher(source: Source, config: Config, run: str) -> list[str]:
    has_labels = config.data.unlabelled is None
    distill = Distill(kind="soft", alpha=0.5, temperature=1.0)
    if not source.origin.is_distilled:
        distill = Distill(kind="none", alpha=0.5 if has_labels else 1.0, terms=[TermSection(kind="pooled")])
    elif not has_labels:
        distill = Distill(kind="none", alpha=1.0, terms=[TermSection(kind="soft", temperature=1.0)])
    own = TeacherSection(checkpoint=run, min_top1=0.0)  # the same network on the same photos: nothing to check
    return [*as_options(own, "teacher."), *as_options(Guide(), "guide."), *as_options(distill, "distill.")]


def _same_teacher(source: Source, config: Config) -> list[str]:
    """Return what names the run's own teacher again, where the recipe would fit it once more."""
    assert source.run is not None
    if config.teacher.store is not None:  # a teacher that was fitted is found where it was fitted
        return ["--teacher.fit.epochs", str(recipe_of(source.run).teacher.fit.epochs)]
    taught = read_facts(source.run)["teacher"]
    if taught is None or not config.teacher.name or config.teacher.random_weights:
        return []
    checkpoint = f"{source.run}{TEACHER_OF_RUN}"
    return ["--teacher.checkpoint", checkpoint, "--teacher.pretrained", "false", "--teacher.fit.epochs", "0"]


def quantize(source: Source, config: Config, trained: Source, bits: int, folder: Path) -> None:
    """Write the integers of a student, ask both on the validation photos, time both, and tell what it costs.

    Args:
        source: the run, as it answers in floating point.
        config: its recipe.
        trained: where the weights are that become integers; `source` itself, or the run that was trained for it.
        bits: of the weights.
        folder: where the files go.

    Raises:
        InputError: see `check_quantize`; the photos are of other classes, or none can be read.
    """
    photos = _photos(source, config)
    plain = load_student(source, parts.with_attention(_with_bits(config, None), "auto"), source.classes or (), CPU)
    rounded = _rounded(trained, config, bits)
    about = described(source, config, plain)
    folder.mkdir(parents=True, exist_ok=True)
    save_quantized(rounded, folder, about.for_deployment())
    opened: dict[str, nn.Module] = {INTEGERS: open_quantized(folder).student}
    if bits == 8 and (in_onnx := _in_onnx(trained, config, about, folder / ONNX_FOLDER)) is not None:
        opened[IN_ONNX] = in_onnx
    precision = "off" if config.train.precision == "fp16" else config.train.precision
    before = _answers(plain, photos, config, precision)
    if not len(before.labels):
        raise InputError("data.root: no validation photo can be read; run deit-kd data check")
    costs = {}
    for name, student in opened.items():
        after = _answers(student, photos, config, "off")
        costs[name] = compare_heads(
            before.output, after.output, before.labels, config.evaluate.fusion, seed=config.seed
        )
    heads = _record(before, costs, bits, plain, rounded, folder)
    heads["speed"] = images_per_second({"fp32": plain, **opened}, "fp32", precision, config.data.image_size)
    (folder / "README.md").write_text(_card(about, heads))
    write_json(folder / HEADS_FILE, heads)
    _tell(heads, folder)


def _photos(source: Source, config: Config) -> Photos:
    assert source.run is not None
    splits = build_splits(with_labels(config))
    check_own_fold(source.run, config.data, splits)
    if splits.validation.classes != source.classes:
        raise InputError(f"data.root: has other classes than {source.name}; name photos of its classes")
    return splits.validation


def _rounded(source: Source, config: Config, bits: int) -> TimmStudent:
    """Return the student of `source`, whose linear layers answer as integers of `bits` will."""
    return load_student(source, parts.with_attention(_with_bits(config, bits), "auto"), source.classes or (), CPU)


def _with_bits(config: Config, bits: int | None) -> Config:
    return config.with_keys(student={"bits": bits})


class _InOnnx(nn.Module):
    """An ONNX model as a student."""

    def __init__(self, model: OpenedModel) -> None:
        super().__init__()
        self._model = model

    def forward(self, images: Tensor) -> StudentOutput:
        return self._model.answer(images)


def _in_onnx(source: Source, config: Config, about: About, folder: Path) -> _InOnnx | None:
    missing = missing_libraries("onnx")
    if missing:
        say(f'onnx: left out, since {", ".join(missing)} is missing; pip install "deit-kd[onnx]"')
        return None
    plain = load_student(source, _with_bits(config, None), source.classes or (), CPU)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        export("onnx", plain.backbone, folder, about, Choices(precision="int8"))
    except (CannotHold, InputError) as error:
        say(f"onnx: left out, since its int8 does not hold this student ({error})")
        return None
    return _InOnnx(open_exported(folder / "student.onnx"))


def _answers(student: nn.Module, photos: Photos, config: Config, precision: str) -> Answers:
    batches = build_evaluation_loader(config, photos, CPU, skip=True)
    return collect(student, None, batches, classes=len(photos.classes), processes=CPU, precision=precision)


def _record(
    before: Answers, costs: Mapping[str, Any], bits: int, plain: TimmStudent, rounded: TimmStudent, folder: Path
) -> dict[str, Any]:
    files = {INTEGERS: folder / "quantized.safetensors", IN_ONNX: folder / ONNX_FOLDER / "student.onnx"}
    sizes = {"float": sum(tensor.nbytes for tensor in plain.backbone.state_dict().values())}
    return {
        "n": len(before.labels),
        "weights": "integers",
        "bits": bits,
        "heads": {head: cost["after"] for head, cost in costs[INTEGERS].items()},
        "teacher": None,
        "cost": costs,
        "bytes": sizes | {name: files[name].stat().st_size for name in costs},
        "float": kept_in_float(rounded.backbone),
    }


def _rows(heads: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return what each head loses, a row for each way that it answers."""
    rows: list[tuple[str, ...]] = []
    for name, by_head in heads["cost"].items():
        for head, cost in by_head.items():
            points, nats = cost["intervals"]["top1"], cost["intervals"]["nll"]
            rows.append(
                (
                    name,
                    head,
                    f"{cost['before']['top1']:.2f}",
                    f"{cost['after']['top1']:.2f}",
                    f"{cost['difference']['top1']:+.2f} [{points[0]:+.2f}, {points[1]:+.2f}]",
                    f"{cost['only_before']} : {cost['only_after']}",
                    f"{cost['p']:.3g}",
                    f"{cost['difference']['nll']:+.4f} [{nats[0]:+.4f}, {nats[1]:+.4f}]",
                )
            )
    return rows


LARGEST = 8  # parts in floating point that are printed by name; heads.json names them all
COLUMNS = ("answers by", "head", "float, top-1 %", "top-1 %", "difference [95 %]", "alone right", "p", "NLL [95 %]")


def _lines(heads: Mapping[str, Any]) -> list[str]:
    """Return, in words, the size, the speed, and what is not an integer."""
    sizes, speed = heads["bytes"], heads["speed"]
    numbers = ", ".join(f"{name} {size_text(count)}" for name, count in sizes.items())
    by_size = sorted(heads["float"].items(), key=lambda found: -found[1])
    floats = ", ".join(f"{name} {count}" for name, count in by_size[:LARGEST])
    if others := by_size[LARGEST:]:
        floats += f", and {sum(count for _, count in others)} in {counted(len(others), 'other')}"
    rates = [
        f"{name} {rate['median']:.0f} images/s" + (f" ({_ratio(ratio)})" if name != "fp32" else "")
        for (name, rate), ratio in zip(speed["images_per_second"].items(), speed["over_fp32"].values(), strict=True)
    ]
    return [
        f"size: {numbers}",
        f"speed: {'; '.join(rates)}; {speed['device']}, {counted(speed['threads'], 'thread')}, "
        f"batches of {speed['batch']}",
        f"in floating point: {floats}",
    ]


def _ratio(over_fp32: Mapping[str, float]) -> str:
    return f"{over_fp32['median']:.2f} times fp32, {over_fp32['least']:.2f} to {over_fp32['most']:.2f}"


def _tell(heads: Mapping[str, Any], folder: Path) -> None:
    table = Table(title=f"{heads['n']} validation images, weights of {heads['bits']} bits; paired differences")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    for row in _rows(heads):
        table.add_row(*row)
    console.print(table)
    for line in _lines(heads):
        say(line)
    say(f"quantised student: {folder}   heads: {folder / HEADS_FILE}")


def _card(about: About, heads: Mapping[str, Any]) -> str:
    """Return the model card: that of an export, with what the integers cost."""
    how = '`deit_kd.students.open_quantized("FOLDER").student` answers `images` [B, 3, H, W] with logits of its heads.'
    table = [COLUMNS, ("---",) * len(COLUMNS), *_rows(heads)]
    cost = [f"## Weights of {heads['bits']} bits", "", *(f"| {' | '.join(row)} |" for row in table), ""]
    head, _, rest = about.card("quantized", how).partition("## Classes")
    return "\n".join([head + cost[0], *cost[1:], *(f"- {line}" for line in _lines(heads)), "", f"## Classes{rest}"])
