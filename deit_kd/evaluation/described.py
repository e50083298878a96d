"""What a run says about its student in a model card: facts, scores and fitted temperatures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from deit_kd.checkpoint import load_checkpoint
from deit_kd.config import Config
from deit_kd.evaluation.curves import read_records
from deit_kd.evaluation.sources import Source
from deit_kd.exports import About
from deit_kd.files import read_json
from deit_kd.interfaces import InputError
from deit_kd.metrics import names_in_every_head
from deit_kd.run_folder import CONFIG_FILE, HEADS_FILE, kept_weights, name_of_run, read_head_scores
from deit_kd.students import TimmStudent


def described(source: Source, config: Config, student: TimmStudent) -> About:
    """Return what a card says about the student of a run or of one of its checkpoints.

    Raises:
        InputError: a file of the run cannot be read.
    """
    assert source.run is not None
    facts, is_final = source.facts, source.checkpoint is None
    return About(
        architecture=student.backbone.pretrained_cfg["architecture"],
        model_args=student.model_args,
        classes=source.classes or (),
        preprocessing=config.data.preprocessing,
        fusion=config.evaluate.fusion,
        heads=read_head_scores(source.run) if source.checkpoint is None else _scores_of(source.run, source.checkpoint),
        teacher=facts["teacher"],
        data=f"{config.data.name} (digest of the training split {facts['data']['train']})",
        recipe=(source.run / CONFIG_FILE).read_text(),
        temperature=_fitted_temperature(source.run, config.evaluate.fusion) if is_final else None,
    )


def _scores_of(run: Path, checkpoint: Path) -> Mapping[str, Any] | None:
    """Return the scores of a checkpoint, like ``heads.json``; None if it was written within an epoch.

    Raises:
        InputError: the checkpoint is truncated or altered.
    """
    try:
        step = load_checkpoint(checkpoint)["progress"]["step"]
    except ValueError as error:
        raise InputError(f"{error}; name another checkpoint") from error
    epochs = [record for record in read_records(run) if (record["kind"], record["step"]) == ("epoch", step)]
    if not epochs:
        return None
    weights = kept_weights(epochs[-1])
    return {**epochs[-1][weights], "weights": weights, "teacher": epochs[-1]["teacher"]}


class _Fitted(TypedDict):
    temperature: float


class _Evaluation(TypedDict):
    student: str
    temperature: dict[str, _Fitted]


def _fitted_temperature(folder: Path, fusion: str) -> dict[str, float] | None:
    """Return the temperature of each head, fitted by an evaluation of this run on its own validation set."""
    file = folder / "eval" / "validation" / HEADS_FILE
    if not file.is_file():
        return None
    evaluation = read_json(file, _Evaluation)
    if evaluation["student"] != name_of_run(folder):
        return None
    fitted = evaluation["temperature"]
    names = names_in_every_head(fusion).items()
    return {head: fitted[name]["temperature"] for head, name in names if name in fitted}
