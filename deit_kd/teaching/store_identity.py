"""What a label store depends on, from a recipe and its photos, and which recipes may not use it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deit_kd.config import ANSWERS, VIEWS, Config, as_schedule, differences, flat, keys_that_change
from deit_kd.data import PILLOW, Photos, Splits
from deit_kd.distributed import Processes, together
from deit_kd.interfaces import InputError, Preprocessing
from deit_kd.models.state import tensors_hash
from deit_kd.origins import open_origin
from deit_kd.places import TEACHER_OF_RUN
from deit_kd.randomness import VIEWS_VERSION
from deit_kd.run_folder import HEADS_FILE
from deit_kd.runs import parts
from deit_kd.runs.viewing import makers_of
from deit_kd.store import LabelStore
from deit_kd.teachers import NetworkTeacher
from deit_kd.teaching.fit import teacher_folder

IN_THE_STORE = "in the store"
SHAPE = ("classes", "views", "validation", "columns")  # of a store's parts
OF_A_STORE = ("data.", "augment.", "teacher.")  # prefixes of the keys that it depends on, besides the seed
MAKERS = ("data.executor", "data.decoder")  # of views; accepted with libraries, by `deit-kd store check`
LIBRARIES = ("numpy", "pillow", "timm", "torch", "torchvision")  # that the views depend on


def identity(config: Config, splits: Splits) -> dict[str, Any]:
    """Return everything but the weights that a view or an answer depends on, by field."""
    keys, found_by = flat(config.model_dump(mode="json")), keys_that_change(VIEWS | ANSWERS, OF_A_STORE)
    return {
        "train.images": len(splits.train),
        "train.photos": splits.train.digest(),
        **validation_identity(config, splits.validation),
        **{key: keys[key] for key in found_by if not key.startswith("teacher.fit.") and key not in MAKERS},
        "seed": config.seed,
        "teacher.image_size": config.teacher.image_size or config.data.image_size,
        "teacher.precision": parts.teacher_precision(config),
        "teacher.class_map": _file_digest(config.teacher.class_map),
        **_dense_identity(config),
    }


def _dense_identity(config: Config) -> dict[str, Any]:
    """Return what dense labels depend on: the mix and, if it changes over the run, the step of each view."""
    term = config.distill.dense
    if term is None or not config.distill.stores_dense:
        return {}
    mix = as_schedule(term.mix)
    found: dict[str, Any] = {"dense.mix": mix.start if has_constant_mix(config) else list(mix)}
    if not has_constant_mix(config):
        found |= {"train.epochs": config.train.epochs, "train.batch_size": config.train.batch_size}
    return found


def has_constant_mix(config: Config) -> bool:
    """Return whether the dense labels of a view are the same at any step."""
    term = config.distill.dense
    return term is None or len(set(as_schedule(term.mix).values)) == 1


def _file_digest(path: str | None) -> str | None:
    if path is None:
        return None
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"teacher.class_map: {path} is not a file; name a CSV or JSON file")
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


def validation_identity(config: Config, photos: Photos) -> dict[str, Any]:
    """Return what a view of a validation image depends on, by field."""
    seen = config.data.model_dump(mode="json", include=set(Preprocessing._fields))
    return {
        "classes": list(photos.classes),
        "validation.images": len(photos),
        "validation.photos": photos.digest(),
        **{f"data.{key}": value for key, value in seen.items()},
    }


def identity_without_teacher(config: Config, splits: Splits, views: int) -> dict[str, Any]:
    """Return what is known of a recipe whose teacher is not in memory, and perhaps not on this machine.

    Weights are compared if their file is at hand. A recipe that names no teacher takes the store's. A fitted teacher is
    the one for the version `views`.
    """
    fields, section = identity(config, splits), config.teacher
    if section.name is None and section.checkpoint is None and not section.members:
        return {key: value for key, value in fields.items() if not key.startswith("teacher.")}
    checkpoint = section.checkpoint
    if section.fit.epochs and (teacher_folder(config, splits, views) / HEADS_FILE).is_file():
        checkpoint = str(teacher_folder(config, splits, views))
    if checkpoint is None or checkpoint.endswith(TEACHER_OF_RUN):
        return fields | weights_source(config, splits, views)
    return fields | {"teacher.weights": weights_hash(None, checkpoint)}


def weights_source(config: Config, splits: Splits, views: int = VIEWS_VERSION) -> dict[str, str]:
    """Return where a recipe's weights come from, to compare if the weights are not at hand."""
    section = config.teacher
    if section.fit.epochs:
        return {"teacher.source": teacher_folder(config, splits, views).name}
    if section.pretrained or section.random_weights:
        return {"teacher.source": "timm" if section.pretrained else "random"}
    return {"teacher.source": "file"} if section.checkpoint is not None else {}


def weights_hash(teacher: NetworkTeacher | None, checkpoint: str | None) -> str:
    """Return a hash of the weights' file or, if there is none, of the network."""
    if checkpoint is None or checkpoint.endswith(TEACHER_OF_RUN):
        assert teacher is not None
        return tensors_hash(teacher.state_dict())
    return open_origin("teacher.checkpoint", checkpoint).digest


def in_use(config: Config) -> dict[str, str]:
    """Return what makes a recipe's views: executor and decoder, and the versions of the libraries they depend on."""
    makers = {f"data.{name}": maker for name, maker in makers_of(config).items()}
    return makers | {name: version(name).split("+")[0] for name in LIBRARIES}


def accepted(store: LabelStore) -> list[dict[str, str]]:
    """Return what may make the views of a store, each as `in_use` says it."""
    return [
        dict.fromkeys(MAKERS, PILLOW.version) | known for known in store.manifest["libraries"]
    ]  # once the only ones


def refuse_other(store: LabelStore, here: dict[str, Any]) -> None:
    """Raise an InputError with both values of every field of `here` that differs from the store's."""
    refuse_differences(store, differences(store.manifest["identity"], here, IN_THE_STORE))


def refuse_differences(store: LabelStore, found: list[str]) -> None:
    """Raise an InputError that names the first few of the differences that were `found`, if any."""
    if found:
        more = f"; {len(found) - 3} more" if len(found) > 3 else ""
        raise InputError(
            f"teacher.store: {store.folder} was built for other settings ({'; '.join(found[:3])}{more}); undo that, or "
            "name another store"
        )


def refuse_makers(store: LabelStore, config: Config) -> None:
    """Raise an InputError unless the recipe's executor and decoder may make a store's views, with these libraries."""
    here = in_use(config)
    if here in accepted(store):
        return
    fewest = min((differences(known, here, IN_THE_STORE) for known in accepted(store)), key=len)
    raise InputError(
        f"teacher.store: the views of {store.folder} were made otherwise ({'; '.join(fewest)}), which may change them; "
        "run deit-kd store check on it: if its answers still hold, it may be used as things are here"
    )


def verify(store: LabelStore, parts_of_store: Sequence[str], processes: Processes) -> None:
    """Compare the checksums of parts, each process its share.

    Raises:
        InputError: a part is damaged.
    """

    def verify_share() -> None:
        with processes.busy(f"compares checksums of {store.folder}"):
            store.verify(parts_of_store[processes.rank :: processes.count])

    together(processes, verify_share)
