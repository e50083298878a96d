"""Soft distillation: T² · KL(teacher ‖ student) (Hinton et al. 2015; DeiT, equation 2)."""

from torch import Tensor


def soft_distillation(dist_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the divergence of the student from the teacher for each example.

    The factor T² keeps the gradient's size as T grows: at high T it tends to the difference of the
    zero-meaned logits over C (Hinton et al. 2015, equation 4).

    Args:
        dist_logits: [B, C], of the distillation head.
        teacher_logits: [B, C], for the same views; log-probabilities also work.
        temperature: T > 0.

    Returns:
        [B], in nats times T².
    """
    student = (dist_logits / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).log_softmax(-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)
