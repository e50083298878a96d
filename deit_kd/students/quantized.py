"""Students whose linear layers are integers: written to a folder, and opened again on torchao's int8 kernels."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, with_config
from safetensors.torch import load_file, save
from torch import Tensor, nn
from typing_extensions import TypedDict

from deit_kd.files import read_json, write_atomically, write_json
from deit_kd.interfaces import Head, InputError, Statistics
from deit_kd.models.create import RESERVED_ARGUMENTS, Pixels, chosen_attention, create_model
from deit_kd.models.integers import kept_in_float, rounded_linears, to_integers
from deit_kd.models.tokens import answer_with_patches, names_of_heads
from deit_kd.run_folder import QUANTIZED_FILE
from deit_kd.students.heads import TimmStudent

CONFIG = "config.json"
AS_WEIGHT = Callable[[Tensor, Tensor], nn.Parameter]


@with_config(ConfigDict(extra="allow"))
class QuantizedFacts(TypedDict):
    """What the ``config.json`` of a quantised student holds."""

    architecture: str
    model_args: dict[str, Any]
    classes: list[str]
    image_size: Pixels
    mean: Statistics
    std: Statistics
    interpolation: Literal["bilinear", "bicubic"]
    crop_fraction: float
    crop_mode: Literal["center", "border", "squash"]
    fusion: Literal["softmax", "logits"]
    heads: list[Head]
    layers: dict[str, Literal[8, 4]]  # bits of the weights, by the name of the layer


class QuantizedStudent(NamedTuple):
    """A student on int8 kernels, and what its folder says about it."""

    student: TimmStudent
    facts: QuantizedFacts


def save_quantized(student: TimmStudent, folder: Path, about: Mapping[str, Any]) -> None:
    """Write ``quantized.safetensors`` and ``config.json`` into `folder`, which exists.

    Integers of 4 bits lie two in a byte, the first in the lower half; a row of odd length ends with a 0.

    Args:
        student: with rounded layers, see `round_linears`; neither moved nor changed.
        folder: where the files go.
        about: architecture, classes, preprocessing and fusion, as exports describe them.
    """
    layers = rounded_linears(student.backbone)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in student.backbone.state_dict().items()}
    for path, layer in layers.items():
        integers, scale = to_integers(state[f"{path}.weight"], layer.bits)
        state[f"{path}.weight"] = _packed(integers) if layer.bits == 4 else integers
        state[f"{path}.scale"] = scale
    facts = {
        **about,
        "model_args": student.model_args,
        "heads": names_of_heads(student.backbone),
        "layers": {path: layer.bits for path, layer in layers.items()},
        "float": kept_in_float(student.backbone),
    }
    write_atomically(folder / QUANTIZED_FILE, save(state))
    write_json(folder / CONFIG, facts)


def open_quantized(folder: str | Path) -> QuantizedStudent:
    """Open the folder of a quantised student, on the CPU and in eval mode.

    Raises:
        InputError: it is not such a folder, its tensors do not fit its description, or torchao is missing or does not
            work with this torch.
    """
    place = Path(folder)
    if not (place / QUANTIZED_FILE).is_file():
        raise InputError(f"{folder}: holds no quantised student (no {QUANTIZED_FILE}); make one with deit-kd quantize")
    facts = read_json(place / CONFIG, QuantizedFacts)
    try:
        state = load_file(place / QUANTIZED_FILE)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{place / QUANTIZED_FILE}: cannot be read ({error}); quantise the run again") from error
    with chosen_attention("auto", torch.device("cpu")):
        backbone = create_model(
            f"{place / CONFIG}: architecture",
            facts["architecture"],
            image_size=facts["image_size"],
            distilled="dist" in facts["heads"],
            num_classes=len(facts["classes"]),
            **{name: value for name, value in facts["model_args"].items() if name not in RESERVED_ARGUMENTS},
        )
    if "patch" in facts["heads"]:
        answer_with_patches(f"{place / CONFIG}: heads", backbone)
    student = TimmStudent(backbone, facts["model_args"])
    as_weight = int8_kernels()
    try:
        weights = {path: _taken(state, backbone, path, bits) for path, bits in facts["layers"].items()}
        found = backbone.load_state_dict(state, strict=False)
        absent = {*found.missing_keys} - {f"{path}.weight" for path in weights}
        if absent or found.unexpected_keys:
            raise ValueError(", ".join(sorted(absent.union(found.unexpected_keys))[:3]))
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{folder}: its tensors do not fit its description ({reason}); quantise again") from error
    for path, (integers, scale) in weights.items():
        backbone.get_submodule(path).weight = as_weight(integers, scale)
    return QuantizedStudent(student.eval().requires_grad_(False), facts)


def _taken(state: dict[str, Tensor], backbone: nn.Module, path: str, bits: int) -> tuple[Tensor, Tensor]:
    """Take the integers [out, in] and the scales [out, 1] of a layer out of `state`."""
    layer = backbone.get_submodule(path)
    integers, scale = state.pop(f"{path}.weight"), state.pop(f"{path}.scale")
    if not isinstance(layer, nn.Linear) or integers.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"{path} is not a layer of integers")
    if bits == 4:
        integers = _unpacked(integers, layer.in_features)
    if integers.shape != layer.weight.shape or scale.shape != (layer.out_features, 1):
        raise ValueError(f"{path} is {list(integers.shape)}, not {list(layer.weight.shape)}")
    return integers, scale


def _packed(integers: Tensor) -> Tensor:
    """Return int8 values [out, in] from -8 to 7 as bytes [out, (in + 1) // 2]."""
    even = nn.functional.pad(integers, (0, integers.shape[1] % 2)).view(torch.uint8)
    return (even[:, ::2] & 15) | (even[:, 1::2] << 4)


def _unpacked(packed: Tensor, width: int) -> Tensor:
    """Return what `_packed` was given, of this width."""
    halves = torch.stack([packed << 4, packed & 240], dim=-1).flatten(1)[:, :width]
    return halves.contiguous().view(torch.int8) >> 4  # which keeps the sign


def int8_kernels() -> AS_WEIGHT:
    """Return what makes the weight of a linear layer from int8 [out, in] and scales [out, 1].

    Raises:
        InputError: torchao is missing, or does not work with this torch or this CPU.
    """
    if importlib.util.find_spec("torchao") is None:
        raise InputError('quantize: needs torchao; pip install "deit-kd[quantize]"')
    try:
        with _quiet():
            from torchao.quantization import Int8Tensor, PerRow
            from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

            dynamic = QuantizeTensorToInt8Kwargs(granularity=PerRow())

            def as_weight(integers: Tensor, scale: Tensor) -> nn.Parameter:
                block = [1, integers.shape[1]]
                tensor = Int8Tensor(integers, scale, block, torch.float32, act_quant_kwargs=dynamic)
                return nn.Parameter(tensor, requires_grad=False)

            _check_products(as_weight)
    except Exception as error:  # of its imports or its kernels; it may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise InputError(
            f"quantize: torchao {importlib.metadata.version('torchao')} does not work with torch {torch.__version__} "
            f"here ({reason}); install the torchao that was made for it"
        ) from error
    return as_weight


@torch.inference_mode()
def _check_products(as_weight: AS_WEIGHT) -> None:
    """Raise a ValueError unless the largest products come out right; 16-bit sums would overflow on an old CPU."""
    ones = torch.ones(64, 64)
    layer = nn.Linear(64, 64, bias=False)
    layer.weight = as_weight(torch.full((64, 64), 127, dtype=torch.int8), torch.full((64, 1), 1 / 127))
    if not torch.allclose(layer(ones), ones @ ones, rtol=0.02):
        raise ValueError("sums of int8 products are wrong")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torchao's import says about torch's own deprecations."""
    logger = logging.getLogger("torch.utils._pytree")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
