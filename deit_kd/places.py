"""Checks that what a command names exists, before anything heavy is loaded."""

from __future__ import annotations

from pathlib import Path

from deit_kd.config import Config, TeacherNetwork
from deit_kd.interfaces import InputError

TAR_SHARDS = "tar shards"
LOCAL_DIR = "local-dir:"
TEACHER_OF_RUN = ":teacher"  # after a run's folder: its teacher instead of its student


def check_there(key: str, path: str, cure: str) -> None:
    """Raise an InputError unless `path` exists."""
    if not Path(path).expanduser().exists():
        raise InputError(f"{key}: {path} is not there; {cure}")


def photos_root(root: str | None, holds: str = "one folder of images for each class") -> Path:
    """Return the folder that ``data.root`` names.

    Args:
        root: the value of the key.
        holds: what should be in the folder, for the message.

    Raises:
        InputError: there is none.
    """
    if root is None:
        raise InputError(f"data.root: is not set; name a folder with {holds}")
    top = Path(root).expanduser()
    if not top.is_dir():
        raise InputError(f"data.root: {root} is not a folder; name a folder with {holds}")
    return top


def path_of(name: str) -> Path:
    """Return the path in the name of weights: a folder or a file, ``local-dir:PATH`` or ``RUN:teacher``."""
    while name.endswith(TEACHER_OF_RUN):
        name = name.removesuffix(TEACHER_OF_RUN)
    return Path(name.removeprefix(LOCAL_DIR)).expanduser()


def check_source(text: str) -> None:
    """Raise an InputError if a student is named by a path that does not exist; a timm model has no path."""
    path = path_of(text)
    is_path = text.startswith(LOCAL_DIR) or "/" in text or path.suffix in (".pth", ".safetensors")
    if is_path and not path.exists():
        raise InputError(f"{text}: is not there; name a run, an exported folder, a file of weights or a timm model")


def check_training(config: Config) -> None:
    """Raise an InputError if training with `config` needs a file or a folder that does not exist."""
    if config.data.name == "folder":
        photos_root(config.data.root)
    if config.data.name == "shards":
        photos_root(config.data.root, TAR_SHARDS)
    if config.data.unlabelled is not None:
        check_there("data.unlabelled", config.data.unlabelled, "name a folder with images")
    weights = {"student.checkpoint": config.student.checkpoint}
    teacher, networks = config.teacher, dict[str, TeacherNetwork]()
    if config.distill.kind != "none":
        if teacher.reads_store:
            check_there("teacher.store", str(teacher.store), "make one with deit-kd store build")
        else:
            networks = {"teacher": teacher, **{f"teacher.members.{n}": one for n, one in enumerate(teacher.members)}}
    if config.distill.needs_features:
        networks |= {"guide": config.guide} if config.guide.is_named else {"teacher": teacher}
    for key, network in networks.items():
        weights[f"{key}.checkpoint"] = network.checkpoint
        if network.class_map is not None:
            check_there(f"{key}.class_map", network.class_map, "name a CSV or JSON file")
    for key, path in weights.items():
        if path is not None:
            check_there(key, str(path_of(path)), "name a .safetensors or .pth file, a local-dir or a finished run")
