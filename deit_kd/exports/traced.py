"""A student as a graph that contains everything needed for deployment: ONNX and ``torch.export``."""

from __future__ import annotations

import copy
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import Format as Layout
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deit_kd.exports.about import About
from deit_kd.exports.plain_vit import CannotHold
from deit_kd.files import write_json
from deit_kd.interfaces import InputError, head_probabilities
from deit_kd.models.tokens import names_of_heads, read_heads

OPSET = 18  # the first that torch's exporter supports
LARGEST_BATCH = 4096
MOST_STEPS = 256  # patches, or strides of a CNN, along an edge
STRIDE = 32  # of a network without patches


@dataclass(frozen=True)
class Choices:
    """How a student is traced.

    Args:
        outputs: some of `ANSWERS`, in their order; None is all that the student has.
        opset: of ONNX.
        dynamic_size: whether images may have another size than the student was trained with.
        precision: of the weights, ``fp32``, ``fp16`` or, for ONNX, ``int8``; images and outputs are fp32.
    """

    outputs: tuple[str, ...] | None = None
    opset: int = OPSET
    dynamic_size: bool = False
    precision: str = "fp32"

    def outputs_of(self, backbone: nn.Module) -> tuple[str, ...]:
        """Return the outputs of a student.

        Raises:
            InputError: it lacks one that was asked for.
        """
        heads = names_of_heads(backbone)
        there: tuple[str, ...] = (*heads, "fused") if len(heads) > 1 else heads
        for name in self.outputs or ():
            if name not in there:
                raise InputError(f"--outputs: {name!r}, but the student has {', '.join(there)}; name one of these")
        return self.outputs or there


class Answering(nn.Module):
    """Answers images with a tuple: logits of each head, and probabilities ``fused``, as requested.

    Args:
        backbone: a student; neither moved nor changed.
        fusion: of its heads, ``softmax`` or ``logits``.
        choices: of outputs, precision and size.

    Raises:
        CannotHold: its size cannot be made dynamic.
    """

    def __init__(self, backbone: nn.Module, fusion: str, choices: Choices | None = None) -> None:
        super().__init__()
        choices = choices or Choices()
        self.outputs, self.fusion = choices.outputs_of(backbone), fusion
        backbone = resizable(backbone) if choices.dynamic_size else backbone
        self.dtype = torch.float16 if choices.precision == "fp16" else torch.float32
        self.backbone = copy.deepcopy(backbone).half() if choices.precision == "fp16" else backbone
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return [B, C] for each output, for `images` [B, 3, H, W]."""
        output = read_heads(self.backbone, images.to(self.dtype)).mapped(Tensor.float)
        answers = output.logits
        if "fused" in self.outputs:
            answers["fused"] = head_probabilities(output, self.fusion)["fused"]
        chosen: Any = tuple(answers[name] for name in self.outputs)
        return chosen


def resizable(backbone: nn.Module) -> nn.Module:
    """Return a copy of a student whose position embedding is resized to that of its images, as timm does it.

    Raises:
        CannotHold: its position embedding or its attention biases (LeViT) have a fixed size.
    """
    model: Any = copy.deepcopy(backbone)
    if isinstance(backbone, VisionTransformer) and backbone.pos_embed is not None:
        model.dynamic_img_size = True
        model.patch_embed.strict_img_size = False
        model.patch_embed.flatten, model.patch_embed.output_fmt = False, Layout.NHWC
        return model
    if getattr(model, "pos_embed", None) is not None or hasattr(model, "rope") or hasattr(model, "patch_embed"):
        raise CannotHold("its position embedding has a fixed size (dynamic_size)")
    if _has_attention_biases(backbone):
        raise CannotHold("its attention biases have a fixed size (dynamic_size)")
    return model


def _has_attention_biases(backbone: nn.Module) -> bool:
    """Return whether attention adds a bias for each pair of places, as in LeViT."""
    return any(name.endswith("attention_bias_idxs") for name, _ in backbone.named_buffers())


def size_step(backbone: nn.Module) -> int:
    """Return the step between image sizes: the patch size, or the stride of a CNN."""
    patch_embed: Any = getattr(backbone, "patch_embed", None)
    return STRIDE if patch_embed is None else int(patch_embed.patch_size[0])


def write_onnx(backbone: nn.Module, folder: Path, about: About, choices: Choices) -> None:
    """Write ``student.onnx`` and ``config.json``; they contain nothing about this machine."""
    module, images, shapes = _traceable(backbone, about, choices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            module,
            (images,),
            input_names=["images"],
            output_names=list(module.outputs),
            dynamic_shapes={"images": shapes},
            opset_version=choices.opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model: Any = program.model_proto
    if choices.precision == "int8":
        model = _in_integers(model)
    opset = next(known.version for known in model.opset_import if known.domain in ("", "ai.onnx"))
    if opset != choices.opset:
        raise InputError(
            f"--opset: torch writes this student in opset {opset}, not in {choices.opset}; use --opset {opset}"
        )
    _forget_the_machine(model)
    del model.metadata_props[:]
    facts = _facts(module, about, choices) | {"opset": opset}
    for name, value in facts.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    folder.mkdir(parents=True)
    (folder / "student.onnx").write_bytes(model.SerializeToString())
    write_json(folder / "config.json", facts)


def _in_integers(model: Any) -> Any:
    """Return an ONNX model whose linear layers are int8 by row, and their inputs uint8, chosen at each call."""
    from onnx import load  # as onnxruntime's quantiser does, which no other export needs
    from onnxruntime.quantization import QuantType, quantize_dynamic

    _give_each_its_own_weight(model.graph)
    del model.graph.value_info[:]  # the shapes that torch writes of transposed weights contradict those inferred
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it suggests a preprocessing that torch's exporter has done already
    try:
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = Path(place) / "student.onnx"
            of_weights = {"op_types_to_quantize": ["MatMul", "Gemm"], "weight_type": QuantType.QInt8}
            quantize_dynamic(model, file, per_channel=True, **of_weights)
            return load(file)
    except RuntimeError as error:
        raise CannotHold(f"onnxruntime cannot turn it into int8: {' '.join(str(error).split())[:80]}") from error
    finally:
        logging.disable(disabled)


def _give_each_its_own_weight(graph: Any) -> None:
    """Copy a weight for each layer but the first that reads it: onnxruntime's quantiser transposes it once for each.

    The head that also answers for the patches is such a weight.
    """
    weights, read = {weight.name: weight for weight in graph.initializer}, set[str]()
    for node in graph.node:
        for place, name in enumerate(node.input if node.op_type in ("MatMul", "Gemm") else ()):
            if name in weights and name in read:
                copy = graph.initializer.add()
                copy.CopyFrom(weights[name])
                copy.name = node.input[place] = f"{name}_of_{node.name}"
            read.add(name)


def write_torch_export(backbone: nn.Module, folder: Path, about: About, choices: Choices) -> None:
    """Write ``student.pt2`` and ``config.json``, which is also inside it; they contain nothing about this machine."""
    module, images, shapes = _traceable(backbone, about, choices)
    program = torch.export.export(module, (images,), dynamic_shapes={"images": shapes})
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    facts = _facts(module, about, choices)
    content = io.BytesIO()  # written to the file in one piece, so that a full disk raises OSError
    torch.export.save(program, content, extra_files={"config.json": json.dumps(facts)})
    folder.mkdir(parents=True)
    (folder / "student.pt2").write_bytes(content.getvalue())
    write_json(folder / "config.json", facts)


def _traceable(backbone: nn.Module, about: About, choices: Choices) -> tuple[Answering, Tensor, dict[int, Any]]:
    """Return what is traced, images to trace it with, and which of their dimensions may change."""
    module, size = Answering(backbone, about.fusion, choices), about.preprocessing.image_size
    shapes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)}
    if not choices.dynamic_size:
        images = torch.zeros(2, 3, size, size)
        if _has_attention_biases(module):
            with torch.no_grad():  # timm keeps their values at the first answer: a tracer must not see it do so
                module(images)
        return module, images, shapes
    step = size_step(backbone)
    least = 3 if step == STRIDE else 2  # an edge of one patch would be traced as a special case
    for dimension, name in ((2, "rows"), (3, "columns")):
        shapes[dimension] = step * torch.export.Dim(name, min=least, max=MOST_STEPS)
    # Unequal edges, neither of them the student's: the tracer would take equal sizes as always equal.
    return module, torch.zeros(2, 3, size + 3 * step, size + 5 * step), shapes


def _facts(module: Answering, about: About, choices: Choices) -> dict[str, Any]:
    chosen = {"precision": choices.precision, "dynamic_size": choices.dynamic_size}
    heads = list(names_of_heads(module.backbone))
    return {**about.for_deployment(), "heads": heads, "outputs": list(module.outputs), **chosen}


def _forget_the_machine(model: Any) -> None:
    """Remove what the exporter records about each node: lines of source code, with their paths."""
    for graph in (model.graph, *model.functions):
        _forget(graph)


def _forget(graph: Any) -> None:
    for value in _parts(graph):
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    _forget(inner)


def _parts(graph: Any) -> Iterable[Any]:
    yield graph
    for field in ("node", "input", "output", "initializer", "value_info"):
        yield from (part for part in getattr(graph, field, ()) if not isinstance(part, str))
