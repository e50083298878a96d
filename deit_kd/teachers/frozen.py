"""A network that teaches: always in eval mode, without gradient, with the input statistics it was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deit_kd.features import Features, answer_with_features, check_layers, layer_names
from deit_kd.interfaces import Batch, InputError, Statistics, TeacherOutput
from deit_kd.models.tokens import heads_of
from deit_kd.teachers.class_map import ClassMap, described
from deit_kd.teachers.dense import dense_logits
from deit_kd.teachers.specialists import Specialty

LONGEST_LIST = 20  # classes of a map that are printed; run.json has all of them


class FusedHeads(nn.Module):
    """A distilled model that teaches through all its heads: log of the mean of their softmaxes (DeiT, section 4)."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Return log-probabilities [B, C] for `images` [B, 3, H, W]."""
        return self.forward_head(self.backbone.forward_features(images))

    def forward_head(self, last: Tensor) -> Tensor:
        """Return log-probabilities [B, C] from the backbone's last features."""
        heads = torch.stack([logits.float() for logits in heads_of(self.backbone, last).logits.values()])
        return heads.log_softmax(-1).logsumexp(0) - math.log(len(heads))


def backbone_of(network: nn.Module) -> Any:
    """Return the timm model of a teacher's network."""
    return network.backbone if isinstance(network, FusedHeads) else network


class FrozenTeacher(nn.Module):
    """Answers batches that are normalised for the student.

    Weights are held in `dtype` and in a memory format, so nothing is converted at each step.

    Args:
        network: any model ``[B, 3, H, W] -> [B, M]``; M is C unless there is a `class_map`. A timm model without a head
            (M = 0) has only features.
        student_mean: what the batch's images were normalised with.
        student_std: the same.
        mean: what the network was trained with.
        std: the same.
        image_size: pixels that the network expects; None keeps the batch's size.
        dtype: of weights and input; logits come back in fp32.
        channels_last: memory format of weights and input.
        compiled: run the network through ``torch.compile``.
        class_map: turns the network's columns into the dataset's classes; None if they are the same.
        specialty: the classes that it answers in, if these are not all of the dataset's.
        interpolation: of the resize, ``bicubic`` or ``bilinear``; the whole view is resized, nothing is cropped.
        grid: h x w of its dense logits, see `dense_grid`; None if it has none.
        facts: what a run records about this teacher.
        notes: further lines to print.
    """

    _gain: Tensor
    _offset: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        student_mean: Statistics,
        student_std: Statistics,
        mean: Statistics,
        std: Statistics,
        image_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        compiled: bool = False,
        class_map: ClassMap | None = None,
        specialty: Specialty | None = None,
        interpolation: str = "bicubic",
        grid: tuple[int, int] | None = None,
        facts: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.network = network.to(dtype=dtype).requires_grad_(False)
        self.lay_out(channels_last)
        self._answer = torch.compile(self.network) if compiled else self.network
        self._compiled = compiled
        self.has_head = getattr(backbone_of(network), "num_classes", 1) != 0
        self._map = class_map
        self.grid = grid
        self.specialty = specialty
        self.facts = dict(facts or {})
        self._notes = tuple(notes)
        self._image_size = image_size
        self._interpolation = interpolation
        self._dtype = dtype
        # images_teacher = images_student * gain + offset, per channel
        gain = [theirs / own for theirs, own in zip(student_std, std, strict=True)]
        offset = [(a - b) / own for a, b, own in zip(student_mean, mean, std, strict=True)]
        self._renormalises = tuple(student_mean) != tuple(mean) or tuple(student_std) != tuple(std)
        self.register_buffer("_gain", torch.tensor(gain).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_offset", torch.tensor(offset).view(1, 3, 1, 1), persistent=False)
        self.eval()
        self._features: tuple[str, ...] = ()
        self._dense = False
        self._prepare()

    def lay_out(self, channels_last: bool) -> None:
        """Hold weights and input in this memory format from now on, which changes answers by rounding."""
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self._memory_format)

    def lines(self, role: str = "teacher") -> list[str]:
        """Return the lines to print about its preprocessing and its class map."""
        seen = "the student's size" if self._image_size is None else f"{self._image_size} px"
        lines = [f"{role}: {self.facts.get('name', type(self.network).__name__)} sees {seen}", *self._notes]
        if not self.has_head:
            left_out = self.facts.get("head_left_out")
            its_own = f"its head of {left_out} columns is left out" if left_out else "its weights have no head"
            lines.append(f"{role}: {its_own}; it teaches with its features only")
        columns = self.facts.get("class_map") or {}
        for name, group in list(columns.items())[:LONGEST_LIST]:
            lines.append(
                f"{role}: {name} <- " + ", ".join(f"{column} {described(label)}".rstrip() for column, label in group)
            )
        if len(columns) > LONGEST_LIST:
            lines.append(f"{role}: … {len(columns) - LONGEST_LIST} more classes in run.json")
        return lines

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval mode regardless of `mode`: a teacher's BatchNorm and dropout never change."""
        return super().train(False)

    def ask_for(self, features: Sequence[str]) -> None:
        """From now on, also answer with these features: layers by timm's names, and ``pooled``.

        Raises:
            InputError: the network has no layer of that name.
        """
        check_layers("distill.terms: the teacher", backbone_of(self.network), features)
        self._features = tuple(features)
        self._prepare()

    def ask_for_dense(self, asked: bool) -> None:
        """From now on, also answer with the logits at each place, or no longer.

        Raises:
            InputError: it has none.
        """
        if asked and self.grid is None:
            raise InputError("distill.terms: dense needs a teacher with logits at every place; name a CNN")
        self._dense = asked
        self._prepare()

    def _prepare(self) -> None:
        backbone = backbone_of(self.network)
        self._answer_with_features: Callable[[Tensor], tuple[tuple[Tensor, Tensor | None], Features]] | None = None
        if self._features or self._dense:
            asked = partial(
                answer_with_features,
                backbone,
                names=self._features,
                head=self._head,
                pool=partial(backbone.forward_head, pre_logits=True),
            )
            self._answer_with_features = torch.compile(asked) if self._compiled else asked

    def _head(self, last: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the network's answer [B, M] and, if it is asked for, that at each place [B, h, w, M]."""
        network: Any = self.network
        return network.forward_head(last), dense_logits(network, last) if self._dense else None

    @torch.no_grad()
    def pooled_width(self, image_size: int) -> int:
        """Return the width D of its pooled vector for images of the student's size."""
        backbone = backbone_of(self.network)
        images = self._preprocess(self._gain.new_zeros(1, 3, image_size, image_size))
        return int(backbone.forward_head(backbone.forward_features(images), pre_logits=True).shape[-1])

    def layer_names(self) -> list[str]:
        """Return the layers whose maps can be asked for."""
        return layer_names(backbone_of(self.network))

    @torch.no_grad()
    def forward(self, batch: Batch) -> TeacherOutput:
        """Answer the views of `batch` with logits [B, C] in fp32, and with the features that are asked for."""
        with torch.autocast(batch.images.device.type, enabled=False):
            images = batch.images
            if not len(images):  # attention on CUDA rejects an empty batch
                images = images.new_zeros(1, *images.shape[1:])
            images = self._preprocess(images)
            features: Features = {}
            dense = None
            if self._answer_with_features is None:
                logits = self._answer(images)
            else:
                (logits, dense), features = self._answer_with_features(images)
            logits = logits[: len(batch.images)].float()
            found = {name: feature[: len(batch.images)] for name, feature in features.items()}
            if not self.has_head:
                return TeacherOutput(None, found or None)
            if dense is not None:
                dense = self._mapped(dense[: len(batch.images)].float())
            return TeacherOutput(self._mapped(logits), found or None, dense)

    def _mapped(self, logits: Tensor) -> Tensor:
        """Return logits [..., C] of the dataset's classes for the network's [..., M]."""
        return logits if self._map is None else self._map(logits)

    def _preprocess(self, images: Tensor) -> Tensor:
        if self._image_size is not None and images.shape[-1] != self._image_size:
            images = F.interpolate(images, size=self._image_size, mode=self._interpolation, antialias=True)
        if self._renormalises:
            images = torch.addcmul(self._offset, images, self._gain)
        return images.to(dtype=self._dtype, memory_format=self._memory_format)
