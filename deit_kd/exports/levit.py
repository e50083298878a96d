"""A student expressed as transformers' LeViT (Graham et al., ICCV 2021): the same tensors under other names."""

from __future__ import annotations

import re
from typing import Any

from timm.models.levit import Attention, AttentionDownsample, Levit, LevitMlp
from torch import Tensor, nn

from deit_kd.exports.plain_vit import CannotHold
from deit_kd.models.tokens import names_of_heads

STRIDE = 16  # of the stem, which is also fixed in transformers
STAGES = 3

_HEADS = {"head": "classifier", "head_dist": "classifier_distill"}
_LAYERS = {
    "attn.qkv": (0, "module.queries_keys_values"),
    "attn.proj.ln": (0, "module.projection"),
    "attn": (0, "module"),
    "mlp.ln1": (1, "module.linear_up"),
    "mlp.ln2": (1, "module.linear_down"),
}
_BETWEEN = {  # layers after the blocks of the stage before
    "attn_downsample.kv": (0, "keys_values"),
    "attn_downsample.q.ln": (0, "queries"),
    "attn_downsample.proj.ln": (0, "projection"),
    "attn_downsample": (0, ""),
    "mlp.ln1": _LAYERS["mlp.ln1"],
    "mlp.ln2": _LAYERS["mlp.ln2"],
}


def as_transformers_levit(backbone: Levit) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Express a LeViT, of linear layers or of convolutions, as transformers' one.

    Returns:
        Its tensors under transformers' names, and what its ``config.json`` says of the network. Two heads that are
        averaged are the model with both, whose ``logits`` are their mean; ``heads`` is then ``["cls"]``.

    Raises:
        CannotHold: it has a part that transformers' class does not have.
    """
    reason = _reason(backbone)
    if reason is not None:
        raise CannotHold(reason)
    model: Any = backbone
    depths = [len(stage.blocks) for stage in model.stages]
    first = [stage.blocks[0] for stage in model.stages]
    has_two = hasattr(model, "head_dist")
    hidden = [block.mlp.ln1.linear.weight.shape[0] for block in first]
    config = {
        "architectures": ["LevitForImageClassificationWithTeacher" if has_two else "LevitForImageClassification"],
        "model_type": "levit",
        "heads": list(names_of_heads(backbone)),
        "image_size": first[0].attn.resolution[0] * STRIDE,
        "patch_size": STRIDE,
        "hidden_sizes": list(model.embed_dim),
        "num_attention_heads": [block.attn.num_heads for block in first],
        "depths": depths,
        "key_dim": [block.attn.key_dim for block in first],
        "attention_ratio": [block.attn.val_dim // block.attn.key_dim for block in first],
        "mlp_ratio": [inner // width for inner, width in zip(hidden, model.embed_dim, strict=True)],
    }
    state = {_renamed(name, depths): _as_linear(name, tensor) for name, tensor in model.state_dict().items()}
    return state, config


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    """Return the weight of a convolution of one pixel as that of a linear layer; the stem keeps its convolutions."""
    of_one_pixel = tensor.ndim == 4 and not name.startswith("stem.")
    return (tensor[:, :, 0, 0] if of_one_pixel else tensor).detach().clone().contiguous()


def _renamed(name: str, depths: list[int]) -> str:
    name = re.sub(r"\.bn\.", ".batch_norm.", name)
    if found := re.fullmatch(r"stem\.conv(\d)\.(.+)", name):
        rest = found[2].replace("linear.", "convolution.")
        return f"levit.patch_embeddings.embedding_layer_{found[1]}.{rest}"
    if found := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", name):
        stage, block = int(found[1]), int(found[2])
        return _layer(stage, 2 * block, found[3], _LAYERS)
    if found := re.fullmatch(r"stages\.(\d)\.downsample\.(.+)", name):
        before = int(found[1]) - 1
        return _layer(before, 2 * depths[before], found[2], _BETWEEN)
    head, _, rest = name.partition(".")
    return f"{_HEADS[head]}.{rest}"


def _layer(stage: int, number: int, name: str, parts: dict[str, tuple[int, str]]) -> str:
    part = next(part for part in parts if name.startswith(f"{part}."))
    further, theirs = parts[part]
    place = f"levit.encoder.stages.{stage}.layers.{number + further}"
    return ".".join(filter(None, (place, theirs, name.removeprefix(f"{part}."))))


def _reason(model: Any) -> str | None:
    stride = getattr(model.stem, "stride", None)
    if stride != STRIDE:
        return f"its stem has the stride {stride}, in transformers' LeViT {STRIDE}"
    if len(model.stages) != STAGES:
        return f"it has {len(model.stages)} stages, transformers' LeViT {STAGES}"
    activations = {type(part) for name, part in model.named_modules() if re.search(r"(^|\.)act\d?$", name)}
    if other := activations - {nn.Hardswish}:
        return f"its activation is {other.pop().__name__}, in transformers' LeViT Hardswish"
    attentions: list[Any] = [part for part in model.modules() if isinstance(part, Attention | AttentionDownsample)]
    if any(part.resolution[0] != part.resolution[1] for part in attentions):
        return "its images are not square"
    mlps = [part.ln1.linear.weight.shape for part in model.modules() if isinstance(part, LevitMlp)]
    if any(part.val_dim % part.key_dim for part in attentions) or any(inner % width for inner, width, *_ in mlps):
        return "its attention or MLP widens by a fraction, in transformers' LeViT by whole numbers"
    return None
