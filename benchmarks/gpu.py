"""How fast everything is on one GPU, and how close to what the GPU can do: one program, nine minutes, no network.

    python benchmarks/gpu.py --output FOLDER [--minutes 9] [--root PHOTOS] [--only steps loops] [--no-compile] [--toy]

Writes ``gpu.json`` and ``gpu.md`` after every section, and prints the three things that lose most. Whatever fails is
listed in one line, and whatever no time is left for is listed, too. Without a GPU, or with `--toy`, everything is so
small that it takes a minute on a CPU; its figures then mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from on_gpu import attention, card, loops, marked, photos, report, steps, teachers, verdict, views
from on_gpu.setup import TOY, Point, Scale, Setup
from on_gpu.timing import OutOfTime, limited_to, one_line

from deit_kd.console import say
from deit_kd.distributed import finish, start
from deit_kd.interfaces import InputError
from deit_kd.machine import kind


class Section(NamedTuple):
    """One table, and its share of the time."""

    title: str
    share: float
    points: Callable[[Setup], Iterable[Point]]


SECTIONS = {
    "machine": Section("What the machine can do", 1, card.points),
    "steps": Section("The step alone", 16, steps.points),
    "views": Section("Views of the executor", 6, views.points),
    "loops": Section("Whole loops", 18, loops.points),
    "teachers": Section("Forms of a teacher", 8, teachers.points),
    "attention": Section("Attention, forward and backward", 2, attention.points),
    "tests": Section("Tests that need a GPU", 9, marked.points),
}
GOALS = "goals"  # the last section: what the others say


def main() -> None:
    options = read_options()
    on_gpu = torch.cuda.is_available()
    end = time.monotonic() + 60 * options.minutes
    scale = TOY if options.toy or not on_gpu else Scale()
    if options.compile is not None:
        scale = replace(scale, compiled=options.compile)
    processes = start("cuda" if on_gpu else "cpu")
    with TemporaryDirectory(prefix="deit-kd-gpu-") as folder:
        if options.root is None:
            some = photos.generated(Path(folder), scale.photos, scale.longest_side)
        else:
            some = photos.found(options.root, scale.photos)
        options.output.mkdir(parents=True, exist_ok=True)
        setup = Setup(scale, processes, some, options.output, options.tests)
        found = measured(setup, options.only, end)
    finish()
    tell(found)


def read_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=9.0, help="that all of it takes at most")
    parser.add_argument("--root", type=Path, help="folder of photos, nested in any way; otherwise some are generated")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="also what torch.compile makes of it")
    parser.add_argument("--toy", action="store_true", help="everything tiny, as it is without a GPU")
    parser.add_argument("--tests", default="tests", help="where pytest looks for tests that are marked gpu")
    return parser.parse_args()


def measured(setup: Setup, names: list[str], end: float) -> dict[str, Any]:
    """Return what all sections found until `end`, a time of `time.monotonic`; what is found is written at once."""
    left = {name: section for name, section in SECTIONS.items() if name in names}
    done: dict[str, Any] = {}
    while left:
        name, section = next(iter(left.items()))
        share = section.share / sum(other.share for other in left.values())
        done[name] = run(section, setup, share * (end - time.monotonic()))
        del left[name]
        found = page(setup, done)
        report.write(setup.output, found)
    return found


def run(section: Section, setup: Setup, seconds: float) -> dict[str, Any]:
    """Return the rows of a section that were measured within `seconds`, what failed, and what was left out."""
    since = time.monotonic()
    say(f"{section.title} ({seconds:.0f} s)")
    result: dict[str, Any] = {"title": section.title, "rows": [], "failed": {}, "left_out": []}
    for name, rows in section.points(setup):
        left, said = seconds - (time.monotonic() - since), name
        try:
            with limited_to(left):
                result["rows"] += rows()
        except OutOfTime:
            result["left_out"].append(name)
            said = f"{name}: no time left"
        except Exception as error:  # the other points are worth having
            result["failed"][name] = one_line(error)
            said = f"{name}: {one_line(error)}"
        say(f"  {said}")
        if left > 0:
            forget(setup)
    result["seconds"] = round(time.monotonic() - since, 1)
    return result


def page(setup: Setup, done: dict[str, Any]) -> dict[str, Any]:
    """Return everything that is written: the sections that are done, the goals, and what loses most."""
    tables = {name: [row for row in of["rows"] if "failed" not in row] for name, of in done.items()}
    toy = " at toy size, so that no figure means anything" if setup.scale.image_size == TOY.image_size else ""
    return {
        "title": f"{kind(setup.device)}: how fast everything is",
        "note": f"torch {torch.__version__}, {len(setup.photos)} photos{toy}; median, lowest and highest of all rounds",
        "sections": done | {GOALS: {"title": "Goals for an H200", "rows": verdict.goals(tables)}},
        "slowest": [str(loss) for loss in verdict.slowest(tables)],
    }


def forget(setup: Setup) -> None:
    """Free what a point has left behind: its networks, its memory on the device, and its compiled graphs."""
    if setup.scale.compiled:
        torch.compiler.reset()
    if setup.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def tell(found: dict[str, Any]) -> None:
    """Print the goals and what loses most."""
    for line in report.table(found["sections"][GOALS]["rows"]).splitlines():
        say(line)
    for place, text in enumerate(found["slowest"], 1):
        say(f"{place}. {text}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
