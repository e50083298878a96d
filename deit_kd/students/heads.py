"""A timm model that answers with its heads separately, the same in train and eval mode (DeiT, arXiv 2012.12877)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models.pit import PoolingVisionTransformer
from torch import Tensor, nn

from deit_kd.features import POOLED, answer_with_features, layer_names, mean_patch
from deit_kd.interfaces import StudentOutput
from deit_kd.models.tokens import dense_logits_of, has_distillation_token, heads_of, read_heads
from deit_kd.models.weights import Account
from deit_kd.students.paths import DropPaths


class TimmStudent(nn.Module):
    """Wraps a timm model; `backbone` is plain timm, and only its weights are saved.

    Args:
        backbone: a model with a distillation token (timm's deit and pit, or a grafted one), or any other, which
            answers with one head. Two heads without a token (LeViT, RepViT) answer apart after timm's
            ``set_distilled_training()``; before, the network averages them.
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
        self.drop_paths = DropPaths()

    def draw_paths(self, views: int) -> Tensor | None:
        """Return what the paths of the next forward pass keep of B `views`, see `DropPaths.draw`.

        None in eval mode, and for a network that draws by itself or drops nothing.
        """
        return self.drop_paths.draw(views, next(self.parameters()).device) if self.training else None

    def forward(
        self,
        images: Tensor,
        features: Sequence[str] = (),
        grid: tuple[int, int] | None = None,
        paths: Tensor | None = None,
    ) -> StudentOutput:
        """Answer `images` [B, 3, H, W] with logits [B, C] of each of its heads.

        Also with the `features` that are named, and with the logits at each place of a `grid` if there is one, see
        `dense_logits_of`. `paths` is what `draw_paths` returned; None lets the network draw by itself.
        """
        with self.drop_paths.given(paths):
            return self._answered(images, features, grid)

    def _answered(self, images: Tensor, features: Sequence[str], grid: tuple[int, int] | None) -> StudentOutput:
        images = images.contiguous(memory_format=self._memory_format)
        if not features and grid is None:
            return read_heads(self.backbone, images)
        ask = partial(answer_with_features, self.backbone, images, head=partial(self._answer, grid=grid))
        if POOLED in features and isinstance(self.backbone, PoolingVisionTransformer):
            # pit's last features are its tokens alone; its patches are the map of its last layer
            last = layer_names(self.backbone)[-1]
            heads, maps = ask(tuple({*features, last} - {POOLED}), pool=self._pool)
            found = {**maps, POOLED: mean_patch(maps[last], 0)}
        else:
            heads, found = ask(features, pool=self._pool)
        answer: StudentOutput = heads
        return answer._replace(features={name: found[name] for name in features} if features else None)

    def _answer(self, last: Tensor, grid: tuple[int, int] | None) -> StudentOutput:
        output = heads_of(self.backbone, last)
        return output if grid is None else output._replace(dense_logits=dense_logits_of(self.backbone, last, grid))

    def _pool(self, last: Tensor) -> Tensor:
        return mean_patch(last, getattr(self.backbone, "num_prefix_tokens", 0))
