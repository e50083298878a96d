"""timm models by name, and weights from files; nothing is ever unpickled."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import set_fused_attn
from timm.models import save_for_hf
from torch import Tensor, nn

from deit_kd.interfaces import InputError, nearest

STUDENT_FOLDER = "student"  # of a run: its weights in timm's local-dir layout


def choose_attention(choice: str, device: torch.device) -> None:
    """Choose the attention of every model created from now on.

    ``auto`` is PyTorch's fused attention on CUDA and timm's plain one on the CPU, where the backward of the
    fused one takes half of a DeiT-Ti step (docs/performance.md).
    """
    fused = choice == "fused" or (choice == "auto" and device.type == "cuda")
    set_fused_attn(fused)


def check_known(key: str, name: str) -> None:
    """Raise an InputError with near names unless timm has a model called `name`."""
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise InputError(f"{key}: {name!r} is not a timm model{nearest(architecture, timm.list_models())}")


def size_argument(name: str, image_size: int) -> dict[str, int]:
    """Return what tells ``timm.create_model`` the image size; nothing where the model takes any size."""
    pretrained_cfg = timm.get_pretrained_cfg(name)
    fixed = pretrained_cfg is not None and pretrained_cfg.fixed_input_size
    return {"img_size": image_size} if fixed else {}


def create_model(
    key: str, name: str, *, pretrained: bool = False, image_size: int | None = None, **kwargs: Any
) -> nn.Module:
    """Create a timm model; `image_size` reaches only models that are built for one size.

    Args:
        key: the recipe's key, which errors begin with.
        name: a timm name, with or without a pretrained tag.
        pretrained: load timm's weights.
        image_size: pixels.
        kwargs: handed to ``timm.create_model``.

    Raises:
        InputError: timm does not know the model or an argument, the patch size does not divide the image
            size, or the weights cannot be had.
    """
    check_known(key, name)
    if image_size is not None:
        kwargs = {**size_argument(name, image_size), **kwargs}
    try:
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        cure = "check the network, or give a checkpoint" if pretrained else "see the arguments of timm's model"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{key}: {name!r} cannot be created with {kwargs} ({reason}); {cure}") from error
    _check_patches(key, model, image_size)
    return model


def _check_patches(key: str, model: nn.Module, image_size: int | None) -> None:
    patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if image_size is None or patch_size is None:
        return
    for patch in patch_size:
        if image_size % patch:
            below, above = image_size // patch * patch, (image_size // patch + 1) * patch
            choices = " or ".join(str(size) for size in (below, above) if size)
            raise InputError(
                f"data.image_size: {image_size} is not a multiple of {key}'s patch size {patch}; use {choices}"
            )


def weights_file(key: str, path: str | Path) -> Path:
    """Find the weights that `path` names: a file, a timm local-dir, or a run folder of ours.

    Raises:
        InputError: there are none.
    """
    place = Path(path).expanduser()
    for candidate in (place, place / "model.safetensors", place / STUDENT_FOLDER / "model.safetensors"):
        if candidate.is_file():
            return candidate
    raise InputError(f"{key}: {path} holds no weights; name a .safetensors or .pth file, a local-dir or a finished run")


def load_weights(key: str, path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from `weights_file(path)`; ``.pth`` only with ``weights_only=True``.

    Raises:
        InputError: the file cannot be read, or is something else.
    """
    file = weights_file(key, path)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{key}: {file} cannot be read as weights ({reason}); name another file") from error
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise InputError(
                f"{key}: {file} holds more than tensors and is not unpickled; save its state dict"
            ) from error
        raise
    state = loaded.get("model", loaded.get("state_dict", loaded)) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{key}: {file} holds no state dict (tensors by name, or under 'model')")
    return state


def load_into(key: str, model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load `state` into `model`, every tensor of it.

    Raises:
        InputError: names or shapes differ, with the first differences.
    """
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - state.keys()]
    problems += [f"{name} is unknown" for name in state.keys() - own.keys()]
    problems += [
        f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3])
        raise InputError(
            f"{key}: {path} does not fit the model ({len(problems)} differences: {shown}); name its own model"
        )
    model.load_state_dict(state)


def label_names(path: str | Path) -> tuple[str, ...] | None:
    """Return the class names that were saved beside the weights at `path`, if any were."""
    config_file = weights_file("checkpoint", path).parent / "config.json"
    if not config_file.is_file():
        return None
    names = json.loads(config_file.read_text()).get("label_names")
    return tuple(names) if isinstance(names, list) else None


def save_local_dir(
    model: nn.Module,
    folder: Path,
    *,
    model_args: dict[str, Any],
    classes: tuple[str, ...],
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    crop_fraction: float,
) -> None:
    """Save `model` so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` answers the same.

    The folder appears whole or not at all; one that is there is replaced.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    save_for_hf(
        copy.deepcopy(model).to(memory_format=torch.contiguous_format),
        str(aside),
        model_config={
            "num_classes": len(classes),
            "label_names": list(classes),
            "input_size": [3, image_size, image_size],
            "mean": list(mean),
            "std": list(std),
            "interpolation": interpolation,
            "crop_pct": crop_fraction,
        },
        model_args=model_args,
        safe_serialization=True,
    )
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of named tensors, names and order included."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
