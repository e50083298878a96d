"""Loads weights from anywhere into a model, and accounts for every tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn
from torch.nn import functional as F

from deit_kd.interfaces import InputError, counted
from deit_kd.models.layouts import from_transformers, is_transformers

TOKEN_NOISE = 0.1  # share of the class token's spread: two identical tokens would stay alike (cosine .999 in the paper)

_OF_DISTILLATION = re.compile(r"^dist_token$|\[dist\]|\b(head|fc_norm)_dist\b")


@dataclass
class Account:
    """What happened to every tensor of a model and of the weights that it was started from.

    The rows of ``pos_embed``, and the halves of a ``cls_token`` that holds both tokens, are listed separately.

    Args:
        source: where the weights came from.
        loaded: the model's tensors that were copied unchanged from the source.
        interpolated: resized to another resolution or patch size, with both shapes.
        derived: made from another tensor, with its name: a new token from the class token.
        initialised: newly initialised.
        left_out: the source's tensors that the model does not have.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    interpolated: dict[str, str] = field(default_factory=dict)
    derived: dict[str, str] = field(default_factory=dict)
    initialised: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return the account as ``run.json`` keeps it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the lines to print: counts, and every tensor that was not simply loaded."""
        changes = {
            "interpolated": [f"{name} {shapes}" for name, shapes in self.interpolated.items()],
            "derived": [f"{name} from {origin}" for name, origin in self.derived.items()],
            "newly initialised": self.initialised,
            "left out": self.left_out,
        }
        loaded = f"weights: {counted(len(self.loaded), 'tensor')} loaded from {self.source}"
        return [loaded] + [f"weights: {what}: {', '.join(names)}" for what, names in changes.items() if names]


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the model's heads, e.g. ``("fc",)`` or ``("head", "head_dist")``."""
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    if not hasattr(model, "head_dist") or any(name.startswith("head_dist") for name in names):
        return names
    return (*names, *(name.replace("head", "head_dist", 1) for name in names))  # levit_384_s8 names one of its heads


def to_timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` under timm's names, whether it came from timm, deit, DDP or transformers."""
    bare = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return from_transformers(bare) if is_transformers(bare) else bare


def holds_distillation_token(state: dict[str, Tensor]) -> bool:
    """Return whether `state`, under timm's names, is of a model with a distillation token."""
    return "dist_token" in state or _both_tokens(state) is not None


def holds_second_head(state: dict[str, Tensor]) -> bool:
    """Return whether `state`, under timm's names, is of a model with a distillation head."""
    return any("head_dist" in name.split(".") for name in state)


def _both_tokens(state: dict[str, Tensor]) -> Tensor | None:
    """Return a ``cls_token`` [1, 2, D] that holds both tokens, as in pit and in grafted models."""
    cls_token = state.get("cls_token")
    return cls_token if cls_token is not None and cls_token.ndim == 3 and cls_token.shape[1] == 2 else None


def fit_weights(
    key: str,
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    source: str,
    new_heads: bool = False,
    token: str = "cls",
    strict: bool = False,
    own_model: str | None = None,
) -> Account:
    """Load `state` into `model`, adapt what can only be adapted in one way, and account for every tensor.

    A different number of classes gives new heads; a new resolution interpolates ``pos_embed`` and keeps the rows of
    prefix tokens; another patch size resamples the patch embedding (FlexiViT's pseudo-inverse, as in timm). A plain
    checkpoint fits a distilled model, and vice versa.

    Args:
        key: the recipe's key, which errors begin with.
        model: a timm model, its new weights already drawn.
        state: a state dict, see `to_timm_names`.
        source: where it came from, for the account.
        new_heads: give the model new heads even if the old ones fit.
        token: ``cls`` starts a distillation token that the source lacks from its class token, with a little
            noise, and the token's head from the class head; ``scratch`` leaves both as initialised.
        strict: nothing may be new, derived or left out, as for a teacher or a run's own student.
        own_model: the keys that name the model of the weights, for the error; None if it is not known.

    Raises:
        InputError: a tensor is missing, unknown or of another shape, with the first differences.
    """
    own = _apart(model, model.state_dict())
    given = _apart(model, _layer_scales(to_timm_names(state), own))
    heads = tuple(f"{name}." for name in classifier_names(model))
    account = Account(source)
    fitted = dict(own)
    problems: list[str] = []
    used: set[str] = set()
    for name, drawn in own.items():
        taken = given.get(name)
        if taken is not None and taken.is_floating_point() != drawn.is_floating_point():
            problems.append(f"{name} is of {taken.dtype}")
            continue
        is_head = name.startswith(heads)
        if is_head and not strict and (new_heads or (taken is not None and taken.shape != drawn.shape)):
            account.initialised.append(name)
        elif taken is not None and taken.shape == drawn.shape:
            fitted[name] = taken
            account.loaded.append(name)
            used.add(name)
        elif taken is not None and (resized := _resized(model, name, taken, drawn)) is not None:
            fitted[name] = resized
            account.interpolated[name] = f"{list(taken.shape)} -> {list(drawn.shape)}"
            used.add(name)
        elif taken is not None:
            problems.append(f"{name} is {list(taken.shape)}, not {list(drawn.shape)}")
        elif not strict and (origin := _origin_of(name)) is not None:
            if origin in account.loaded and (token == "cls" or name.startswith("fc_norm")):
                fitted[name] = _with_noise(fitted[origin]) if name == "dist_token" else fitted[origin].clone()
                account.derived[name] = origin
            else:
                account.initialised.append(name)
        elif not strict and is_head:
            account.initialised.append(name)
        else:
            problems.append(f"{name} is missing")
    for name in given.keys() - used:
        if not strict and (_origin_of(name) is not None or name.startswith(heads)):
            account.left_out.append(name)
        elif name not in own:
            problems.append(f"{name} is unknown")
    if problems:
        shown = "; ".join(sorted(problems)[:3])
        of_one_size = all("attention_biases" in problem for problem in problems)
        named = "name its own model" if own_model is None else f"name its own model: {own_model}"
        cure = "set the image size that its attention biases belong to" if of_one_size else named
        raise InputError(f"{key}: {source} does not fit the model ({len(problems)} differences: {shown}); {cure}")
    account.left_out.sort()
    model.load_state_dict(_together(model, fitted))
    return account


def _origin_of(name: str) -> str | None:
    """Return what a part of the distillation token or of its head starts from if the source has none."""
    if not _OF_DISTILLATION.search(name):
        return None
    return name.replace("dist_token", "cls_token").replace("[dist]", "[cls]").replace("_dist", "")


def _layer_scales(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the layer scales of deit3's published weights (``gamma_1``) under timm's names in `own`.

    EVA, BEiT and CaiT call theirs ``gamma_1`` in timm, too.
    """
    renamed = {name: re.sub(r"\bgamma_(\d)$", r"ls\1.gamma", name) for name in state.keys() - own.keys()}
    return {renamed[name] if renamed.get(name) in own else name: tensor for name, tensor in state.items()}


def _apart(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split what one tensor holds of several tokens: both tokens of a ``cls_token``, the rows of ``pos_embed``."""
    apart = dict(state)
    both, positions = _both_tokens(state), apart.get("pos_embed")
    if both is not None:
        apart["cls_token"], apart["dist_token"] = both[:, :1], both[:, 1:]
    has_grid = hasattr(getattr(model, "patch_embed", None), "grid_size")
    if "cls_token" not in apart or positions is None or positions.ndim != 3 or not has_grid:
        return apart
    registers = apart.get("reg_token")
    tokens = 1 + ("dist_token" in apart) + (registers.shape[1] if registers is not None and registers.ndim == 3 else 0)
    rows = _prefix_rows(positions.shape[1], tokens, _grid(model), getattr(model, "no_embed_class", False))
    if rows:
        first_register = 1 + ("dist_token" in apart)
        apart["pos_embed[cls]"] = positions[:, :1]
        if "dist_token" in apart:
            apart["pos_embed[dist]"] = positions[:, 1:2]
        if first_register < rows:
            apart["pos_embed[reg]"] = positions[:, first_register:rows]
    apart["pos_embed"] = positions[:, rows:]
    return apart


def _together(model: Any, apart: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `_apart`, in the layout of `model`."""
    state = dict(apart)
    if "dist_token" in state and not hasattr(model, "dist_token"):
        state["cls_token"] = torch.cat([state["cls_token"], state.pop("dist_token")], dim=1)
    rows = [state.pop(f"pos_embed[{token}]") for token in ("cls", "dist", "reg") if f"pos_embed[{token}]" in state]
    if rows:
        state["pos_embed"] = torch.cat([*rows, state["pos_embed"]], dim=1)
    return state


def _grid(model: Any) -> tuple[int, int]:
    height, width = model.patch_embed.grid_size
    return height, width


def _prefix_rows(length: int, tokens: int, grid: tuple[int, int], no_embed_class: bool) -> int:
    """Return how many rows of a position embedding belong to prefix tokens: the rest must form a grid of patches."""
    choices = (0, tokens) if no_embed_class else (tokens, 0)
    for rows in choices:
        patches = length - rows
        if patches == math.prod(grid) or (patches > 0 and math.isqrt(patches) ** 2 == patches):
            return rows
    return choices[0]


def _resized(model: Any, name: str, taken: Tensor, drawn: Tensor) -> Tensor | None:
    """Return `taken` in the shape of `drawn` if only resolution or patch size differ, else None."""
    if taken.ndim != drawn.ndim:
        return None
    if name == "pos_embed" and taken.ndim == 3 and taken.shape[2] == drawn.shape[2]:
        if math.isqrt(taken.shape[1]) ** 2 != taken.shape[1]:
            return None
        return resample_abs_pos_embed(taken, new_size=list(_grid(model)), num_prefix_tokens=0)
    if name == "pos_embed" and taken.ndim == 4 and taken.shape[1] == drawn.shape[1]:  # pit: [1, D, H, W]
        return F.interpolate(taken, size=drawn.shape[2:], mode="bicubic", antialias=True)
    if name == "patch_embed.proj.weight" and taken.ndim == 4 and taken.shape[:2] == drawn.shape[:2]:
        return resample_patch_embed(taken, list(drawn.shape[2:]))
    return None


def _with_noise(token: Tensor) -> Tensor:
    return token + TOKEN_NOISE * token.std() * torch.randn_like(token)
