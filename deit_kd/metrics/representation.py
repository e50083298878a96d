"""Inside a network: the similarity of the two tokens, and of two networks' layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def token_cosines(tokens: Tensor) -> Tensor:
    """Return the cosine of the class and the distillation token of each image, [B].

    Args:
        tokens: [B, N, D] after a block; the class token stands first, the distillation token second.
    """
    return F.cosine_similarity(tokens[:, 0].float(), tokens[:, 1].float(), dim=-1)


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Return the linear centred kernel alignment of two layers over the same images, 0 to 1.

    Args:
        first: features [n, D1].
        second: features [n, D2].

    Source: Kornblith et al. 2019, arXiv 1905.00414, equation 8. A layer with the same output for every image gives 0.
    """
    first, second = first.double() - first.double().mean(0), second.double() - second.double().mean(0)
    scale = (first.T @ first).norm() * (second.T @ second).norm()
    return float((second.T @ first).square().sum() / scale) if scale > 0 else 0.0
