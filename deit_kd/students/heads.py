"""A timm model that answers with its heads apart, the same in train and in eval (DeiT, arXiv 2012.12877)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deit_kd.interfaces import InputError, StudentOutput


class TimmStudent(nn.Module):
    """Wraps a timm model; `backbone` is plain timm, and its weights are what is saved.

    Args:
        backbone: a ``*_distilled_*`` model with a distillation token (deit, pit), or any model with one head.
        model_args: what ``timm.create_model`` needs to build the backbone again, beside the class count.

    Raises:
        InputError: the model has a second head but no token for it to read.
    """

    def __init__(self, backbone: nn.Module, model_args: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        is_convolutional = any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
        self._memory_format = torch.channels_last if is_convolutional else torch.contiguous_format
        self.backbone: Any = backbone.to(memory_format=self._memory_format)
        self.model_args = dict(model_args or {})
        self.has_distillation_token = _has_distillation_token(backbone)
        if _has_second_head(backbone) and not self.has_distillation_token:
            raise InputError(
                f"student.name: {type(backbone).__name__} has a second head but no distillation token (both heads "
                "read the same features); use a deit_*_distilled or pit_*_distilled model"
            )

    def forward(self, images: Tensor) -> StudentOutput:
        """Answer `images` [B, 3, H, W] with logits [B, C] of each head there is."""
        features = self.backbone.forward_features(images.contiguous(memory_format=self._memory_format))
        if not self.has_distillation_token:
            return StudentOutput(self.backbone.forward_head(features))
        drop = self.backbone.head_drop
        return StudentOutput(
            self.backbone.head(drop(features[:, 0])),
            self.backbone.head_dist(drop(features[:, 1])),
        )


def _has_second_head(backbone: nn.Module) -> bool:
    # iFormer keeps it inside its head, and an identity in its place where the model is plain.
    return any(
        name.rpartition(".")[2] == "head_dist" and not isinstance(module, nn.Identity)
        for name, module in backbone.named_modules()
    )


def _has_distillation_token(backbone: nn.Module) -> bool:
    if not isinstance(getattr(backbone, "head_dist", None), nn.Module):
        return False
    cls_token = getattr(backbone, "cls_token", None)
    both_in_one = cls_token is not None and cls_token.shape[1] == 2  # pit keeps both tokens in cls_token
    return isinstance(getattr(backbone, "dist_token", None), nn.Parameter) or both_in_one
