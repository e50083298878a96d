"""Pooled features: the teacher's one vector per image, which needs neither its head nor labels."""

import torch
from torch import Tensor
from torch.nn import functional as F


def normalised(vectors: Tensor) -> Tensor:
    """Return vectors [B, D] layer-normalised, without affine."""
    return F.layer_norm(vectors, vectors.shape[-1:])


def pooled_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 minus the cosine of the two vectors for each example.

    Args:
        student: [B, D], after its connector.
        teacher: [B, D], normalised.

    Returns:
        [B], between 0 and 2.
    """
    return 1 - torch.cosine_similarity(student, teacher, dim=-1)


def pooled_huber(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Huber loss, mean over channels, for each example; arguments as for `pooled_cosine`."""
    return F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)
