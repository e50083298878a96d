"""What the machine can do at best: memory traffic, matrix products, launches."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import timm
import torch

from deit_kd.machine import kind
from on_gpu.timing import Row, repeated, rounded, take_turns

if TYPE_CHECKING:
    from on_gpu.setup import Point, Setup

LAUNCHES = 1000


class Card(NamedTuple):
    """Measured rates of a device."""

    bandwidth: float  # bytes/s that a large copy reads and writes
    matmul_rate: float  # FLOP/s of a large bf16 product
    launch_seconds: float  # from one small kernel to the next


def measured(device: torch.device, copied_bytes: int, matmul_size: int, rounds: int, seconds: float) -> Card:
    """Measure a device: medians of `rounds`, each of at least `seconds`."""
    source = torch.randint(256, (copied_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(matmul_size, matmul_size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    one = torch.zeros(1, device=device)
    acts = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(left, right, out=product),
        "launch": lambda: repeated(lambda: one.add_(1), LAUNCHES),
    }
    clock, failed = take_turns(device, acts, images=1, rounds=rounds, seconds=seconds)
    if failed:
        raise RuntimeError("; ".join(failed.values()))
    calls = {name: statistics.median(rates) for name, rates in clock.rates.items()}
    return Card(
        bandwidth=2 * copied_bytes * calls["copy"],
        matmul_rate=2 * matmul_size**3 * calls["matmul"],
        launch_seconds=1 / (LAUNCHES * calls["launch"]),
    )


def points(setup: Setup) -> Iterator[Point]:
    """Yield the one point of this section."""
    yield "machine", lambda: _rows(setup)


def _rows(setup: Setup) -> list[Row]:
    card, device = setup.card, setup.device
    facts = {
        "device": kind(device),
        "CPU": f"{kind(torch.device('cpu'))}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "triton": _triton_version(),
        "CUDA": str(torch.version.cuda) if device.type == "cuda" else "none",
        "cuDNN": str(torch.backends.cudnn.version()) if device.type == "cuda" else "none",
        "bandwidth of a large copy, GB/s": rounded(card.bandwidth / 1e9),
        "bf16 matrix product, TFLOP/s": rounded(card.matmul_rate / 1e12),
        "a small kernel after another, µs": rounded(1e6 * card.launch_seconds),
    }
    if device.type == "cuda":
        facts["memory, GB"] = rounded(torch.cuda.get_device_properties(device).total_memory / 1e9)
    return [{"what": what, "value": value} for what, value in facts.items()]


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__
