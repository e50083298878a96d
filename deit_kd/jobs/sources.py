"""Where a student comes from: a run, a folder of timm's or transformers', a file of weights, or timm by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
from pydantic import ConfigDict, PositiveInt, with_config
from timm.data import ImageNetInfo, resolve_data_config
from typing_extensions import NotRequired, TypedDict

from deit_kd.config import Config
from deit_kd.distributed import Processes
from deit_kd.files import read_json
from deit_kd.interfaces import InputError
from deit_kd.jobs import parts
from deit_kd.models import (
    STUDENT_FOLDER,
    Pixels,
    Statistics,
    Weights,
    check_known,
    is_distilled_name,
    load_weights,
    saved_config,
)
from deit_kd.places import LOCAL_DIR, check_source
from deit_kd.students import TimmStudent
from deit_kd.tracking import CHECKPOINTS, CONFIG_FILE, HEADS_FILE, read_facts

WORDNET_ID = re.compile(r"n\d{8}")  # how timm calls the classes of its ImageNet models


@with_config(ConfigDict(extra="allow"))
class TransformersConfig(TypedDict):
    """What we read of the ``config.json`` of transformers' DeiT or ViT."""

    patch_size: Pixels
    image_size: Pixels
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    intermediate_size: PositiveInt
    qkv_bias: NotRequired[bool]


class Edges(TypedDict, total=False):
    """A size as transformers writes it: one of these."""

    shortest_edge: Pixels
    height: Pixels


@with_config(ConfigDict(extra="allow"))
class Preprocessor(TypedDict):
    """What we read of a ``preprocessor_config.json``."""

    image_mean: Statistics
    image_std: Statistics
    do_center_crop: NotRequired[bool]
    resample: NotRequired[int]
    crop_size: NotRequired[Pixels | Edges]
    size: NotRequired[Pixels | Edges]


class Source(NamedTuple):
    """A student that was named on the command line, before its weights are read."""

    name: str  # as a person calls it
    recipe: list[str]  # the options that it stands for; what is typed after it overrides them
    classes: tuple[str, ...] | None  # None where only their count is known
    class_count: int | None  # None where only the weights know it
    run: Path | None  # None for anything but a run
    checkpoint: Path | None = None  # of the run, to be read instead of the student that it ended with

    @property
    def facts(self) -> dict[str, Any]:
        """What a run was made from; nothing for another source."""
        return {} if self.run is None else dict(read_facts(self.run))


def open_source(text: str) -> Source:
    """Find out what `text` names: a run or one of its checkpoints, an exported folder, a file, or a timm model.

    Raises:
        InputError: it is none of these, or a run that is not finished.
    """
    path = Path(text.removeprefix(LOCAL_DIR)).expanduser()
    if (path / CONFIG_FILE).is_file():
        return _from_run(path)
    if (path / "config.json").is_file():
        return _from_local_dir(path)
    if path.is_dir():
        raise InputError(f"{text}: is no run (it has no {CONFIG_FILE}) and no exported folder (no config.json)")
    if path.is_file() and path.parent.name == CHECKPOINTS and (path.parent.parent / CONFIG_FILE).is_file():
        run = _from_run(path.parent.parent)
        return run._replace(name=f"{run.name}-{path.stem}", checkpoint=path)
    if path.is_file():
        return _from_file(path)
    check_source(text)
    return _from_timm(text)


def _from_run(folder: Path) -> Source:
    if not (folder / HEADS_FILE).is_file():
        raise InputError(f"{folder}: is no finished run (it has no {HEADS_FILE}); finish it with --resume auto")
    classes = tuple(read_facts(folder)["classes"])
    recipe = ["--config", str(folder / CONFIG_FILE), "--teacher.fit.epochs", "0"]  # it is fitted by now
    return Source(folder.resolve().name, recipe, classes, len(classes), folder)


def _from_local_dir(folder: Path) -> Source:
    saved, weights = saved_config(folder), load_weights("eval", folder)
    if saved.get("model_type") in ("deit", "vit"):
        return _from_transformers(folder, weights)
    if weights.architecture is None:
        raise InputError(f"{folder}: config.json names no timm architecture; export it as a timm local-dir")
    cfg: dict[str, Any] = {
        **saved.get("pretrained_cfg", {}),
        **saved,
    }  # a run writes what it trained with beside timm's defaults
    recipe = [
        *("--student.name", weights.architecture),
        *("--student.checkpoint", str(folder)),
        *("--student.args", json.dumps(weights.build_arguments)),
        *_kind(weights.has_distillation_token),
        *_input_of(cfg),
    ]
    name = folder.resolve().parent.name if folder.name == STUDENT_FOLDER else folder.resolve().name
    return Source(name, recipe, weights.label_names, cfg.get("num_classes"), None)


def _from_transformers(folder: Path, weights: Weights) -> Source:
    seen_file = folder / "preprocessor_config.json"
    if not seen_file.is_file():
        raise InputError(f"{folder}: has no {seen_file.name}, which says how images are seen; save its processor there")
    saved: TransformersConfig = read_json(folder / "config.json", TransformersConfig)
    seen: Preprocessor = read_json(seen_file, Preprocessor)
    distilled = weights.has_distillation_token
    if "head.weight" not in weights.state:
        raise InputError(f"{folder}: its weights have no classifier; name a student that was trained to classify")
    arguments = {
        "patch_size": saved["patch_size"],
        "embed_dim": saved["hidden_size"],
        "depth": saved["num_hidden_layers"],
        "num_heads": saved["num_attention_heads"],
        "mlp_ratio": saved["intermediate_size"] / saved["hidden_size"],
        "qkv_bias": saved.get("qkv_bias", True),
    }
    cfg = {
        "input_size": (3, saved["image_size"], saved["image_size"]),
        "mean": seen["image_mean"],
        "std": seen["image_std"],
        "crop_pct": _edge(seen_file, seen, "crop_size") / _edge(seen_file, seen, "size")
        if seen.get("do_center_crop", False)  # a ViT's processor knows no crop
        else 1.0,
        "interpolation": "bilinear" if seen.get("resample") == 2 else "bicubic",  # as Pillow counts them
    }
    recipe = [
        # Any of timm's names would do, since the arguments say everything.
        *("--student.name", "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"),
        *("--student.checkpoint", str(folder)),
        *("--student.args", json.dumps(arguments)),
        *_kind(distilled),
        *_input_of(cfg),
    ]
    return Source(folder.resolve().name, recipe, weights.label_names, len(weights.state["head.weight"]), None)


def _edge(file: Path, seen: Preprocessor, key: Literal["crop_size", "size"]) -> int:
    size: int | Edges = seen.get(key, Edges())
    edge = size if isinstance(size, int) else size.get("shortest_edge", size.get("height"))
    if edge is None:
        raise InputError(f"{file}: {key} has neither shortest_edge nor height; save its processor anew")
    return edge


def _from_file(file: Path) -> Source:
    weights = load_weights("eval", file)
    heads = [tensor for name, tensor in weights.state.items() if name in ("head.weight", "fc.weight") and tensor.ndim]
    recipe = [*("--student.checkpoint", str(file)), *_kind(weights.has_distillation_token)]
    return Source(file.stem, recipe, None, len(heads[0]) if heads else None, None)


def _from_timm(name: str) -> Source:
    check_known("eval", name)
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise InputError(f"{name}: timm has no weights of it; name a tag that has some, or a run")
    classes = ImageNetInfo("imagenet-1k").label_names() if cfg.num_classes == 1000 else None
    recipe = [*("--student.name", name), *("--student.pretrained", "true"), *_kind(is_distilled_name(name))]
    known = None if classes is None else tuple(classes)
    return Source(name, [*recipe, *_input_of(cfg.to_dict())], known, cfg.num_classes, None)


def _kind(distilled: bool) -> list[str]:
    return ["--distill.kind", "hard" if distilled else "none", "--student.drop_path", "0"]


def _input_of(cfg: dict[str, Any]) -> list[str]:
    seen = resolve_data_config(pretrained_cfg=cfg)
    return [
        *("--data.image_size", str(seen["input_size"][-1])),
        *("--data.mean", json.dumps(list(seen["mean"]))),
        *("--data.std", json.dumps(list(seen["std"]))),
        *("--data.crop_fraction", str(seen["crop_pct"])),
        *("--data.crop_mode", seen["crop_mode"]),
        *("--data.interpolation", seen["interpolation"]),
    ]


def check_classes(source: Source, ours: tuple[str, ...]) -> None:
    """Refuse photos of other classes than the student's, or in another order.

    Raises:
        InputError: with the first class that differs.
    """
    theirs = source.classes
    folders_have_own_names = not any(map(WORDNET_ID.fullmatch, ours))
    if theirs is None or (all(map(WORDNET_ID.fullmatch, theirs)) and folders_have_own_names):
        if source.class_count not in (None, len(ours)):
            raise InputError(
                f"data.root: {source.name} answers in {source.class_count} classes, the data have {len(ours)}; name "
                "photos of its classes"
            )
        return
    for position in range(max(len(theirs), len(ours))):
        there = repr(theirs[position]) if position < len(theirs) else "nothing"
        here = repr(ours[position]) if position < len(ours) else "nothing"
        if there != here:
            raise InputError(
                f"data.root: {source.name} answers in {len(theirs)} classes, the data have {len(ours)}; class "
                f"{position} is {there} there and {here} here. Name photos of the same classes, in this order"
            )


def load_student(source: Source, config: Config, classes: tuple[str, ...], processes: Processes) -> TimmStudent:
    """Return the student of `source` in eval, on its device.

    Raises:
        InputError: its weights cannot be had, or are another model's.
    """
    own = None if source.run is None else str(source.checkpoint or source.run / STUDENT_FOLDER)
    checkpoint = own or config.student.checkpoint
    student = parts.build_student(config, classes, checkpoint=checkpoint)
    account = student.account
    if account is None or account.initialised or account.derived:
        new = "all of it" if account is None else ", ".join([*account.initialised, *account.derived])
        raise InputError(f"{source.name}: has not learned all of the student (new: {new[:120]}); name its own weights")
    return student.to(processes.device).eval()
