"""Forms of a teacher: precision and memory format of its weights, batch norms folded or not, compiled or not."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from bare_step import class_names, random_batch

from deit_kd.interfaces import InputError
from deit_kd.kernels import choose_kernels
from deit_kd.runs import parts
from deit_kd.teachers import NetworkTeacher
from on_gpu.setup import CLASSES, Point, Setup
from on_gpu.timing import Row, one_line, rounded, spread, take_turns


class Form(NamedTuple):
    """Keys of the recipe's section ``teacher``."""

    precision: str = "bf16"
    channels_last: bool = True
    fold: bool = False
    compile: bool = False

    def __str__(self) -> str:
        words = ["fp32" if self.precision == "off" else self.precision]
        words.append("channels-last" if self.channels_last else "NCHW")
        return ", ".join(words + ["folded"] * self.fold + ["compiled"] * self.compile)


OURS = Form()  # what a recipe has unless it says otherwise
NOT_COMPILED = (OURS, Form(fold=True), Form(channels_last=False), Form("off"), Form("off", channels_last=False))
COMPILED = (OURS, Form(compile=True), Form(fold=True, compile=True))


def points(setup: Setup) -> Iterator[Point]:
    """Yield the forms of each teacher that are not compiled, then those that are, beside one that is not."""
    for name in setup.scale.teachers:
        yield name, partial(_rows, setup, name, NOT_COMPILED)
    if setup.scale.compiled:
        for name in setup.scale.teachers:
            yield f"{name}, compiled", partial(_rows, setup, name, COMPILED)


def _rows(setup: Setup, name: str, forms: tuple[Form, ...]) -> list[Row]:
    scale, device = setup.scale, setup.device
    choose_kernels(device, deterministic=False)  # as a run does
    student, asked, refused = next(iter(scale.students)), {}, {}
    batch = random_batch(setup.recipe(student, scale.teacher_batch), CLASSES, device)
    for form in forms:
        try:
            asked[str(form)] = partial(_teacher(setup, name, form), batch)
        except InputError as error:  # e.g. a ViT has no batch norms
            refused[str(form)] = one_line(error)
    clock, failed = take_turns(device, asked, images=scale.teacher_batch, rounds=scale.rounds, seconds=scale.seconds)
    failed |= refused
    rows: list[Row] = []
    for form in map(str, forms):
        row: Row = {"teacher": name, "form": form}
        row |= {"failed": failed[form]} if form in failed else spread(clock.rates[form])
        if not {form, str(OURS)} & failed.keys():
            times = [own / ours for own, ours in zip(clock.rates[form], clock.rates[str(OURS)], strict=True)]
            row[f"times {OURS}"] = rounded(statistics.median(times))
        rows.append(row)
    return rows


@torch.no_grad()
def _teacher(setup: Setup, name: str, form: Form) -> NetworkTeacher:
    keys = {f"teacher__{key}": str(value).lower() for key, value in form._asdict().items()}
    config = setup.recipe(next(iter(setup.scale.students)), setup.scale.teacher_batch, teacher__name=name, **keys)
    return parts.build_teacher(config, class_names(CLASSES), setup.processes, config.teacher.checkpoint)
