"""The files in the folder of a run, and the run that a path belongs to."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, with_config
from typing_extensions import NotRequired, TypedDict

from deit_kd.files import read_json

CONFIG_FILE = "config.yaml"
HEADS_FILE = "heads.json"
FACTS_FILE = "run.json"  # what a run used: photos, classes, teacher
CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"
DATA_ERRORS_FILE = "data_errors.jsonl"  # views that are missing because their photos cannot be read
QUANTIZED_FILE = "quantized.safetensors"  # a student's integers, in a folder of their own
STUDENT_FOLDER = "student"  # its weights in timm's local-dir layout
PEERS_FOLDER = "peers"  # a folder for each student that trained with it, laid out as a run


@with_config(ConfigDict(extra="allow"))
class ScoreRecord(TypedDict):
    """The score of a head or a teacher."""

    top1: float
    top5: float | None
    nll: float


@with_config(ConfigDict(extra="allow"))
class FeatureRecord(TypedDict):
    """The score of a teacher without a head."""

    knn: float
    images: NotRequired[int]  # training photos that are the neighbours; once there were none
    neighbours: int
    temperature: float


@with_config(ConfigDict(extra="allow"))
class TeacherFacts(TypedDict):
    """What a run learned from."""

    name: str
    source: str | None
    score: ScoreRecord | FeatureRecord
    view_epochs: NotRequired[int]
    members: NotRequired[list[dict[str, Any]]]
    args: NotRequired[dict[str, Any]]
    image_size: NotRequired[int]
    mean: NotRequired[tuple[float, float, float]]
    std: NotRequired[tuple[float, float, float]]
    interpolation: NotRequired[str]
    class_map: NotRequired[dict[str, list[tuple[int, str | None]]] | None]
    digest: NotRequired[str | None]  # of the weights as read
    store: NotRequired[str]


@with_config(ConfigDict(extra="allow"))
class RestFacts(TypedDict):
    """The classes that the last one of a run stands for, see `Rest`."""

    name: str
    classes: list[str]
    kept: Annotated[float, Field(gt=0, le=1)]


@with_config(ConfigDict(extra="allow"))
class AttentionFacts(TypedDict):
    """The attention kernel of a run on CUDA, and what it was chosen by."""

    kernel: str
    shape: list[int]  # of the queries: images, heads, tokens, width
    measured: dict[str, dict[str, float]]  # errors and seconds of each kernel


@with_config(ConfigDict(extra="allow"))
class MemoryFormatFacts(TypedDict):
    """The memory format of a network that teaches, and what it was chosen by."""

    channels_last: bool
    seconds: dict[str, float]  # of an answer to one batch, by format


@with_config(ConfigDict(extra="allow"))
class Facts(TypedDict):
    """What ``run.json`` holds."""

    classes: list[str]
    rest: NotRequired[RestFacts | None]  # what the last class stands for
    data: dict[str, str]  # digest by split
    images: NotRequired[dict[str, int]]  # by split
    views: NotRequired[int]
    paths: NotRequired[int]
    last_block: NotRequired[int]
    executor: NotRequired[str]  # what made the views, and its version
    decoder: NotRequired[str]  # what decoded the training photos, and its version
    student: NotRequired[dict[str, Any] | None]  # the account of the weights that it began with
    peers: NotRequired[dict[str, dict[str, Any] | None]]  # the same, by peer
    teacher: TeacherFacts | None
    processes: NotRequired[int]
    attention: NotRequired[AttentionFacts | None]
    memory_format: NotRequired[dict[str, MemoryFormatFacts] | None]  # by network; None if nothing was measured
    torch: NotRequired[str]


def kept_weights(scored: Collection[str]) -> Literal["model", "ema"]:
    """Return which of the scored weights a run keeps: the averaged ones if there are any."""
    return "ema" if "ema" in scored else "model"


@with_config(ConfigDict(extra="allow"))
class HeadScores(TypedDict):
    """What the ``heads.json`` of a run holds."""

    n: int
    unreadable: NotRequired[dict[str, str]]  # reasons, by the names of images that are not among the n
    weights: str
    heads: dict[str, ScoreRecord | None]
    teacher: ScoreRecord | None
    agreement: NotRequired[dict[str, float | None]]


def read_facts(folder: Path) -> Facts:
    """Return the facts of the run in `folder`.

    Raises:
        InputError: there is no such run.
    """
    return read_json(folder / FACTS_FILE, Facts)


def read_head_scores(folder: Path) -> HeadScores:
    """Return the scores of the finished run in `folder`.

    Raises:
        InputError: there is no such run.
    """
    return read_json(folder / HEADS_FILE, HeadScores)


def run_of(path: Path) -> Path | None:
    """Return the run whose folder, student or checkpoint `path` is; None if it is none of these."""
    for place in (path.expanduser(), path.expanduser().resolve()):
        above = [place]
        if place.name == STUDENT_FOLDER:
            above.append(place.parent)
        if place.parent.name in (CHECKPOINTS, STUDENT_FOLDER):
            above.append(place.parent.parent)
        for folder in above:
            if (folder / CONFIG_FILE).is_file():
                return folder
    return None


def is_model(named: str) -> bool:
    """Return whether a path names a model that describes itself: an ONNX file, or a folder of integers."""
    return named.endswith(".onnx") or (Path(named).expanduser() / QUANTIZED_FILE).is_file()


def peer_folder(run: Path, name: str) -> Path:
    """Return the folder of one of a run's peers, which is laid out as a run."""
    return run / PEERS_FOLDER / name


def peer_folders(run: Path) -> list[Path]:
    """Return the folders of a finished run's peers."""
    return sorted(file.parent for file in (run / PEERS_FOLDER).glob(f"*/{HEADS_FILE}"))


def whose_peer(folder: Path) -> Path | None:
    """Return the run of whose peer `folder` is; None if it is a run's own, or was moved out of its run."""
    folder = folder.resolve()
    is_peer = folder.parent.name == PEERS_FOLDER and (folder.parents[1] / CONFIG_FILE).is_file()
    return folder.parents[1] if is_peer else None


def name_of_run(folder: Path) -> str:
    """Return what a run is called: its folder's name, or for a peer's folder ``<run>-<peer>``."""
    run = whose_peer(folder)
    return folder.resolve().name if run is None else f"{run.name}-{folder.resolve().name}"


def record_of_peer(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a record of a run as one of its peers would have written it."""
    of_student = ("peers", "loss", "classification", "distillation", "terms", "model", "ema")
    shared = {key: value for key, value in record.items() if key not in of_student}
    own: dict[str, Any] = record.get("peers", {}).get(name, {})
    return shared | own


def next_free_folder(parent: Path, recipe: str) -> Path:
    """Return ``parent/<recipe>-<n>`` with the first n above all existing ones."""
    return parent / f"{recipe}-{1 + max(_numbers(parent, recipe), default=0)}"


def newest_folder(parent: Path, recipe: str) -> Path | None:
    """Return the ``parent/<recipe>-<n>`` with the largest n, if there is one."""
    numbers = _numbers(parent, recipe)
    return parent / f"{recipe}-{max(numbers)}" if numbers else None


def _numbers(parent: Path, recipe: str) -> list[int]:
    names = os.listdir(parent) if parent.is_dir() else []
    matches = (re.fullmatch(rf"{re.escape(recipe)}-(\d+)", name) for name in names)
    return [int(match[1]) for match in matches if match]


def lines_until(file: Path, step: int) -> list[str]:
    """Return the whole lines of a file of records that belong to the first `step` steps."""
    lines = file.read_text(errors="replace").splitlines(keepends=True) if file.is_file() else []
    return [line for line in lines if line.endswith("\n") and _step_of(line) <= step]


def _step_of(line: str) -> float:
    """Return the step of a record; a record damaged by a power cut comes after all others."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
