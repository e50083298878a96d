"""Relations: how alike an image's places are to one another (after Liu et al., CVPR 2019, and MiniLM, 2002.10957)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from deit_kd.losses.guide import on_one_grid
from deit_kd.losses.soft import soft_distillation

RELATIONS_TEMPERATURE = 0.1
LEAST_NORM = 1e-4  # of a place; the gradient of a smaller one would not be finite in fp16


def relations(
    student_map: Tensor, teacher_map: Tensor, temperature: float = RELATIONS_TEMPERATURE, grid: int | None = None
) -> Tensor:
    """Return the divergence between the relations of two maps for each example; their widths may differ.

    Args:
        student_map: [B, D, h, w].
        teacher_map: [B, E, H, W].
        temperature: T > 0; a low one looks at the nearest places alone.
        grid: side of a coarser grid for both; None uses the coarser of the two.

    Returns:
        [B], in nats, mean over the places.
    """
    student_map, teacher_map = on_one_grid(student_map, teacher_map, normalise=False, grid=grid)
    return relation_error(relations_of(student_map), relations_of(teacher_map), temperature)


def relations_of(feature_map: Tensor) -> Tensor:
    """Return the cosines of each place of a map [B, D, h, w] with the N - 1 others, less their mean: [B, N, N - 1].

    The softmax over them does not depend on the mean, and the cosine of two rows is then their correlation.
    """
    places = F.normalize(feature_map.flatten(2), dim=1, eps=LEAST_NORM)  # [B, D, N]
    count = places.shape[-1]
    # Without its first element, each row of N + 1 ends with one of the diagonal.
    others = (places.mT @ places).flatten(1)[:, 1:].unflatten(1, (count - 1, count + 1))[..., :-1]
    cosines = others.reshape(-1, count, count - 1)
    return cosines - cosines.mean(-1, keepdim=True)


def relation_error(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher ‖ student) of the softmax over each place's relations [B, N, N - 1], mean over places: [B]."""
    # Without Hinton's T²: the temperature belongs to what is compared, and a softmax over cosines at 1 is nearly even.
    return soft_distillation(student / temperature, teacher / temperature, 1.0).mean(-1)
