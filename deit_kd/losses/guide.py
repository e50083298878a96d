"""Guide maps: a CNN's feature maps are the targets of the patch tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def guide(student_map: Tensor, teacher_map: Tensor, normalise: bool = True, grid: int | None = None) -> Tensor:
    """Return the mean squared error between two maps, over channels and places, for each example.

    Args:
        student_map: [B, D, h, w], after its connector.
        teacher_map: [B, D, H, W].
        normalise: see `on_one_grid`.
        grid: see `on_one_grid`.

    Returns:
        [B].
    """
    return map_error(*on_one_grid(student_map, teacher_map, normalise, grid))


def map_error(student_map: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error [B] of maps of one shape."""
    return F.mse_loss(student_map, target, reduction="none").mean((1, 2, 3))


def on_one_grid(
    student_map: Tensor, teacher_map: Tensor, normalise: bool = True, grid: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return both maps on one grid: the finer one is averaged to the coarser, then the teacher's is normalised.

    Args:
        student_map: [B, D, h, w], after its connector.
        teacher_map: [B, D, H, W].
        normalise: whether to layer-normalise the teacher's map over its channels at each place, without affine, so that
            stages with larger values do not weigh more.
        grid: side of a coarser grid for both; None uses the coarser of the two.

    Returns:
        Two maps of the same shape.
    """
    height, width = (min(sides) for sides in zip(student_map.shape[2:], teacher_map.shape[2:], strict=True))
    if grid is not None:
        height = width = grid
    student_map, target = _averaged(student_map, height, width), _averaged(teacher_map, height, width)
    if normalise:
        target = F.layer_norm(target.movedim(1, -1), target.shape[1:2]).movedim(-1, 1)
    return student_map, target


def _averaged(features: Tensor, height: int, width: int) -> Tensor:
    return features if features.shape[2:] == (height, width) else F.adaptive_avg_pool2d(features, (height, width))
