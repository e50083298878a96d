"""Which kernels run, how long, and for which share of the time the device has none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from on_gpu.timing import Row, rounded

LONGEST_NAME = 70
COPIES = ("Memcpy", "Memset")  # do not keep a GPU's processors busy


class Profile(NamedTuple):
    """The kernels of a GPU, or the operations of a CPU, in one step."""

    busy_seconds: float | None  # in which any kernel runs; None if none was seen, as on a CPU
    launches: int
    slowest: list[Row]


def profiled(act: Callable[[], object], device: torch.device, steps: int, most: int = 8) -> Profile:
    """Return the profile of `act`, which does so many steps, with its slowest kernels."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as recorded:  # torch 2.11 warns otherwise
        act()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = [event for event in recorded.events() if not getattr(event, "is_user_annotation", False)]
    if on_gpu:
        events = [event for event in events if event.device_type == DeviceType.CUDA]
        events = [event for event in events if not event.name.startswith(COPIES)]
    busy = union((event.time_range.start, event.time_range.end) for event in events) / 1e6 / steps
    return Profile(busy if on_gpu and events else None, len(events) // steps, _slowest(events, on_gpu, steps, most))


def idle_share(profile: Profile, seconds: float) -> float | None:
    """Return the share of a step of `seconds` in which no kernel runs.

    The step is timed without the profiler, which takes time on the host but none in a kernel.
    """
    return None if profile.busy_seconds is None else rounded(max(0.0, 1 - profile.busy_seconds / seconds))


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Return how much all spans (start, end) cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _slowest(events: list[Any], on_gpu: bool, steps: int, most: int) -> list[Row]:
    times, calls = defaultdict(float), defaultdict(int)
    for event in events:
        times[event.name] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        calls[event.name] += 1
    total = sum(times.values())
    return [
        {
            "kernel": name[:LONGEST_NAME],
            "calls a step": rounded(calls[name] / steps),
            "µs a step": rounded(times[name] / steps),
            "share": rounded(times[name] / total),
        }
        for name in sorted(times, key=lambda name: -times[name])[:most]
    ]
