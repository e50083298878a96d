"""A checkpoint is named parts plus JSON in one safetensors file: complete or absent, and never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deit_kd.files import write_atomically
from deit_kd.models.state import tensors_hash

BEST = "best.safetensors"  # the checkpoint of the best epoch, kept besides the newest ones

DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

Tree = Any  # nested dicts and lists of tensors and JSON values


def _flatten(tree: Tree, name: str, tensors: dict[str, Tensor]) -> Tree:
    """Move the tensors of `tree` into `tensors`; return JSON that remembers where they were."""
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().contiguous()
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[key, _flatten(value, f"{name}.{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        values = [_flatten(value, f"{name}.{index}", tensors) for index, value in enumerate(tree)]
        return {"tuple": values} if isinstance(tree, tuple) else values
    return {"dtype": str(tree)} if isinstance(tree, torch.dtype) else tree


def _unflatten(tree: Tree, tensors: dict[str, Tensor]) -> Tree:
    if isinstance(tree, list):
        return [_unflatten(value, tensors) for value in tree]
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        if "tuple" in tree:
            return tuple(_unflatten(value, tensors) for value in tree["tuple"])
        if "dtype" in tree:
            return DTYPES[tree["dtype"]]
        return {key: _unflatten(value, tensors) for key, value in tree["dict"]}
    return tree


def _digest(skeleton: str, tensors: dict[str, Tensor]) -> str:
    in_order = {name: tensors[name] for name in sorted(tensors)}
    return hashlib.blake2b((skeleton + tensors_hash(in_order)).encode(), digest_size=16).hexdigest()


def save_checkpoint(folder: Path, step: int, parts: Tree, keep: int, is_best: bool = False) -> Path:
    """Write the parts of one step and delete all but the newest `keep` checkpoints, and the best.

    Args:
        folder: the run's ``checkpoints/``.
        step: optimiser steps done.
        parts: nested dicts and lists of tensors and JSON values, by part (``student``, ``optimizer``, …).
        keep: how many checkpoints stay.
        is_best: whether this is the best so far; it is also kept as ``best.safetensors``.

    Raises:
        OSError: it cannot be written; earlier checkpoints are unchanged.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_flatten(parts, "", tensors))
    return _write(folder, step, skeleton, tensors, keep, is_best)


def _write(folder: Path, step: int, skeleton: str, tensors: dict[str, Tensor], keep: int, is_best: bool) -> Path:
    metadata = {"parts": skeleton, "digest": _digest(skeleton, tensors)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.safetensors"
    if is_best:  # written first: a run that resumes from this step will not save it as the best again
        write_atomically(folder / BEST, save(tensors, metadata))
        aside = folder / f".{path.name}.partial"
        aside.unlink(missing_ok=True)
        try:
            os.link(folder / BEST, aside)
        except OSError:  # the file system has no hard links
            shutil.copyfile(folder / BEST, aside)
        os.replace(aside, path)
    else:
        write_atomically(path, save(tensors, metadata))
    # Checkpoints of later steps were damaged, and the run resumed from before them.
    for old in sorted(other for other in folder.glob("step-*.safetensors") if other.name <= path.name)[:-keep]:
        old.unlink(missing_ok=True)
    return path


class CheckpointWriter:
    """Writes checkpoints while training continues: it waits for a copy of the tensors, not for the disk.

    Args:
        folder: the run's ``checkpoints/``.
        keep: how many checkpoints stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(self, step: int, parts: Tree, is_best: bool = False) -> None:
        """Begin to write the parts of one step, see `save_checkpoint`, once the previous one is written.

        Raises:
            OSError: the previous one could not be written.
        """
        tensors: dict[str, Tensor] = {}
        skeleton = json.dumps(_flatten(parts, "", tensors))
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self.wait()
        self._writing = self._thread.submit(_write, self._folder, step, skeleton, copies, self._keep, is_best)

    def wait(self) -> None:
        """Wait until the current checkpoint is on the disk.

        Raises:
            OSError: it could not be written; earlier ones are unchanged.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Finish the current checkpoint and end the thread."""
        self._thread.shutdown()


def checkpoint_bytes(parts: Tree) -> int:
    """Return how many bytes the tensors of a checkpoint of `parts` take."""
    tensors: dict[str, Tensor] = {}
    _flatten(parts, "", tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


class Found(NamedTuple):
    """A complete checkpoint."""

    path: Path
    digest: str
    parts: Tree


def load_checkpoint(path: Path, digest: str | None = None) -> Tree:
    """Read the parts of one checkpoint.

    Args:
        path: of the file.
        digest: of the checkpoint that it has to be; None takes any.

    Raises:
        ValueError: the file is truncated, altered or something else.
    """
    found = _read(path)
    if digest not in (None, found.digest):
        raise ValueError(f"{path} is another checkpoint of the same step")
    return found.parts


def _read(path: Path) -> Found:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if metadata["digest"] != _digest(metadata["parts"], tensors):
            raise ValueError("its checksum differs")
        return Found(path, metadata["digest"], _unflatten(json.loads(metadata["parts"]), tensors))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a complete checkpoint ({error})") from error


def newest_checkpoint(folder: Path) -> tuple[Found | None, list[str]]:
    """Return the newest complete checkpoint of `folder`, if any, and a line for each newer one skipped."""
    skipped: list[str] = []
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            return _read(path), skipped
        except ValueError as error:
            skipped.append(str(error))
    return None, skipped
