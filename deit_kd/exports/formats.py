"""The table of formats: how each is written, and how the target library opens it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save
from timm.models.levit import Levit
from torch import Tensor, nn

from deit_kd.exports.about import About
from deit_kd.exports.levit import as_transformers_levit
from deit_kd.exports.plain_vit import CannotHold, as_plain_vit
from deit_kd.exports.traced import write_onnx, write_torch_export
from deit_kd.interfaces import HEADS
from deit_kd.models.layouts import to_transformers
from deit_kd.models.state import save_local_dir
from deit_kd.models.tokens import is_grafted


@dataclass(frozen=True)
class Format:
    """One export format.

    Args:
        write: puts files into a folder; may raise `CannotHold`. A traced format takes `Choices`.
        how_to_load: a sentence for the model card.
        reader: Python source that defines ``read(folder, images)`` with only the target library and returns a list of
            outputs; it runs in its own process.
        heads: that it can tell apart; the others of a student are left out.
        libraries: modules needed for reading and writing, installed by the extra of the format's name.
    """

    write: Callable[..., None]
    how_to_load: str
    reader: str
    heads: tuple[str, ...] = HEADS
    libraries: tuple[str, ...] = ()
    is_traced: bool = False


def _write_timm(backbone: nn.Module, folder: Path, about: About) -> None:
    if not is_grafted(backbone):
        _write_local_dir(backbone, folder, about, heads=HEADS[:2])
        return
    expressed = as_plain_vit(backbone)
    twin = timm.create_model(expressed.architecture, num_classes=len(about.classes), **expressed.arguments)
    twin.load_state_dict(expressed.state)
    epsilons = [
        {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} for model in (backbone, twin)
    ]
    if epsilons[0] != epsilons[1]:
        raise CannotHold(f"its norms have the epsilon {max(epsilons[0]):g}, timm's distilled ViT {max(epsilons[1]):g}")
    _write_local_dir(twin, folder, about, expressed.arguments)


def _write_local_dir(
    backbone: nn.Module,
    folder: Path,
    about: About,
    model_args: dict[str, Any] | None = None,
    heads: tuple[str, ...] = HEADS,
) -> None:
    save_local_dir(
        backbone,
        folder,
        model_args=dict(about.model_args) if model_args is None else model_args,
        classes=about.classes,
        preprocessing=about.preprocessing,
        heads=heads,
    )


def _write_transformers(backbone: nn.Module, folder: Path, about: About) -> None:
    state, network = as_transformers_levit(backbone) if isinstance(backbone, Levit) else _as_transformers_vit(backbone)
    seen = about.preprocessing
    if seen.crop_mode == "border":
        raise CannotHold("its images have a border (data.crop_mode), which transformers' processor does not make")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    config = {
        **network,
        "num_channels": 3,
        "id2label": {str(label): name for label, name in enumerate(about.classes)},
        "label2id": {name: label for label, name in enumerate(about.classes)},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    edge = int(seen.image_size / seen.crop_fraction)
    preprocessor = {
        # DeiT's own takes no shortest edge before transformers 5, and ViT's does not crop; this one always does both.
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": edge, "width": edge} if seen.crop_mode == "squash" else {"shortest_edge": edge},
        "resample": 2 if seen.interpolation == "bilinear" else 3,
        "do_center_crop": True,
        "crop_size": {"height": seen.image_size, "width": seen.image_size},
        "do_convert_rgb": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(seen.mean),
        "image_std": list(seen.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def _as_transformers_vit(backbone: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a ViT's tensors under transformers' names, and what its ``config.json`` says of the network."""
    expressed = as_plain_vit(backbone)
    state, arguments = expressed.state, expressed.arguments
    if arguments.get("pre_norm"):
        raise CannotHold("it has a norm before its blocks (pre_norm)")
    height, width = arguments["img_size"]
    if height != width or len(set(arguments["patch_size"])) != 1:
        raise CannotHold("its images or patches are not square")
    if arguments.get("init_values") is not None:
        state = _without_layer_scale(state)
    model: Any = backbone
    return to_transformers(state), {
        "architectures": [
            "DeiTForImageClassificationWithTeacher" if expressed.is_distilled else "ViTForImageClassification"
        ],
        "model_type": "deit" if expressed.is_distilled else "vit",
        "hidden_size": arguments["embed_dim"],
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["num_heads"],
        "intermediate_size": round(arguments["mlp_ratio"] * arguments["embed_dim"]),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": model.norm.eps,
        "image_size": height,
        "patch_size": arguments["patch_size"][0],
        "qkv_bias": arguments["qkv_bias"],
    }


def _without_layer_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold each layer scale into the projection before it: gamma * (W x + b) = (gamma W) x + gamma b."""
    folded = {name: tensor for name, tensor in state.items() if not name.endswith(".gamma")}
    for scale, projection in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        for name in [name for name in state if name.endswith(f".{scale}.gamma")]:
            block, gamma = name.removesuffix(f".{scale}.gamma"), state[name]
            folded[f"{block}.{projection}.weight"] = state[f"{block}.{projection}.weight"] * gamma[:, None]
            folded[f"{block}.{projection}.bias"] = state[f"{block}.{projection}.bias"] * gamma
    return folded


_READ_TIMM = """
import json, timm
def read(folder, images):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if json.load(open(f"{folder}/config.json"))["heads"] == ["cls"]:
        return [model(images)]
    features = model.forward_features(images)
    if hasattr(model, "cls_token"):
        return [model.head(features[:, 0]), model.head_dist(features[:, 1])]
    vector = model.forward_head(features, pre_logits=True)
    heads = model if hasattr(model, "head_dist") else model.head
    return [heads.head(vector), heads.head_dist(vector)]
"""
_READ_OURS = """
from deit_kd.origins import open_model
from deit_kd.models.tokens import read_heads
def read(folder, images):
    return list(read_heads(open_model("folder", folder).eval(), images).logits.values())
"""
_READ_TRANSFORMERS = """
import json, transformers
from PIL import Image
def read(folder, images):
    said = json.load(open(f"{folder}/config.json"))
    network = getattr(transformers, said["architectures"][0])
    model, info = network.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    check_processor(folder, said["image_size"])
    output = model.eval()(images)
    if "cls_logits" not in output or said.get("heads") == ["cls"]:
        return [output.logits]
    return [output.cls_logits, output.distillation_logits]
def check_processor(folder, size):
    said = json.load(open(f"{folder}/preprocessor_config.json"))
    colour = torch.tensor([200.0, 100.0, 50.0])
    photo = Image.new("RGB", (3 * size, 2 * size), tuple(colour.int().tolist()))
    seen = transformers.AutoImageProcessor.from_pretrained(folder)(photo, return_tensors="pt")["pixel_values"]
    expected = (colour / 255 - torch.tensor(said["image_mean"])) / torch.tensor(said["image_std"])
    expected = expected.view(1, 3, 1, 1).expand(1, 3, size, size)
    assert seen.shape == expected.shape, f"its processor gives {tuple(seen.shape)}"
    assert torch.allclose(seen, expected, atol=1e-4), "its processor normalises differently"
"""
_READ_ONNX = """
import onnxruntime
def read(folder, images):
    session = onnxruntime.InferenceSession(f"{folder}/student.onnx", providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]
"""
_READ_TORCH_EXPORT = """
def read(folder, images):
    return list(torch.export.load(f"{folder}/student.pt2").module()(images))
"""

FORMATS: dict[str, Format] = {
    "timm": Format(
        _write_timm,
        'Plain timm loads it: `timm.create_model("local-dir:FOLDER", pretrained=True)`; its forward is the mean of '
        "both heads' logits.",
        _READ_TIMM,
        heads=HEADS[:2],
    ),
    "local-dir": Format(
        _write_local_dir,
        'deit_kd loads it: `deit_kd.origins.open_model("folder", FOLDER)`, or `student.checkpoint: FOLDER` in a '
        "recipe.",
        _READ_OURS,
    ),
    "transformers": Format(
        _write_transformers,
        "`transformers.DeiTForImageClassificationWithTeacher.from_pretrained(FOLDER)` loads it, whose `logits` are the "
        "mean of both heads' logits; a student without a distillation token is a `ViTForImageClassification`, a LeViT "
        "a `LevitForImageClassificationWithTeacher`. `AutoImageProcessor.from_pretrained(FOLDER)` prepares its images.",
        _READ_TRANSFORMERS,
        heads=HEADS[:2],
        libraries=("transformers",),
    ),
    "onnx": Format(
        write_onnx,
        "`student.onnx`: `images` [batch, 3, H, W], normalised, to logits of each head and probabilities `fused`; "
        "`metadata_props` and `config.json` hold the classes and how images are prepared.",
        _READ_ONNX,
        libraries=("onnx", "onnxscript", "onnxruntime"),
        is_traced=True,
    ),
    "torch-export": Format(
        write_torch_export,
        '`torch.export.load("student.pt2").module()` answers `images` [batch, 3, H, W], normalised, with logits of '
        "each head and probabilities fused; `config.json`, beside it and within, holds the classes and how images are "
        "prepared.",
        _READ_TORCH_EXPORT,
        is_traced=True,
    ),
}
