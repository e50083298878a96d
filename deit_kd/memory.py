"""The peak memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

CLEAR = Path("/proc/self/clear_refs")  # Linux


def peak_memory(device: torch.device) -> int:
    """Return the bytes held at the peak: reserved on a GPU, resident in main memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """Restart the peak from what is held now, and release unused memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")
