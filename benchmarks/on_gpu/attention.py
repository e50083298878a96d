"""PyTorch's attention kernels at DeiT's length, forward and backward: their time, and their error against fp32."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch

from deit_kd.kernels import BACKENDS, Measured, best_attention, measure_attention
from on_gpu.setup import Point, Setup
from on_gpu.timing import Row, rounded

DTYPE = torch.bfloat16


def points(setup: Setup) -> Iterator[Point]:
    """Yield the length with a distillation token, and the odd one without."""
    images, heads, tokens, width = setup.scale.attention
    for length in (tokens, tokens - 1):
        yield f"{length} tokens", partial(_rows, setup, torch.Size((images, heads, length, width)))


def _rows(setup: Setup, shape: torch.Size) -> list[Row]:
    rounds = [measure_attention(shape, DTYPE, setup.device) for _ in range(setup.scale.rounds)]
    chosen = best_attention(rounds[-1], DTYPE)
    rows: list[Row] = []
    for name in BACKENDS:
        found = [backends[name] for backends in rounds if name in backends]
        figures = _figures(found, shape[0]) if found else {"failed": "does not take this shape, dtype or device"}
        rows.append({"backend": name, "tokens": shape[2], **figures, "chosen": "yes" if name == chosen else ""})
    return rows


def _figures(found: list[Measured], images: int) -> Row:
    times = [1e6 * one.seconds / images for one in found]
    picks = {"µs an image": statistics.median, "lowest": min, "highest": max}
    return {column: rounded(pick(times)) for column, pick in picks.items()} | {
        "error of the output": rounded(found[0].error),
        "error of the gradients": rounded(found[0].gradient_error),
    }
