"""A timm model that answers with its heads separately, the same in train and eval mode (DeiT, arXiv 2012.12877)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deit_kd.features import answer_with_features, mean_patch
from deit_kd.interfaces import StudentOutput
from deit_kd.models.tokens import has_distillation_token, heads_of, read_heads
from deit_kd.models.weights import Account


class TimmStudent(nn.Module):
    """Wraps a timm model; `backbone` is plain timm, and only its weights are saved.

    Args:
        backbone: a model with a distillation token (timm's deit and pit, or a grafted one), or any other, which
            answers with one head; a network with two heads and no token (LeViT, RepViT) averages them itself.
        model_args: what ``timm.create_model`` needs to build the backbone again, besides the number of classes.
        account: where each of its initial weights came from; None if all of them are new.
        channels_last: memory format of weights and images; None uses it for networks with BatchNorm2d.
    """

    def __init__(
        self,
        backbone: nn.Module,
        model_args: Mapping[str, Any] | None = None,
        account: Account | None = None,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__()
        if channels_last is None:
            channels_last = any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone: Any = backbone.to(memory_format=self._memory_format)
        self.model_args = dict(model_args or {})
        self.account = account
        self.has_distillation_token = has_distillation_token(backbone)

    def forward(self, images: Tensor, features: Sequence[str] = ()) -> StudentOutput:
        """Answer `images` [B, 3, H, W] with logits [B, C] of each of its heads, and the `features` that are named."""
        images = images.contiguous(memory_format=self._memory_format)
        if not features:
            return read_heads(self.backbone, images)
        heads, found = answer_with_features(
            self.backbone, images, features, head=partial(heads_of, self.backbone), pool=self._pool
        )
        return StudentOutput(heads.cls_logits, heads.dist_logits, found)

    def _pool(self, last: Tensor) -> Tensor:
        return mean_patch(last, getattr(self.backbone, "num_prefix_tokens", 0))
