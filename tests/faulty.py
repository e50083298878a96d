"""train.py with a fault in one process; the environment's FAULT is <what>:<rank>:<step>, as in ``kill:1:4``."""

from __future__ import annotations

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

WHAT, RANK, STEP = os.environ["FAULT"].split(":")
steps = forwards = 0


def in_step(*_: object) -> None:
    """Be ended or stall within one optimiser step, once in the life of the run."""
    global steps
    steps += 1
    if steps == int(STEP) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        print(f"{WHAT}ing in step {STEP}", flush=True)
        if WHAT in ("stall", "wait"):
            time.sleep(1000)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[WHAT])


def spoil(module: nn.Module, inputs: Any) -> Any:
    """Let the second view of one micro-batch be not a number."""
    global forwards
    if type(module).__name__ != "TimmStudent" or not module.training:
        return None
    forwards += 1
    if forwards != int(STEP):
        return None
    images = inputs[0].clone()
    images[1] = torch.nan
    return (images,)


if os.environ["RANK"] == RANK:
    if WHAT == "nan":
        register_module_forward_pre_hook(spoil)
    else:
        register_optimizer_step_pre_hook(in_step)
program = Path(__file__).resolve().parents[1] / "train.py"
sys.argv[0] = str(program)
runpy.run_path(str(program), run_name="__main__")
