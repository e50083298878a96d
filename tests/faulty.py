"""A fault in one process of a run: <what>:<rank>:<step>, as in ``kill:1:4``; as a program, train.py with $FAULT."""

from __future__ import annotations

import itertools
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}


def register(fault: str, rank: int) -> None:
    """Let this process, if it is the one that `fault` names, be ended, stall or compute nonsense once in its life."""
    what, of_rank, of_step = fault.split(":")
    if rank != int(of_rank):
        return
    steps = itertools.count(1)

    def in_step(*_: object) -> None:
        """Be ended or stall within one optimiser step, once in the life of the run."""
        if next(steps) == int(of_step) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            print(f"{what}ing in step {of_step}", flush=True)
            if what in ("stall", "wait"):
                time.sleep(1000)
            os.kill(os.getpid(), SIGNALS[what])

    def spoil(module: nn.Module, inputs: Any) -> Any:
        """Let the second view of one micro-batch be not a number."""
        if type(module).__name__ != "TimmStudent" or not module.training or next(steps) != int(of_step):
            return None
        images = inputs[0].clone()
        images[1] = torch.nan
        return (images,)

    if what == "nan":
        register_module_forward_pre_hook(spoil)
    else:
        register_optimizer_step_pre_hook(in_step)


if __name__ == "__main__":
    register(os.environ["FAULT"], int(os.environ["RANK"]))
    program = Path(__file__).resolve().parents[1] / "train.py"
    sys.argv[0] = str(program)
    runpy.run_path(str(program), run_name="__main__")
