"""A network that teaches: in eval for ever, without gradient, with the input statistics it was trained on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deit_kd.interfaces import Batch, TeacherOutput

Statistics = tuple[float, float, float]


class FrozenTeacher(nn.Module):
    """Answers batches that are normalised for the student.

    Weights are held in `dtype`, so that nothing is cast at every step; convolutions run channels-last.

    Args:
        network: any model ``[B, 3, H, W] -> [B, C]``.
        student_mean: what the batch's images were normalised with.
        student_std: the same.
        mean: what the network was trained with.
        std: the same.
        image_size: pixels that the network wants; None takes the batch's size as it is.
        dtype: of weights and input; logits come back in fp32.
        channels_last: memory format of weights and input.
        compiled: run the network through ``torch.compile``.
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
    ) -> None:
        super().__init__()
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(dtype=dtype).to(memory_format=self._memory_format).requires_grad_(False)
        self._answer = torch.compile(self.network) if compiled else self.network
        self._image_size = image_size
        self._dtype = dtype
        # images_teacher = images_student * gain + offset, per channel
        gain = [theirs / own for theirs, own in zip(student_std, std, strict=True)]
        offset = [(a - b) / own for a, b, own in zip(student_mean, mean, std, strict=True)]
        self._renormalises = tuple(student_mean) != tuple(mean) or tuple(student_std) != tuple(std)
        self.register_buffer("_gain", torch.tensor(gain).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_offset", torch.tensor(offset).view(1, 3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval, whatever is asked: a teacher's BatchNorm and dropout never move."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> TeacherOutput:
        """Answer the views of `batch` with logits [B, C] in fp32."""
        with torch.autocast(batch.images.device.type, enabled=False):
            return TeacherOutput(self._answer(self._eyes(batch.images)).float())

    def _eyes(self, images: Tensor) -> Tensor:
        if self._image_size is not None and images.shape[-1] != self._image_size:
            images = F.interpolate(images, size=self._image_size, mode="bicubic", antialias=True)
        if self._renormalises:
            images = torch.addcmul(self._offset, images, self._gain)
        return images.to(dtype=self._dtype, memory_format=self._memory_format)
