"""Cross-entropy with soft targets, which mixing and label smoothing produce."""

from torch import Tensor


def soft_target_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each example with its target distribution.

    Args:
        logits: [B, C].
        targets: [B, C], rows that sum to 1.

    Returns:
        [B], in nats.
    """
    return -(targets * logits.log_softmax(-1)).sum(-1)
