"""The table of formats: how each is written, and how the foreign library opens it again."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from deit_kd.exports.about import About
from deit_kd.exports.distilled_vit import CannotHold, as_distilled_vit
from deit_kd.interfaces import StudentOutput, head_probabilities
from deit_kd.layouts import to_transformers
from deit_kd.models import save_local_dir
from deit_kd.tokens import is_grafted, read_heads

Answers = dict[str, Tensor]  # logits cls [B, C], dist [B, C], probabilities fused [B, C]; those there are


class AllHeads(nn.Module):
    """Answers images with a tuple: cls logits and, with a distillation token, dist logits and fused probabilities."""

    def __init__(self, backbone: nn.Module, fusion: str) -> None:
        super().__init__()
        self.backbone, self.fusion = backbone, fusion

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return [B, C] for each output there is, for `images` [B, 3, H, W]."""
        output: StudentOutput = read_heads(self.backbone, images)
        if output.dist_logits is None:
            return (output.cls_logits,)
        return output.cls_logits, output.dist_logits, head_probabilities(output, self.fusion)["fused"]


@dataclass(frozen=True)
class Format:
    """One way out.

    Args:
        write: puts files into a folder; raises `CannotHold` where it has to.
        how_to_load: a sentence for the model card.
        reader: Python source that defines ``read(folder, images)`` with the foreign library alone and returns a
            list of outputs; it runs in a process of its own.
        libraries: modules that reading and writing need, with the extra that installs them.
    """

    write: Callable[[nn.Module, Path, About], None]
    how_to_load: str
    reader: str
    libraries: tuple[str, ...] = ()


def _write_timm(backbone: nn.Module, folder: Path, about: About) -> None:
    if not is_grafted(backbone):
        _write_local_dir(backbone, folder, about)
        return
    expressed = as_distilled_vit(backbone)
    twin = timm.create_model(expressed.architecture, num_classes=len(about.classes), **expressed.arguments)
    twin.load_state_dict(expressed.state)
    epsilons = [
        {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} for model in (backbone, twin)
    ]
    if epsilons[0] != epsilons[1]:
        raise CannotHold(f"its norms have the epsilon {max(epsilons[0]):g}, timm's distilled ViT {max(epsilons[1]):g}")
    _write_local_dir(twin, folder, about, expressed.arguments)


def _write_local_dir(backbone: nn.Module, folder: Path, about: About, model_args: dict[str, Any] | None = None) -> None:
    save_local_dir(
        backbone,
        folder,
        model_args=dict(about.model_args) if model_args is None else model_args,
        classes=about.classes,
        image_size=about.image_size,
        mean=about.mean,
        std=about.std,
        interpolation=about.interpolation,
        crop_fraction=about.crop_fraction,
        crop_mode=about.crop_mode,
    )


def _write_transformers(backbone: nn.Module, folder: Path, about: About) -> None:
    expressed = as_distilled_vit(backbone)
    state, arguments = expressed.state, expressed.arguments
    if arguments.get("pre_norm"):
        raise CannotHold("it has a norm before its blocks (pre_norm)")
    height, width = arguments["img_size"]
    if height != width or len(set(arguments["patch_size"])) != 1:
        raise CannotHold("its images or patches are not square")
    if about.crop_mode == "border":
        raise CannotHold("its images have a border (data.crop_mode), which transformers' processor does not make")
    if arguments.get("init_values") is not None:
        state = _without_layer_scale(state)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(save(to_transformers(state), metadata={"format": "pt"}))
    model: Any = backbone
    config = {
        "architectures": ["DeiTForImageClassificationWithTeacher"],
        "model_type": "deit",
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
        "num_channels": 3,
        "qkv_bias": arguments["qkv_bias"],
        "id2label": {str(label): name for label, name in enumerate(about.classes)},
        "label2id": {name: label for label, name in enumerate(about.classes)},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    edge = int(about.image_size / about.crop_fraction)
    preprocessor = {
        "image_processor_type": "DeiTImageProcessor",
        "do_resize": True,
        "size": {"height": edge, "width": edge} if about.crop_mode == "squash" else {"shortest_edge": edge},
        "resample": 2 if about.interpolation == "bilinear" else 3,
        "do_center_crop": True,
        "crop_size": {"height": about.image_size, "width": about.image_size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(about.mean),
        "image_std": list(about.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def _without_layer_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold each layer scale into the projection before it: gamma * (W x + b) = (gamma W) x + gamma b."""
    folded = {name: tensor for name, tensor in state.items() if not name.endswith(".gamma")}
    for scale, projection in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        for name in [name for name in state if name.endswith(f".{scale}.gamma")]:
            block, gamma = name.removesuffix(f".{scale}.gamma"), state[name]
            folded[f"{block}.{projection}.weight"] = state[f"{block}.{projection}.weight"] * gamma[:, None]
            folded[f"{block}.{projection}.bias"] = state[f"{block}.{projection}.bias"] * gamma
    return folded


def _write_onnx(backbone: nn.Module, folder: Path, about: About) -> None:
    folder.mkdir(parents=True)
    module, images = AllHeads(backbone, about.fusion).eval(), torch.zeros(2, 3, about.image_size, about.image_size)
    names = ["cls", "dist", "fused"][: len(module(images))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            module,
            (images,),
            str(folder / "student.onnx"),
            input_names=["images"],
            output_names=names,
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=4096)}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _write_torch_export(backbone: nn.Module, folder: Path, about: About) -> None:
    folder.mkdir(parents=True)
    images = torch.zeros(2, 3, about.image_size, about.image_size)
    batch = torch.export.Dim("batch", min=1, max=4096)
    module = AllHeads(backbone, about.fusion).eval()
    program = torch.export.export(module, (images,), dynamic_shapes={"images": {0: batch}})
    content = io.BytesIO()  # written at once, so that a full disk is an OSError
    torch.export.save(program, content)
    (folder / "student.pt2").write_bytes(content.getvalue())


_READ_TIMM = """
import timm
def read(folder, images):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if getattr(model, "head_dist", None) is None:
        return [model(images)]
    features = model.forward_features(images)
    return [model.head(features[:, 0]), model.head_dist(features[:, 1])]
"""
_READ_OURS = """
from deit_kd.origins import open_model
from deit_kd.tokens import read_heads
def read(folder, images):
    return [logits for logits in read_heads(open_model("folder", folder).eval(), images) if logits is not None]
"""
_READ_TRANSFORMERS = """
from transformers import DeiTForImageClassificationWithTeacher
def read(folder, images):
    model, info = DeiTForImageClassificationWithTeacher.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    output = model.eval()(images)
    return [output.cls_logits, output.distillation_logits]
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
    ),
    "local-dir": Format(
        _write_local_dir,
        'deit_kd loads it: `deit_kd.origins.open_model("folder", FOLDER)`, or `student.checkpoint: FOLDER` in a '
        "recipe.",
        _READ_OURS,
    ),
    "transformers": Format(
        _write_transformers,
        "`transformers.DeiTForImageClassificationWithTeacher.from_pretrained(FOLDER)` loads it; its `logits` are the "
        "mean of both heads' logits.",
        _READ_TRANSFORMERS,
        ("transformers",),
    ),
    "onnx": Format(
        _write_onnx,
        "`student.onnx`: `images` [batch, 3, H, W], normalised, to logits `cls`, `dist` and probabilities `fused`.",
        _READ_ONNX,
        ("onnx", "onnxscript", "onnxruntime"),
    ),
    "torch-export": Format(
        _write_torch_export,
        '`torch.export.load("student.pt2").module()` answers `images` [batch, 3, H, W], normalised, with logits cls, '
        "dist and probabilities fused.",
        _READ_TORCH_EXPORT,
    ),
}
