"""The average of a student's weights: how it is built, what is said of it, and how it teaches the student."""

from __future__ import annotations

import math

import torch
from torch import nn

from deit_kd.config import Config, as_schedule
from deit_kd.engine import ask, autocast
from deit_kd.interfaces import Batch, InputError, TeacherOutput, head_log_probabilities, speaker
from deit_kd.optim import WeightAverage

AVERAGED_SHARE = 1 / 20  # of a run's steps, covered by the average of the weights unless the recipe sets a decay


def build_average(config: Config, student: nn.Module, total_steps: int) -> WeightAverage | None:
    """Return a recipe's average of the weights of `student` over a run of `total_steps`, or None if it keeps none."""
    return None if config.train.ema_decay == 0 else WeightAverage(student, _decay(config, total_steps))


def _decay(config: Config, total_steps: int) -> float:
    decay = config.train.ema_decay
    return 1 - 1 / max(1.0, AVERAGED_SHARE * total_steps) if decay is None else decay


def average_line(average: WeightAverage, total_steps: int) -> str:
    """Return the line that is printed about the average of the weights."""
    share = 100 * average.span / total_steps
    line = f"average: over {average.span:.0f} steps, {share:.1f} % of the run's {total_steps}"
    if average.span <= total_steps:
        return line
    return f"warning: {line}, so it is the plain mean of all of them; lower train.ema_decay, or set it to null"


class AverageTeacher:
    """Answers with the average of the student's own weights (Mean Teacher, Tarvainen and Valpola, 1703.01780).

    Args:
        average: the network that the engine averages into; it is asked as it is, in eval mode, and never copied.
        precision: of autocast: ``bf16``, ``fp16`` or ``off``.
        fusion: of its heads, see `head_log_probabilities`.
    """

    def __init__(self, average: nn.Module, precision: str = "off", fusion: str = "softmax") -> None:
        self.network = average.eval()
        # Of timm's LeViT and others: what these keep of earlier weights they forget only when told their mode.
        self._forgetful = [part for part in average.modules() if type(part).train is not nn.Module.train]
        self._precision = precision
        self._fusion = fusion

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        """Answer `batch` with the log-probabilities [B, C] of all heads fused, or of the only head."""
        for part in self._forgetful:
            part.eval()
        with autocast(batch.images.device, self._precision):
            output = ask(self.network, batch.images)
        heads = head_log_probabilities(output, self._fusion)
        return TeacherOutput(heads[speaker(heads)])


def check_own_average(config: Config, total_steps: int) -> None:
    """Refuse a recipe whose student learns from its own average before this is warmed up.

    Until then it is a mean over all steps from the first on, whose weights were random.

    Args:
        config: any recipe; only those with ``teacher.kind: average`` are checked.
        total_steps: of the run.

    Raises:
        InputError: the weight of a term that learns from the average is above 0 before the warm-up has ended.
    """
    if not config.learns_from_own_average:
        return
    span = 1 / (1 - _decay(config, total_steps))
    if span >= total_steps:
        raise InputError(
            f"train.ema_decay: averages over {span:.0f} steps, and the run has {total_steps}, so the average is never "
            "warmed up to teach; lower it, or set it to null"
        )
    share = span / total_steps
    last = math.ceil(span - 0.5) - 1  # step of the warm-up, from 0; half a step, for rounding
    for key, weight in config.distill.logit_weights.items():
        schedule = as_schedule(weight)
        for step in (0, last):  # a schedule does not turn back
            if schedule.at(step / total_steps) > 0:
                raise InputError(
                    f"{key}: is {schedule.at(step / total_steps):.2g} at step {step} of the run's {total_steps}, but "
                    f"the average that teaches is warmed up after {span:.0f}; use a schedule such as {{start: 0, end: "
                    f"{max(schedule.values):g}, from: {share:.3g}, until: {(1 + share) / 2:.3g}, shape: linear}}"
                )
