"""What a machine computes with: the kind of its CPU or GPU, said beside every figure, its cores, and a clock."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Flags of Linux for the units that matter to a bf16 step, the fastest first.
UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 bf16", "avx512f": "AVX-512", "avx2": "AVX2"}


def kind(device: torch.device) -> str:
    """Return what `device` is, as ``AMD EPYC (AVX-512 bf16)`` or ``NVIDIA H200``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        return cpu_kind(Path("/proc/cpuinfo").read_text())
    except OSError:
        return platform.processor() or platform.machine()


def cpu_kind(cpuinfo: str) -> str:
    """Return the model of a CPU and its fastest unit for bf16, from the text of Linux's ``/proc/cpuinfo``."""
    model, flags = (_first(name, cpuinfo) for name in ("model name", "flags"))
    unit = next((unit for flag, unit in UNITS.items() if flag in flags.split()), None)
    return (model or platform.machine()) + (f" ({unit})" if unit else "")


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_of(act: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `act` takes, its work on `device` included and no earlier work."""
    since = _when_done(device)
    act()
    return _when_done(device) - since


def _when_done(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _first(name: str, cpuinfo: str) -> str:
    found = re.search(rf"^{name}\s*: (.*)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else ""
