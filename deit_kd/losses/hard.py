"""Hard-label distillation: the teacher's decision is a label (DeiT, arXiv 2012.12877, equation 3)."""

from torch import Tensor
from torch.nn import functional as F


def hard_distillation(dist_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the cross-entropy of each example with the teacher's argmax, not smoothed.

    Args:
        dist_logits: [B, C], of the distillation head.
        teacher_logits: [B, C], for the same views.

    Returns:
        [B], in nats.
    """
    return F.cross_entropy(dist_logits, teacher_logits.argmax(-1), reduction="none")
