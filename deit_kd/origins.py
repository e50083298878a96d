"""Weights by any name that the user gives, with everything that is known about their network.

A run, its teacher (``RUN:teacher``), a file inside a run, a timm local-dir, a transformers folder, a file of weights
and a timm pretrained tag are opened here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from deit_kd.config import Config, recorded_recipe
from deit_kd.files import read_json
from deit_kd.interfaces import InputError, Rest
from deit_kd.models.create import RESERVED_ARGUMENTS, create_model
from deit_kd.models.integers import round_linears
from deit_kd.models.local_dir import (
    ACTIVATIONS,
    KnownPreprocessing,
    LocalDir,
    TransformersConfig,
    named_columns,
    preprocessing_of,
    read_preprocessor,
)
from deit_kd.models.names import check_known, distilled_twin, has_published_second_head, plain_twin
from deit_kd.models.state import published_state, read_state, tensors_hash
from deit_kd.models.tokens import answer_with_patches
from deit_kd.models.weights import fit_weights, holds_distillation_token, holds_second_head
from deit_kd.places import LOCAL_DIR, TEACHER_OF_RUN, path_of
from deit_kd.run_folder import CONFIG_FILE, HEADS_FILE, QUANTIZED_FILE, STUDENT_FOLDER, Facts, read_facts, run_of

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Origin:
    """Named weights, and what is known about their network; None for what is not known.

    Args:
        name: as the user gives it.
        read: returns their state dict under timm's names, see `state`.
        architecture: timm's name.
        model_args: what ``timm.create_model`` needs besides name, size and classes.
        classes: of the network, in order.
        columns: the columns of its head that stand for each of `classes`; None is one each, in order.
        labels: names of single columns, if `columns` are given.
        rest: what the last of `classes` stands for, if it stands for several.
        class_count: the number of its classes.
        preprocessing: of its images.
        layer_norm_eps: of its LayerNorms, if it is not the architecture's.
        licence: of the weights.
        record: the run whose record describes them.
        is_published: whether they are timm's own.
        answers_apart: whether two heads of it are known to answer apart; see `is_distilled` for weights without a
            description.
        answers_with_patches: whether it also answers with ``patch``.
        bits: of the integers that its answers are rounded to, see `round_linears`; None for floating point.
    """

    name: str
    read: Callable[[], dict[str, Tensor]] = field(repr=False, compare=False)
    architecture: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    columns: tuple[tuple[int, ...], ...] | None = None
    labels: Mapping[int, str] = field(default_factory=dict)
    rest: Rest | None = None
    class_count: int | None = None
    preprocessing: KnownPreprocessing = field(default_factory=KnownPreprocessing)
    layer_norm_eps: float | None = None
    licence: str | None = None
    record: Path | None = None
    is_published: bool = False
    answers_apart: bool = False
    answers_with_patches: bool = False
    bits: int | None = None

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The state dict under timm's names, read once; raises an InputError if it cannot be read."""
        return self.read()

    @cached_property
    def digest(self) -> str:
        """A hash of `state`."""
        return tensors_hash({name: self.state[name] for name in sorted(self.state)})

    @property
    def is_distilled(self) -> bool:
        """Whether the network answers with two heads; heads without a token do so if their description says so."""
        return self.answers_apart or holds_distillation_token(self.state)

    def arguments_of(self, architecture: str) -> dict[str, Any]:
        """Return how the network was built, if it is of this architecture."""
        same = self.architecture is not None and self.architecture.split(".")[0] == architecture.split(".")[0]
        return dict(self.model_args) if same else {}


def open_origin(key: str, name: str | Path, asked: frozenset[str] = frozenset()) -> Origin:
    """Open what `name` refers to: a run, its teacher, a file or folder inside it, a folder or a file of weights.

    Args:
        key: the recipe's key, which errors begin with.
        name: a path, ``local-dir:PATH`` or ``RUN:teacher``.
        asked: the ``RUN:teacher`` names that were followed to get here.

    Raises:
        InputError: there are no such weights, or the files beside them cannot be read.
    """
    text = str(name)
    if text.endswith(TEACHER_OF_RUN):
        return _teacher_of(key, text, asked)
    place = Path(text.removeprefix(LOCAL_DIR)).expanduser()
    if place.name == QUANTIZED_FILE or (place / QUANTIZED_FILE).is_file():
        raise InputError(
            f"{key}: {text} holds integers, whose scores are in its heads.json; name the run that it was made of, or "
            "ask it with deit-kd predict"
        )
    run = run_of(place)
    if run is not None:
        return _student_of(key, text, place, run)
    for file in (place, place / WEIGHTS_FILE, place / STUDENT_FOLDER / WEIGHTS_FILE):
        if file.is_file():
            return _described_beside(key, text, file)
    found = "holds no weights" if place.exists() else "is not there"
    raise InputError(f"{key}: {text} {found}; name a .safetensors or .pth file, a local-dir or a run")


def open_published(key: str, name: str) -> Origin:
    """Return timm's own weights of a pretrained tag; they are downloaded when their state is first used.

    Raises:
        InputError: timm has no such model, or no weights of it.
    """
    check_known(key, name)
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise InputError(f"{key}: timm has no weights of {name}; name a tag that has some, or a checkpoint")
    return Origin(
        name=f"timm's {name}",
        read=lambda: published_state(key, name),
        architecture=name,
        classes=imagenet_names(cfg.num_classes),
        class_count=cfg.num_classes,
        preprocessing=preprocessing_of(cfg.to_dict()),
        licence=cfg.license,
        is_published=True,
        answers_apart=has_published_second_head(name),
    )


def imagenet_names(classes: int) -> tuple[str, ...] | None:
    """Return the WordNet ids of the only ImageNet variant with this number of classes; None if there is none."""
    subset = infer_imagenet_subset({"num_classes": classes})
    return None if subset is None else tuple(ImageNetInfo(subset).label_names())


def open_model(key: str, path: str | Path) -> nn.Module:
    """Build the model that a local-dir describes, also a grafted one, with all of its weights.

    Raises:
        InputError: there is no such folder, it does not describe its model, or the weights do not fit.
    """
    origin = open_origin(key, path)
    if origin.architecture is None:
        raise InputError(f"{key}: {path} has no config.json that names its architecture; name a timm local-dir")
    model = create_model(
        key,
        origin.architecture,
        image_size=origin.preprocessing.image_size,
        distilled=origin.is_distilled,
        num_classes=origin.class_count or 0,
        **origin.model_args,
    )
    fit_weights(key, model, origin.state, source=origin.name, strict=True)
    if origin.answers_with_patches:
        answer_with_patches(key, model)
    if origin.bits is not None:
        round_linears(key, origin.architecture, model, origin.preprocessing.image_size or 224, origin.bits)
    return model


# A run, and what it learned from.


def recipe_of(run: Path) -> Config:
    """Return the recipe of the run in a folder.

    Raises:
        InputError: it cannot be read, or is not a recipe of this version.
    """
    return recorded_recipe(run / CONFIG_FILE)


def _student_of(key: str, name: str, place: Path, run: Path) -> Origin:
    file = place if place.is_file() else run / STUDENT_FOLDER / WEIGHTS_FILE
    if not place.exists():
        raise InputError(f"{key}: {name} is not there; name a run, or a file in its checkpoints")
    if not file.is_file():
        why, cure = "holds no weights, since the run is not finished", "finish it with --resume auto"
        if (run / HEADS_FILE).is_file():
            why, cure = f"has lost {STUDENT_FOLDER}/{WEIGHTS_FILE}", f"delete {run} and train it again"
        raise InputError(f"{key}: {name} {why}; name one of its checkpoints, or {cure}")
    recipe, facts = recipe_of(run), read_facts(run)
    classes, student = tuple(facts["classes"]), recipe.student
    if student.name is None:
        raise InputError(f"{key}: {run / CONFIG_FILE} names no student; name a run of deit_kd")
    architecture = distilled_twin(student.name) if recipe.has_token else plain_twin(student.name)

    def read() -> dict[str, Tensor]:
        return read_state(key, file)

    return Origin(
        name=name,
        read=read,
        architecture=architecture.split(".")[0],
        model_args=_plain(student.args),
        classes=classes,
        rest=_rest_of(facts),
        class_count=len(classes),
        preprocessing=KnownPreprocessing(*recipe.data.preprocessing),
        record=run,
        # With peers, only a network that can have two heads does.
        answers_apart=recipe.has_token and (not recipe.peers or holds_second_head(read())),
        answers_with_patches=recipe.distill.dense is not None,
        bits=student.bits,
    )


def _rest_of(facts: Facts) -> Rest | None:
    """Return what the last class of a run stands for, if it stands for several."""
    rest = facts.get("rest")
    return None if rest is None else Rest(rest["name"], tuple(rest["classes"]), rest["kept"])


def _teacher_of(key: str, name: str, asked: frozenset[str]) -> Origin:
    """Return the teacher of a run, as its record describes it: names, columns and preprocessing together."""
    run, asked = _run_of_student(key, name.removesuffix(TEACHER_OF_RUN), asked), _asking(key, name, asked)
    record, recipe = read_facts(run), recipe_of(run)
    section = recipe.teacher
    facts = record["teacher"]
    if facts is None or recipe.learns_from_own_average or section.members or section.random_weights or "store" in facts:
        found = (
            "its own average" if recipe.learns_from_own_average
            else "no teacher" if facts is None
            else "several teachers" if section.members
            else "random weights" if section.random_weights
            else "a label store"
        )  # fmt: skip
        raise InputError(f"{key}: {run} learned from {found}; name the weights of one")
    source, known = facts["source"], facts.get("digest")
    if source is None and section.name is not None:
        weights = open_published(key, section.name)
    elif not path_of(str(source)).exists():
        raise InputError(f"{key}: {run} learned from {source}, which is not there; put it back, or name other weights")
    else:
        weights = open_origin(key, str(source), asked)

    def read() -> dict[str, Tensor]:
        if known not in (None, weights.digest):
            raise InputError(
                f"{key}: the weights of {weights.name} have changed since {run} learned from it; name the old ones"
            )
        return weights.state

    classes, mapping = tuple(record["classes"]), facts.get("class_map")
    if mapping is not None and mapping.keys() != set(classes):
        raise InputError(f"{key}: {run}'s record maps other classes than its own; name the weights themselves")
    groups = None if mapping is None else [mapping[name] for name in classes]
    rest = _rest_of(record)
    if rest is not None:  # the share of the rest's photos that the student saw is not the share that its teacher saw
        rest = rest._replace(kept=1.0 if weights.rest is None else weights.rest.kept)
    return Origin(
        name=name,
        read=read,
        architecture=facts["name"],
        model_args=_plain(facts.get("args", {**weights.arguments_of(facts["name"]), **section.args})),
        classes=classes,
        columns=None if groups is None else tuple(tuple(column for column, _ in group) for group in groups),
        labels={column: label for group in groups or () for column, label in group if label is not None},
        rest=rest,
        class_count=len(classes),
        preprocessing=KnownPreprocessing(
            facts.get("image_size"), facts.get("mean"), facts.get("std"), facts.get("interpolation")
        ),
        layer_norm_eps=weights.layer_norm_eps,
        licence=weights.licence,
        record=run,
        answers_apart=weights.answers_apart,
        answers_with_patches=weights.answers_with_patches,
    )


def _run_of_student(key: str, name: str, asked: frozenset[str]) -> Path:
    """Return the run whose student `name` refers to; for ``RUN:teacher``, the run that trained the teacher of RUN."""
    if name.endswith(TEACHER_OF_RUN):
        facts = read_facts(_run_of_student(key, name.removesuffix(TEACHER_OF_RUN), asked))["teacher"]
        source = None if facts is None else facts["source"]
        if source is not None:
            return _run_of_student(key, source, _asking(key, name, asked))
    run = run_of(Path(name.removeprefix(LOCAL_DIR)))
    if run is None or name.endswith(TEACHER_OF_RUN):
        raise InputError(f"{key}: {name} is not a run, so it has no teacher; name a run")
    return run


def _asking(key: str, name: str, asked: frozenset[str]) -> frozenset[str]:
    if name in asked:
        raise InputError(f"{key}: {name} records that it learned from itself; name another run")
    return asked | {name}


# Folders and files from elsewhere.


def _described_beside(key: str, name: str, file: Path) -> Origin:
    """Return the weights of a file, described by the ``config.json`` beside it, if there is one."""
    config_file = file.parent / "config.json"
    saved: LocalDir = read_json(config_file, LocalDir) if config_file.is_file() else {}
    classes, columns = named_columns(saved)
    count = saved.get("num_classes", saved.get("pretrained_cfg", {}).get("num_classes"))
    if saved.get("model_type") in ("deit", "vit"):
        return _from_transformers(key, name, file, classes, columns)
    return Origin(
        name=name,
        read=lambda: read_state(key, file),
        architecture=saved.get("architecture"),
        model_args=_plain(saved.get("model_args", {})),
        classes=classes,
        columns=columns,
        class_count=len(classes) if classes is not None else count,
        preprocessing=preprocessing_of({**saved.get("pretrained_cfg", {}), **saved}),
        answers_apart="dist" in saved.get("heads", ()),
        answers_with_patches="patch" in saved.get("heads", ()),
        bits=saved.get("bits"),
    )


def _from_transformers(
    key: str,
    name: str,
    file: Path,
    classes: tuple[str, ...] | None,
    columns: tuple[tuple[int, ...], ...] | None,
) -> Origin:
    config_file = file.parent / "config.json"
    saved = read_json(config_file, TransformersConfig)
    act = saved.get("hidden_act", "gelu")
    if act not in ACTIVATIONS:
        raise InputError(f"{key}: {config_file}: timm has no activation {act!r} (hidden_act); name other weights")
    arguments = {
        "patch_size": saved["patch_size"],
        "embed_dim": saved["hidden_size"],
        "depth": saved["num_hidden_layers"],
        "num_heads": saved["num_attention_heads"],
        "mlp_ratio": saved["intermediate_size"] / saved["hidden_size"],
        "qkv_bias": saved.get("qkv_bias", True),
        **({} if ACTIVATIONS[act] is None else {"act_layer": ACTIVATIONS[act]}),
    }
    state = read_state(key, file)
    return Origin(
        name=name,
        read=lambda: state,
        # Any timm name would do, since the arguments define everything.
        architecture="deit_tiny_distilled_patch16_224" if holds_distillation_token(state) else "deit_tiny_patch16_224",
        model_args=arguments,
        classes=classes,
        columns=columns,
        class_count=len(state["head.weight"]) if "head.weight" in state else None,
        preprocessing=read_preprocessor(file.parent / "preprocessor_config.json", saved["image_size"]),
        layer_norm_eps=saved.get("layer_norm_eps", 1e-12),
    )


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that define the network; a folder cannot choose where weights come from."""
    return {name: value for name, value in arguments.items() if name not in RESERVED_ARGUMENTS}
