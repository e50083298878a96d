"""The attention kernel of a run on CUDA: chosen by a measurement at its start, and the same one when it resumes."""

from __future__ import annotations

import torch

from deit_kd.distributed import from_main
from deit_kd.engine import AUTOCAST_DTYPES, autocast
from deit_kd.kernels import attention_shape, best_attention, measure_attention
from deit_kd.run_folder import AttentionFacts, read_facts
from deit_kd.runs.prepared import Run

IMAGES = 32  # to measure with, at most: errors and the order of the backends depend on the length


def attention_of(run: Run, is_resumed: bool) -> AttentionFacts | None:
    """Return the attention kernel of a run; None on the CPU, and for a student without fused attention."""
    if run.processes.device.type != "cuda":
        return None

    def choose() -> AttentionFacts | None:
        before = read_facts(run.folder).get("attention") if is_resumed else None
        return before or measured_attention(run)

    return from_main(run.processes, choose, "measures attention")


def attention_kernel(run: Run) -> str | None:
    """Return the name of the kernel that a new run would choose; None leaves it to PyTorch."""
    facts = attention_of(run, is_resumed=False)
    return None if facts is None else facts["kernel"]


def measured_attention(run: Run) -> AttentionFacts | None:
    """Measure the attention of the run's student at its real length; None if it has none that is fused."""
    train, device = run.config.train, run.processes.device
    blank = torch.zeros(1, 3, run.config.data.image_size, run.config.data.image_size, device=device)
    was_training = run.student.training
    with autocast(device, train.precision):
        shape = attention_shape(lambda: run.student.eval()(blank))
    run.student.train(was_training)
    if shape is None:
        return None
    views = min(IMAGES, train.batch_size // (run.processes.count * train.accumulation_steps))
    shape, dtype = torch.Size([views, *shape[1:]]), AUTOCAST_DTYPES[train.precision] or torch.float32
    rows = measure_attention(shape, dtype, device)
    return {
        "kernel": best_attention(rows, dtype),
        "shape": list(shape),
        "measured": {name: row._asdict() for name, row in rows.items()},
    }


def attention_line(facts: AttentionFacts) -> str:
    """Return the line that is printed about it."""
    rows = facts["measured"]
    pieces = [f"{name} {1e3 * row['seconds']:.2f} ms, error {row['gradient_error']:.1e}" for name, row in rows.items()]
    return f"attention: {facts['kernel']} at {facts['shape'][2]} tokens ({'; '.join(pieces)})"
