"""Fit a teacher: a plain supervised run on the same data, kept under a hash of all it depends on."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from deit_kd.config import (
    FIT,
    Config,
    Data,
    Distill,
    Fit,
    Guide,
    GuideAsTeacher,
    StudentSection,
    TeacherSection,
    differences,
    effects,
    flat,
    keys_of,
)
from deit_kd.console import say
from deit_kd.data import PILLOW, Splits
from deit_kd.distributed import Processes, on_main
from deit_kd.files import read_json, write_json
from deit_kd.interfaces import InputError, Preprocessing
from deit_kd.randomness import VIEWS_VERSION, derive
from deit_kd.run_folder import HEADS_FILE
from deit_kd.runs import parts
from deit_kd.runs.opening import claimed
from deit_kd.runs.photos import agreed_splits, build_splits, with_labels
from deit_kd.runs.run import execute, prepare
from deit_kd.runs.viewing import makers_of
from deit_kd.store import LabelStore
from deit_kd.teachers import NetworkTeacher

KEY_FILE = "teacher_key.json"

# Keys of a run that fits a teacher, and their keys in the recipe.
_KEYS = (
    (r"output: ", "teacher.fit.folder: "),
    (r"student\.drop_path", "teacher.fit.drop_path"),
    (r"student\.", "teacher."),
    (r"train\.(batch_size|epochs|ema_decay)", r"teacher.fit.\1"),
    (r"(optim|augment)\.", r"teacher.fit.\1."),
)
EYES = ("image_size", "mean", "std")  # how a teacher sees photos, if its section says so


def fitted_teacher(config: Config, processes: Processes, splits: Splits) -> Path:
    """Return the folder of the teacher that `config` fits; train it if it does not exist yet.

    Raises:
        InputError: the teacher's name or recipe cannot work.
    """
    with keys_of(config.teacher.role):
        return _found_or_fitted(config, processes, splits)


def _found_or_fitted(config: Config, processes: Processes, splits: Splits) -> Path:
    role = config.teacher.role
    if config.teacher.name is None:
        raise InputError("teacher.name: is not set; name a timm model such as resnet18")
    if config.data.unlabelled is not None:
        config = with_labels(config)
        splits = agreed_splits(config, processes)
    key, folder = _key(config, splits), teacher_folder(config, splits)
    if _is_there(role, folder, processes):
        return folder
    with claimed(folder, processes, f"{role}: another run is fitting {folder}; waiting until it is done"):
        if _is_there(role, folder, processes):  # in the meantime
            return folder
        try:
            run = prepare(_fit_config(config, folder), processes, splits, is_named_by_recipe=True)
        except InputError as error:
            raise InputError(_in_the_recipes_keys(str(error), config.teacher)) from error
        if processes.is_main:
            how = _why(key, folder) if run.checkpoint is None else " (resumed)"
            say(f"{role}: fitting {config.teacher.name}{how}")
        execute(run)
        on_main(processes, lambda: write_json(folder / KEY_FILE, key))
    return folder


def _is_there(role: str, folder: Path, processes: Processes) -> bool:
    """Return whether the main process finds a completely fitted teacher, and print it."""
    found = processes.share((folder / HEADS_FILE).is_file())
    if found and processes.is_main:
        say(f"{role}: found {folder}")
    return found


def teacher_folder(config: Config, splits: Splits, views: int = VIEWS_VERSION) -> Path:
    """Return where the teacher that `config` fits is kept, whether it exists or not, for the version `views`."""
    key = json.dumps(_key(config, splits, views), sort_keys=True)
    digest = hashlib.blake2b(key.encode(), digest_size=5).hexdigest()
    return Path(config.teacher.fit.folder).expanduser() / f"{config.teacher.name}-{digest}"


def online_teacher(config: Config, processes: Processes, splits: Splits) -> tuple[NetworkTeacher, str | None]:
    """Return the recipe's teacher, fitted first if the recipe says so, and where its weights come from."""
    checkpoint = config.teacher.checkpoint
    dense = config.distill.dense is not None
    if config.teacher.fit.epochs:
        if dense and is_unfitted(config, splits):
            # What cannot answer at places is not fitted first.
            unfitted_teacher(config, splits.train.classes, processes)
        checkpoint = str(fitted_teacher(config, processes, splits))
    with processes.busy(f"loads the {config.teacher.role}"):
        return parts.build_teacher(config, splits.train.classes, processes, checkpoint, dense), checkpoint


def guide_config(config: Config) -> Config | None:
    """Return the recipe with its guide in the teacher's place, so that both are fitted and found alike.

    If a label store provides the logits and the recipe names no other guide, this is the teacher's own network. None if
    the teacher or its store provides the features with the logits, or none are compared.
    """
    if not config.distill.needs_features or holds_vectors(config):
        return None
    features = [term for term in config.distill.terms if term.compares_features]  # all that a guide gives
    config = config.with_keys(distill={"terms": features})
    if not config.guide.is_named:
        return config.with_keys(teacher={"store": None}) if config.teacher.reads_store else None
    guide = {name: getattr(config.guide, name) for name in type(config.guide).model_fields}
    own = {name: getattr(config.teacher, name) for name in ("precision", "channels_last", "compile")}
    return config.model_copy(update={"teacher": GuideAsTeacher(**guide, **own), "guide": Guide()})


def holds_vectors(config: Config) -> bool:
    """Return whether the store that a recipe reads gives it all features that are compared."""
    if not config.stores_vectors or not config.teacher.reads_store:
        return False
    return LabelStore(str(config.teacher.store)).record.width is not None


def is_unfitted(config: Config, splits: Splits) -> bool:
    """Return whether the recipe's teacher has not been fitted yet."""
    return bool(config.teacher.fit.epochs) and not (teacher_folder(config, splits) / HEADS_FILE).is_file()


def unfitted_teacher(config: Config, classes: tuple[str, ...], processes: Processes) -> NetworkTeacher:
    """Return the network that the recipe will fit, with random weights."""
    trial = config.with_keys(teacher={"fit": Fit(), "pretrained": False, "random_weights": True})
    return parts.build_teacher(trial, classes, processes, None, config.distill.dense is not None)


def _key(config: Config, splits: Splits, views: int = VIEWS_VERSION) -> dict[str, Any]:
    if config.data.unlabelled is not None:
        splits = build_splits(with_labels(config))
    found_by = {name for name in TeacherSection.model_fields if effects().get(f"teacher.{name}", FIT) & FIT}
    found_by -= {"image_size"}  # it is among what is seen, as the first version had it
    teacher = config.teacher.model_dump(mode="json", include=found_by, exclude={"fit": {"folder"}})
    teacher["checkpoint"] = None  # as the first version had it
    seen = _seen_data(config).model_dump(mode="json", include=set(Preprocessing._fields))
    if seen["crop_mode"] == "center":
        del seen["crop_mode"]  # the first version had no such field
    if config.data.cache_size is not None:
        seen["cache_size"] = config.data.cache_size  # nor this one
    seen |= {name: maker for name, maker in makers_of(config).items() if maker != PILLOW.version}  # nor these
    return {
        "data": {"train": splits.train.digest(), "validation": splits.validation.digest()},
        "classes": list(splits.train.classes),
        "teacher": teacher,
        **seen,
        "precision": config.train.precision,
        "seed": config.seed,
        **({} if views == 1 else {"views": views}),  # nor that one
    }


def _seen_data(config: Config) -> Data:
    """Return the recipe's photos as the teacher sees them when it is fitted, which is how it is asked later."""
    own = {name: getattr(config.teacher, name) for name in EYES}
    return config.data.model_copy(update={name: value for name, value in own.items() if value is not None})


def _fit_config(config: Config, folder: Path) -> Config:
    fit, teacher = config.teacher.fit, config.teacher
    return Config(
        data=_seen_data(config),
        augment=fit.augment,
        student=StudentSection(
            name=teacher.name,
            pretrained=teacher.pretrained,
            drop_path=fit.drop_path,
            channels_last=False if teacher.channels_last is False else None,
            args=teacher.args,
        ),
        teacher=TeacherSection(),
        distill=Distill(kind="none"),
        optim=fit.optim,
        train=config.train.model_copy(
            update={
                "epochs": fit.epochs,
                "batch_size": fit.batch_size,
                "ema_decay": fit.ema_decay,
                "accumulation_steps": 1,
                "compile": False,
            }
        ),
        evaluate=config.evaluate,
        recipe=config.recipe,
        seed=derive("teacher's fit", config.seed) >> 1,  # not the views that the student will see
        output=str(folder),
        resume="auto",
    )


def _in_the_recipes_keys(message: str, teacher: TeacherSection) -> str:
    """Return a message of a run that fits a teacher, with the recipe's names for its keys."""
    own = [(rf"data\.{name}", f"teacher.{name}") for name in EYES if getattr(teacher, name) is not None]
    for pattern, recipe in (*_KEYS, *own):
        message = re.sub(rf"\b{pattern}", recipe, message)
    return message


def _why(key: dict[str, Any], folder: Path) -> str:
    """Say which fields differ from the most similar teacher of that name that was fitted on the same photos."""
    name = folder.name.rsplit("-", 1)[0]
    files = [path for path in folder.parent.glob(f"{name}-*/{KEY_FILE}") if path.parent != folder]
    others = [read_json(path, dict[str, Any]) for path in files]
    if not others:
        return ""
    alike = [other for other in others if other.get("data", {}).get("train") == key["data"]["train"]]
    if not alike:
        return f", since none in {folder.parent} was fitted on these photos"
    found = min((_changed(other, key) for other in alike), key=len)
    return f" from scratch, since an existing one differs: {'; '.join(found)}"


def _changed(before: dict[str, Any], key: dict[str, Any]) -> list[str]:
    there = flat(before)
    return differences(there, dict.fromkeys(there) | flat(key), "there")
