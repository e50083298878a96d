"""An exported ONNX model and its description of itself."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from deit_kd.files import checked
from deit_kd.interfaces import Answer, Head, InputError, StudentOutput, head_probabilities

SUFFIX = ".onnx"


class Facts(TypedDict):
    """The description that `deit-kd export` writes into a model."""

    classes: list[str]
    image_size: Annotated[int, Field(gt=0, le=2**14)]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"]
    crop_fraction: Annotated[float, Field(gt=0, le=1)]
    crop_mode: Literal["center", "border", "squash"]
    fusion: Literal["softmax", "logits"]
    outputs: Annotated[list[Answer], Field(min_length=1)]
    heads: NotRequired[list[Head]]  # of the student, whether or not they are outputs


@dataclass(frozen=True)
class OpenedModel:
    """A student that runs in onnxruntime, and its description of itself."""

    facts: Facts
    session: Any

    def answer(self, images: Tensor) -> StudentOutput:
        """Return the logits [B, C] of each of its heads, of which ``cls`` is one, for `images` [B, 3, H, W]."""
        heads = [name for name in self.facts["outputs"] if name != "fused"]
        answers = self.session.run(heads, {"images": np.ascontiguousarray(images.cpu().numpy())})
        return StudentOutput.of(dict(zip(heads, map(torch.from_numpy, answers), strict=True)))

    def probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """Return [B, C] of each of its answers to `images` [B, 3, H, W]; fused, too, if all heads are outputs."""
        answers = self.session.run(self.facts["outputs"], {"images": np.ascontiguousarray(images.cpu().numpy())})
        found: dict[str, Tensor] = dict(zip(self.facts["outputs"], map(torch.from_numpy, answers), strict=True))
        is_whole = "cls" in found and found.keys() >= {*self.facts.get("heads", found)}
        if is_whole and "fused" not in found:
            return head_probabilities(StudentOutput.of(found), self.facts["fusion"])
        return {name: answer if name == "fused" else answer.softmax(-1) for name, answer in found.items()}


def open_exported(file: Path) -> OpenedModel:
    """Open an ONNX model that ``deit-kd export`` wrote.

    Raises:
        InputError: it is not such a model, or onnxruntime is missing.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise InputError(f'{file}: needs onnxruntime; pip install "deit-kd[onnx]"')
    import onnxruntime

    try:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file}: cannot be opened by onnxruntime ({reason}); export the run again") from error
    try:
        said = session.get_modelmeta().custom_metadata_map
        facts = checked({key: json.loads(value) for key, value in said.items() if key in _KEYS}, Facts)
    except ValueError as error:
        raise InputError(
            f"{file}: does not record its classes and preprocessing ({error}); export the run with deit-kd"
        ) from error
    given = {*(output.name for output in session.get_outputs())}
    if not given >= set(facts["outputs"]) or [one.name for one in session.get_inputs()] != ["images"]:
        raise InputError(f"{file}: its inputs or outputs are not those that it describes; export the run again")
    return OpenedModel(facts, session)


_KEYS = frozenset(Facts.__annotations__)
