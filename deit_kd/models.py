"""timm models by name, and weights from files; nothing is ever unpickled."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import timm
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import set_fused_attn
from timm.models import is_model_in_modules, save_for_hf
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from deit_kd.interfaces import InputError, nearest
from deit_kd.tokens import complete_distilled_vit, graft, has_second_head
from deit_kd.weights import classifier_names, to_timm_names

LEAST_TORCH = "2.10"  # older ones can be made to run code, weights_only or not: CVE-2026-24747
Pixels = Annotated[int, Field(gt=0, le=2**14)]
Statistics = tuple[float, float, float]


def choose_attention(choice: str, device: torch.device) -> None:
    """Choose the attention of every model created from now on.

    ``auto`` is PyTorch's fused attention on CUDA and timm's plain one on the CPU, where the backward of the
    fused one takes half of a DeiT-Ti step (docs/evidence/performance.md).
    """
    fused = choice == "fused" or (choice == "auto" and device.type == "cuda")
    set_fused_attn(fused)


def check_known(key: str, name: str) -> None:
    """Raise an InputError with near names unless timm has a model called `name`, and the tag that it may end with."""
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise InputError(f"{key}: {name!r} is not a timm model{nearest(architecture, timm.list_models())}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{architecture}.*")
        raise InputError(f"{key}: {name!r} has a tag that timm does not know{nearest(name, tags)}") from error


def is_distilled_name(name: str) -> bool:
    """Return whether `name` is of a model with a distillation token; a tag may speak of another distillation.

    ``iformer_*_distilled`` have two heads that read the same features, as LeViT has, and no token.
    """
    architecture = name.split(".")[0]
    return "_distilled" in architecture and is_model_in_modules(architecture, ("deit", "pit"))


def plain_twin(name: str) -> str:
    """Return the name of the model without token and second head; a plain model's own."""
    return name.split(".")[0].replace("_distilled", "") if is_distilled_name(name) else name


def distilled_twin(name: str) -> str:
    """Return the name of timm's own model with the token that `graft` cannot give to `name`; another model's own."""
    architecture = name.split(".")[0]
    if is_distilled_name(name) or not is_model_in_modules(architecture, ("pit",)):
        return name
    stem, size = architecture.rsplit("_", 1)
    return f"{stem}_distilled_{size}"


def is_kin(name: str, other: str) -> bool:
    """Return whether two names are of one architecture, whatever their tags, and with or without a second head."""
    return plain_twin(name.split(".")[0]) == plain_twin(other.split(".")[0])


def size_argument(name: str, image_size: int) -> dict[str, int]:
    """Return what tells ``timm.create_model`` the image size; nothing where the model takes any size."""
    pretrained_cfg = timm.get_pretrained_cfg(name)
    fixed = pretrained_cfg is not None and pretrained_cfg.fixed_input_size
    return {"img_size": image_size} if fixed else {}


# What a recipe may not slip past the checks of weights and classes through ``args``.
RESERVED_ARGUMENTS = {
    "cache_dir": "set HF_HOME",
    "checkpoint_path": "name the file as the section's checkpoint",
    "distillation_token": "set distill.kind",
    "drop_path_rate": "set the section's drop_path",
    "features_only": "a student and a teacher need their heads",
    "image_size": "set the section's image_size",
    "img_size": "set the section's image_size",
    "in_chans": "images have three channels",
    "num_classes": "it follows from the data or the weights",
    "pretrained": "set it in the section itself",
    "pretrained_cfg": "name a pretrained tag, or a checkpoint",
    "pretrained_cfg_overlay": "name a pretrained tag, or a checkpoint",
}


# What a pretrained_cfg says about a network, whatever its weights are.
OF_THE_ARCHITECTURE = {
    "architecture",
    "classifier",
    "first_conv",
    "fixed_input_size",
    "input_size",
    "min_input_size",
    "num_classes",
    "pool_size",
}


def check_arguments(key: str, args: Mapping[str, Any]) -> None:
    """Raise an InputError where `args` of ``timm.create_model`` would choose weights or classes by another way."""
    for name, cure in RESERVED_ARGUMENTS.items():
        if name in args:
            raise InputError(f"{key}: {name} cannot be given here; {cure}")


def create_model(
    key: str,
    name: str,
    /,
    *,
    image_size: int | None = None,
    distillation_token: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Create a timm model with new weights; `image_size` reaches only models that are built for one size.

    Args:
        key: the recipe's key, which errors begin with.
        name: a timm name, with or without a pretrained tag.
        image_size: pixels.
        distillation_token: graft a token and its head onto a model that has none.
        kwargs: handed to ``timm.create_model``.

    Raises:
        InputError: timm does not know the model or an argument, or takes one that it does not use, the patch size
            does not divide the image size, or a distillation token cannot be grafted.
    """
    check_known(key, name)
    if image_size is not None:
        kwargs = {**size_argument(name, image_size), **kwargs}
    model = _created(key, name, "see the arguments of timm's model", **kwargs)
    _check_patches(key, model, image_size)
    if isinstance(model, VisionTransformerDistilled):
        complete_distilled_vit(key, model, kwargs)
    if distillation_token and not has_second_head(model):
        graft(key, model)
    return model


@torch.no_grad()
def check_answer(
    section: str, name: str, network: Callable[[Tensor], Sequence[Tensor | None]], image_size: int, columns: int
) -> None:
    """Refuse a network in eval whose heads do not answer two images with two rows of finite logits.

    Args:
        section: of the recipe, ``student`` or ``teacher``.
        name: a timm name.
        network: answers images [B, 3, H, W] with logits [B, C] of each head; None where it lacks one.
        image_size: pixels.
        columns: C.

    Raises:
        InputError: it cannot see such images, or answers with something else.
    """
    size_key = "data.image_size" if section == "student" else f"{section}.image_size"
    try:
        heads = network(torch.zeros(2, 3, image_size, image_size))
    except NotImplementedError as error:
        raise InputError(f"{section}.name: {name!r} does not classify ({error}); name another model") from error
    except Exception as error:  # what a recipe's arguments and size lead to shows in the forward pass alone
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{size_key}: {name!r} cannot see {image_size} pixels ({reason}); set another size, other {section}.args "
            f"or {section}.channels_last"
        ) from error
    for logits in heads:
        if logits is not None and (logits.shape != (2, columns) or not logits.isfinite().all()):
            raise InputError(
                f"{section}.name: {name!r} answers two images with {list(logits.shape)}, not [2, {columns}] finite "
                f"logits; see {section}.args"
            )


def leave_out_head(section: str, name: str, network: nn.Module, image_size: int) -> None:
    """Leave out the head of a network in eval, so that it answers with its pooled features [B, D].

    Raises:
        InputError: timm cannot do that to this network, or it does not answer two images with finite vectors then.
    """
    model: Any = network
    try:
        model.reset_classifier(0)
    except Exception as error:  # each of timm's models has a method of its own
        raise InputError(
            f"{section}.head: {name!r} cannot go without its head ({' '.join(str(error).split())[:160]}); name another"
        ) from error
    width = getattr(model, "head_hidden_size", model.num_features)
    check_answer(section, name, lambda images: [model.forward_head(model.forward_features(images))], image_size, width)


def _created(key: str, name: str, cure: str, **kwargs: Any) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except Exception as error:  # arguments of a recipe go through timm unchecked, and it stumbles over anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{key}: {name!r} cannot be created with {kwargs} ({reason}); {cure}") from error
    return model


def published_state(key: str, name: str) -> dict[str, Tensor]:
    """Return timm's own weights of a pretrained tag, as they were published.

    The model is built as the tag describes it, so that timm loads all of it. A head that comes out as it was
    drawn was not loaded, whatever timm says, and is not among what is returned.

    Raises:
        InputError: there are no such weights, or they cannot be had.
    """
    check_known(key, name)
    cure = "check the network, or give a checkpoint"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _created(key, name, cure, pretrained=True)
        torch.manual_seed(0)
        drawn = _created(key, name, cure, pretrained=False).state_dict()
    state = model.state_dict()
    for head in classifier_names(model):
        weight = f"{head}.weight"
        if weight in state and torch.equal(state[weight], drawn[weight]):
            del state[weight]
    return state


def _check_patches(key: str, model: nn.Module, image_size: int | None) -> None:
    """Refuse a size whose last pixels no patch would see; overlapping and padded patches see all of them."""
    embedding = getattr(model, "patch_embed", None)
    patches = getattr(embedding, "proj", None)
    if image_size is None or not isinstance(patches, nn.Conv2d) or patches.kernel_size != patches.stride:
        return
    if getattr(embedding, "dynamic_img_pad", False):
        return
    for patch in patches.stride:
        if image_size % patch:
            below, above = image_size // patch * patch, (image_size // patch + 1) * patch
            choices = " or ".join(str(size) for size in (below, above) if size)
            raise InputError(
                f"data.image_size: {image_size} is not a multiple of {key}'s patch size {patch}; use {choices}"
            )


def read_state(key: str, file: Path) -> dict[str, Tensor]:
    """Return the state dict of a file under timm's names; ``.pth`` is read with ``weights_only=True`` alone.

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
            f"{key}: {file} is not opened by torch {torch.__version__}, in which such a file can run code "
            f"(CVE-2026-24747); save it as .safetensors, or upgrade to torch {LEAST_TORCH}"
        )
    try:
        if file.suffix == ".safetensors":
            return _without_the_rest(load_file(file))
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise InputError(f"{key}: {file} holds more than tensors and is not unpickled; save its state dict") from error
    except Exception as error:  # a damaged file makes its reader stumble over anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{key}: {file} cannot be read as weights ({reason}); name another file") from error
    state = loaded.get("model", loaded.get("state_dict", loaded)) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) and _is_plain(state[name]) for name in state):
        raise InputError(f"{key}: {file} holds no state dict (tensors by name, or under 'model'); save one")
    return state


def _without_the_rest(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a run's checkpoint without optimiser and meters: the average's weights where it keeps one."""
    for network in (".trainer.ema.backbone.", ".trainer.student.backbone."):
        weights = {name.removeprefix(network): tensor for name, tensor in state.items() if name.startswith(network)}
        if weights:
            return weights
    return state


def _is_plain(value: Any) -> bool:
    """Return whether `value` is a tensor whose every number is in its file: one number can pose as a million."""
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
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    crop_fraction: float,
    crop_mode: str = "center",
) -> None:
    """Save `model` so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` answers the same.

    What timm knows about the architecture's published weights (tag, licence, crop) is not said of these. The folder
    appears whole or not at all; one that is there is replaced.
    """
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    plain.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key in OF_THE_ARCHITECTURE}
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save_for_hf(
            plain,
            str(aside),
            model_config={"num_classes": len(classes), "label_names": list(classes)},
            data_config={
                "input_size": (3, image_size, image_size),
                "mean": mean,
                "std": std,
                "interpolation": "bicubic" if interpolation == "random" else interpolation,
                "crop_pct": crop_fraction,
                "crop_mode": crop_mode,
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
