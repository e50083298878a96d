"""Reads tensors from timm and from files, and writes a local-dir; nothing is ever unpickled."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor
from torch.torch_version import TorchVersion

from deit_kd.interfaces import HEADS, InputError, Preprocessing
from deit_kd.models.create import OF_THE_ARCHITECTURE, created_by_timm
from deit_kd.models.integers import bits_of
from deit_kd.models.names import check_known
from deit_kd.models.tokens import names_of_heads
from deit_kd.models.weights import classifier_names, to_timm_names

LEAST_TORCH = "2.10"  # older versions can be made to run code even with weights_only: CVE-2026-24747


def published_state(key: str, name: str) -> dict[str, Tensor]:
    """Return timm's own weights of a pretrained tag, as they were published.

    The model is built as the tag describes it, so that timm loads all of it. A head that still has its initial values
    was not loaded, whatever timm says, and is not returned.

    Raises:
        InputError: there are no such weights, or they cannot be downloaded.
    """
    check_known(key, name)
    cure = "check the network, or give a checkpoint"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = created_by_timm(key, name, cure, pretrained=True)
        torch.manual_seed(0)
        drawn = created_by_timm(key, name, cure, pretrained=False).state_dict()
    state = model.state_dict()
    for head in classifier_names(model):
        weight = f"{head}.weight"
        if weight in state and torch.equal(state[weight], drawn[weight]):
            del state[weight]
    return state


def read_state(key: str, file: Path) -> dict[str, Tensor]:
    """Return the state dict of a file under timm's names; ``.pth`` is read only with ``weights_only=True``.

    Raises:
        InputError: the file cannot be read, or is something else.
    """
    try:
        return to_timm_names(_load_state(key, file))
    except (KeyError, RuntimeError) as error:  # a third of a query, key and value is missing, or of another shape
        raise InputError(f"{key}: {file} lacks tensors of an attention ({error}); name another file") from error


def _load_state(key: str, file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors" and TorchVersion(torch.__version__) < LEAST_TORCH:
        raise InputError(
            f"{key}: {file} is not opened, since it could run code in torch {torch.__version__} (CVE-2026-24747); save "
            f"it as .safetensors, or upgrade to torch {LEAST_TORCH}"
        )
    try:
        if file.suffix == ".safetensors":
            return _without_the_rest(load_file(file))
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise InputError(
            f"{key}: {file} holds more than tensors and is not unpickled; save only its state dict"
        ) from error
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{key}: {file} cannot be read as weights ({reason}); name another file") from error
    state = loaded.get("model", loaded.get("state_dict", loaded)) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) and _is_plain(state[name]) for name in state):
        raise InputError(f"{key}: {file} holds no state dict (tensors by name, or under 'model'); save one")
    return state


def _without_the_rest(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a run's checkpoint without optimiser and meters: the averaged weights if it has them."""
    for network in (".trainer.ema.backbone.", ".trainer.student.backbone."):
        weights = {name.removeprefix(network): tensor for name, tensor in state.items() if name.startswith(network)}
        if weights:
            return weights
    return state


def _is_plain(value: Any) -> bool:
    """Return whether `value` is a tensor with all of its numbers in the file; one number can expand to a million."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def save_local_dir(
    model: Any,
    folder: Path,
    *,
    model_args: dict[str, Any],
    classes: tuple[str, ...],
    preprocessing: Preprocessing,
    heads: Sequence[str] = HEADS,
) -> None:
    """Save `model` so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` answers the same.

    What timm knows about the architecture's published weights (tag, licence, crop) is not written for these. The folder
    appears whole or not at all; an existing one is replaced. Of the model's heads, those that are among `heads` are
    described.
    """
    bits = bits_of(model)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    plain.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key in OF_THE_ARCHITECTURE}
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save_for_hf(
            plain,
            str(aside),
            model_config={
                "num_classes": len(classes),
                "label_names": list(classes),
                "heads": [head for head in names_of_heads(model) if head in heads],
                **({} if bits is None else {"bits": bits}),  # that its answers are rounded to
            },
            data_config={
                "input_size": (3, preprocessing.image_size, preprocessing.image_size),
                "mean": preprocessing.mean,
                "std": preprocessing.std,
                "interpolation": preprocessing.interpolation,
                "crop_pct": preprocessing.crop_fraction,
                "crop_mode": preprocessing.crop_mode,
            },
            model_args=model_args,
            safe_serialization=True,
        )
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(f"{folder}: cannot be written ({error}); free space, or name another folder") from error
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of named tensors, names and order included."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
