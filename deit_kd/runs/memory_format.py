"""The memory format of networks that teach on CUDA: the faster one, measured when a run starts, kept when it resumes.

The format changes the last bits of an answer, and a measurement depends on the clock. So nothing is measured where bits
are promised (on the CPU, and with ``train.deterministic``), nor for answers that outlast the run: a network that fills
or checks a label store, perhaps on several machines, is channels-last there unless the recipe names a format. In other
runs on CUDA the clock already chooses convolutions, see `choose_kernels`. All processes of a run use one format.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deit_kd.config import Config
from deit_kd.distributed import from_main
from deit_kd.interfaces import Batch
from deit_kd.machine import seconds_of
from deit_kd.run_folder import MemoryFormatFacts, read_facts
from deit_kd.runs.lesson import Lesson
from deit_kd.runs.prepared import Run
from deit_kd.teachers import EnsembleTeacher, FrozenTeacher

MEASURED_ON = ("cuda",)
WARM_UPS, ROUNDS = 2, 5  # answers of each format; the first ones look for algorithms, the fastest of the others counts
ENOUGH = 0.95  # of the time of channels-last: less makes NCHW the choice, so that noise does not
NAMES = {True: "channels_last", False: "contiguous"}

Choices = dict[str, MemoryFormatFacts]


def lay_out_teachers(run: Run, lesson: Lesson) -> Choices | None:
    """Bring the lesson's networks to the faster format, or to that with which a resumed run began.

    Returns:
        What the run records of each network, by name; None if nothing was measured.
    """
    networks = _networks(lesson)

    def choose() -> Choices | None:
        if run.checkpoint is not None:
            return read_facts(run.folder).get("memory_format")
        if not networks or not is_measured(run.config, run.processes.device):
            return None
        return {name: _measured(run, network) for name, network in networks.items()}

    choices = from_main(run.processes, choose, "measures the teacher in both memory formats")
    lay_out(lesson, choices)
    return choices


def lay_out(lesson: Lesson, choices: Choices | None) -> None:
    """Bring the lesson's networks to the formats that a run chose; None leaves them as they are."""
    for name, network in _networks(lesson).items():
        if choices is not None and name in choices:
            network.lay_out(choices[name]["channels_last"])


def is_measured(config: Config, device: torch.device) -> bool:
    """Return whether a run of this recipe chooses the format by a measurement.

    A compiled network is left out: its compiler chooses layouts of its own, and would compile both.
    """
    is_free = config.teacher.channels_last is None and not config.teacher.compile
    return is_free and device.type in MEASURED_ON and not config.train.deterministic


def _networks(lesson: Lesson) -> dict[str, FrozenTeacher]:
    """Return the networks whose answers are not kept, by name."""
    found = {} if lesson.guide is None else {"guide": lesson.guide}
    if isinstance(lesson.answers, FrozenTeacher):
        found["teacher"] = lesson.answers
    if isinstance(lesson.answers, EnsembleTeacher):
        members = (member for member in lesson.answers.members if isinstance(member, FrozenTeacher))
        found |= {f"teacher {number}": member for number, member in enumerate(members, 1)}
    return found


def _measured(run: Run, network: FrozenTeacher) -> MemoryFormatFacts:
    """Time a network on a batch of the run's shape."""
    train, size, device = run.config.train, run.config.data.image_size, run.processes.device
    views = train.batch_size // (run.processes.count * train.accumulation_steps)
    chance = torch.Generator(device).manual_seed(0)
    images = torch.randn(views, 3, size, size, generator=chance, device=device)
    batch = Batch(images, images.new_zeros(views, 1), torch.zeros(views, dtype=torch.long, device=device))
    seconds = {}
    for channels_last, name in NAMES.items():
        network.lay_out(channels_last)
        try:
            answers = [seconds_of(lambda: network(batch), device) for _ in range(WARM_UPS + ROUNDS)]
            seconds[name] = min(answers[WARM_UPS:])
        except RuntimeError:  # not every convolution takes every format
            continue
    return {"channels_last": prefers_channels_last(seconds), "seconds": seconds}


def prefers_channels_last(seconds: Mapping[str, float]) -> bool:
    """Return whether channels-last is the choice, from the time of each format that works, by name."""
    never = float("inf")
    theirs, nchw = (seconds.get(NAMES[channels_last], never) for channels_last in (True, False))
    return not nchw < ENOUGH * theirs


def memory_format_lines(choices: Choices) -> list[str]:
    """Return the lines that are printed about them."""
    return [
        f"memory format: {name} in {NAMES[facts['channels_last']]} ("
        + "; ".join(f"{form} {1e3 * seconds:.2f} ms" for form, seconds in facts["seconds"].items())
        + ")"
        for name, facts in choices.items()
    ]
