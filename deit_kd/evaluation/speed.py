"""How fast students answer on the CPU of this machine, each beside the first within the same round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deit_kd.engine import autocast
from deit_kd.machine import kind, seconds_of

IMAGES, ROUNDS = 32, 7
CPU = torch.device("cpu")


def images_per_second(students: Mapping[str, nn.Module], first: str, precision: str, image_size: int) -> dict[str, Any]:
    """Time students on the CPU, taking turns.

    Args:
        students: by name.
        first: the name of the one that the others are compared with.
        precision: of autocast, in which it is timed once more; ``off`` leaves that out.
        image_size: pixels.

    Returns:
        JSON: ``device``, ``threads``, ``batch`` (images), and by name ``images_per_second`` and ``over_<first>``, the
        ratio within a round; each with ``median``, ``least`` and ``most`` over the rounds.
    """
    images = torch.zeros(IMAGES, 3, image_size, image_size).normal_(generator=torch.Generator().manual_seed(0))
    timed: dict[str, Callable[[], Any]] = {
        name: partial(_answer, student, images, "off") for name, student in students.items()
    }
    if precision != "off":
        timed[precision] = partial(_answer, students[first], images, precision)
    with torch.inference_mode():
        for answer in timed.values():
            answer()
        rounds = [{name: IMAGES / seconds_of(answer, CPU) for name, answer in timed.items()} for _ in range(ROUNDS)]
    return {
        "device": kind(CPU),
        "threads": torch.get_num_threads(),
        "batch": IMAGES,
        "images_per_second": {name: _spread([one[name] for one in rounds]) for name in timed},
        f"over_{first}": {name: _spread([one[name] / one[first] for one in rounds]) for name in timed},
    }


def _answer(student: nn.Module, images: Tensor, precision: str) -> None:
    with autocast(CPU, precision):
        student(images)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
