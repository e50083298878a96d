"""The command line: one verb, and the exit code of whatever becomes of it."""

from __future__ import annotations

import atexit
import sys
import traceback
from collections.abc import Callable

from deit_kd.commands.data import data
from deit_kd.commands.pictures import plot, report
from deit_kd.commands.quantize import quantize
from deit_kd.commands.shared import Arguments
from deit_kd.commands.store import store
from deit_kd.commands.students import evaluate, export, predict
from deit_kd.commands.training import bench, train
from deit_kd.files import refusal
from deit_kd.interfaces import InputError, Stopped, nearest, printable
from deit_kd.interrupts import leave_signals_alone, stopping_at_once

VERBS: dict[str, tuple[str, Callable[[Arguments], int | None]]] = {
    "train": ("train a student, and its teacher first if the recipe says so", train),
    "eval": ("score the heads of a student, separately and fused: a run or a published model", evaluate),
    "report": ("draw one page about runs: curves, heads, calibration, attention", report),
    "plot": ("draw the curves of a run that is still going", plot),
    "data": (
        "check photos, pack or index them, or find classes that are confused (check, pack, index, confusions)",
        data,
    ),
    "store": ("run a teacher once for every view, and keep its answers (build, check, info)", store),
    "predict": ("print class and probability for images without labels", predict),
    "export": ("export a run's student to timm, transformers, ONNX or torch.export", export),
    "quantize": ("turn a run's student into integers of 8 or 4 bits, and say what each head loses", quantize),
    "bench": ("time the training loop and its parts, with and without a teacher and a store", bench),
}


def main(arguments: Arguments | None = None) -> int:
    """Run one verb; return the exit code.

    0; 1 where a check found something or another process is gone; 2 where the input cannot be used; 143, 130 or 75
    after SIGTERM, SIGINT or SIGUSR1.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print("usage: deit-kd VERB …\n\nverbs (deit-kd VERB --help shows their options):")
        for name, (summary, _) in VERBS.items():
            print(f"  {name:9} {summary}")
        return 0
    try:
        code = _run(verb, arguments[1:])
    except Exception:
        if not _is_still_in_group():
            raise
        traceback.print_exc()
        code = 1
    if _is_still_in_group():
        sys.modules["deit_kd.distributed"].end_failed(code)
    return code


def _run(verb: str, arguments: Arguments) -> int:
    """Run a verb and tell why it ends, if it does not do so in order; return the exit code."""
    try:
        if verb not in VERBS:
            raise InputError(f"{verb}: unknown verb; use one of {', '.join(VERBS)}{nearest(verb, VERBS)}")
        with stopping_at_once():
            return VERBS[verb][1](arguments) or 0
    except (InputError, OSError) as error:
        told = refusal(error) if isinstance(error, OSError) else error
        if told is None:
            raise
        print(f"error: {printable(str(told))}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        atexit.register(leave_signals_alone)  # a second one on the way out would change the exit code
        if str(stopped):
            print(stopped, file=sys.stderr)
        return stopped.code
    except RuntimeError as error:
        return _lost(error)


def _is_still_in_group() -> bool:
    """Return whether a verb has failed among other processes; one that has none may not even have imported torch."""
    distributed = sys.modules.get("deit_kd.distributed")
    return distributed is not None and distributed.is_in_group()


def _lost(error: RuntimeError) -> int:
    """Say that a worker or another process has died, and return the exit code; raise any other error."""
    from deit_kd.data import lost_worker
    from deit_kd.distributed import lost_process

    if (worker := lost_worker(error)) is not None:
        print(f"error: {worker}", file=sys.stderr)
        return 2
    if (process := lost_process(error)) is not None:
        print(process, file=sys.stderr)
        return process.code
    raise error
