"""The peak memory of this process, and how much it may still take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

CLEAR = Path("/proc/self/clear_refs")  # Linux
CONTROL_GROUPS = Path("/sys/fs/cgroup")
_LIMITS = {  # the files of a limit and of what is used, by the name of the controller; version 2 has none
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


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


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated: on a GPU, or in main memory within the limits of control groups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_available_on_the_machine(), *_left_by_control_groups(Path("/proc/self/cgroup"), CONTROL_GROUPS)])


def _available_on_the_machine() -> int:
    about = Path("/proc/meminfo")
    if about.is_file():
        line = next((line for line in about.read_text().splitlines() if line.startswith("MemAvailable")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    return sys.maxsize  # unknown: macOS swaps


def _left_by_control_groups(own: Path, root: Path) -> Iterator[int]:
    """Yield what each limit on this process leaves, caches that the kernel can drop included.

    Args:
        own: lists the process's control groups.
        root: of the control groups' file system.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(top):
                break
            limit, used = (group / name for name in _LIMITS[controllers])
            if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
                yield int(most) - int(used.read_text()) + _droppable(group / "memory.stat")


def _droppable(statistics: Path) -> int:
    lines = statistics.read_text().splitlines() if statistics.is_file() else []
    counts = dict(line.split() for line in lines)
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
