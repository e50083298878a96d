"""Arms times folds of a recipe: train what is not finished, then one table with paired intervals.

    python benchmarks/folds.py --arms benchmarks/arms.yaml --config configs/photos.yaml --data.root PHOTOS \\
        [--to runs/arms] [--folds 5] [--only 0 1] [--base none] [--at-once 2] [--any.recipe_key VALUE]

An arm is a name and the keys of the recipe that it overrides, in YAML; ``{teacher}`` in a value stands for the folder
of the fold's fitted teacher, ``{fold}`` for its number. A teacher or a guide that several arms fit alike is fitted once
for each fold, before them. Runs lie in ``TO/<arm>-<fold>``, what they print in ``<arm>-<fold>.log`` beside them; the
same command goes on where it was left. ``deit-kd report TO/*-[0-9]`` draws them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from deit_kd.config import Config, build_parser, parse_config, read_recipe
from deit_kd.console import say
from deit_kd.distributed import process_group
from deit_kd.evaluation.sources import open_source
from deit_kd.interfaces import InputError
from deit_kd.jobs.evaluate import evaluate_folds
from deit_kd.run_folder import HEADS_FILE
from deit_kd.runs.photos import build_splits
from deit_kd.teaching.fit import fitted_teacher, guide_config, teacher_folder

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
TEACHER = "{teacher}"
RUNNING: set[subprocess.Popen[bytes]] = set()


class Job(NamedTuple):
    """A run, or the fit of a teacher, in a process of its own."""

    folder: Path  # that holds the scores when it is done
    log: Path
    command: tuple[str, ...]


def overrides(arm: Mapping[str, Any], fold: int, teacher: Path | None) -> list[str]:
    """Return the command line of an arm's keys for one fold."""
    arguments = []
    for key, value in arm.items():
        text = (value if isinstance(value, str) else json.dumps(value)).replace("{fold}", str(fold))
        arguments += [f"--{key}", text if teacher is None else text.replace(TEACHER, str(teacher))]
    return arguments


def plan(options: argparse.Namespace, common: list[str], arms: Mapping[str, Any]) -> dict[Job, list[Job]]:
    """Return the runs, fold by fold, each with the fits of the teachers that it waits for.

    Raises:
        InputError: a recipe cannot be, or two arms have the same.
    """
    jobs: dict[Job, list[Job]] = {}
    fits: dict[Path, Job] = {}
    for fold in options.only if options.only is not None else range(options.folds):
        place = ["--data.folds", str(options.folds), "--data.fold", str(fold)]
        recipes: dict[str, str] = {}
        for name, arm in arms.items():
            arguments = [*common, *overrides(arm, fold, None), *place]
            config, _ = parse_config(arguments)
            twin = recipes.setdefault(config.to_yaml(), name)
            if twin != name:
                raise InputError(f"--arms: {twin} and {name} are the same recipe; say what tells them apart")
            found: dict[str, Job] = {}
            for role, one in roles(config, arm).items():
                folder = teacher_folder(one, build_splits(one))
                log = options.to / f"teacher-{folder.name}-{fold}.log"
                job = Job(folder, log, (sys.executable, __file__, "--fit", role, *arguments))
                found[role] = fits.setdefault(folder, job)
            taught = [text for role, job in found.items() for text in fitted(role, job.folder)]
            teacher = found["teacher"].folder if "teacher" in found else None
            run = options.to / f"{name}-{fold}"
            own = [*overrides(arm, fold, teacher), *place, *taught]
            command = (sys.executable, str(TRAIN), *common, *own, "--output", str(run), "--resume", "auto")
            jobs[Job(run, options.to / f"{run.name}.log", command)] = list(found.values())
    return jobs


def roles(config: Config, arm: Mapping[str, Any]) -> dict[str, Config]:
    """Return the recipes of the teachers that an arm fits, by role: teacher and guide."""
    recipes = {}
    if config.teacher.fit.epochs and (config.distill.needs_teacher or TEACHER in str(arm)):
        recipes["teacher"] = config
    if config.guide.fit.epochs:
        recipes["guide"] = guide_config(config)
    return recipes


def fitted(role: str, folder: Path) -> list[str]:
    """Return the options that name a fitted teacher."""
    return [f"--{role}.checkpoint", str(folder), f"--{role}.fit.epochs", "0"]


def work(job: Job, after: Sequence[Future[bool]] = ()) -> bool:
    """Do a job unless it is done or what it waits for has failed; return whether it is done."""
    if (job.folder / HEADS_FILE).is_file():
        return True
    if not all(fit.result() for fit in after):
        say(f"left out, without its teacher: {job.folder}")
        return False
    say(f"begins: {job.folder}")
    with open(job.log, "a") as log, subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            RUNNING.add(process)
            code = process.wait()
        finally:
            RUNNING.discard(process)
    last = (job.log.read_text(errors="replace").splitlines() or [""])[-1]
    say(f"{'done' if code == 0 else 'failed'}: {job.folder}" + f" ({last}; see {job.log})" * (code != 0))
    return code == 0


def work_all(jobs: Mapping[Job, Sequence[Job]], at_once: int) -> bool:
    """Do all jobs, those first that others wait for; return whether all are done."""
    with ThreadPoolExecutor(at_once) as pool:
        try:
            fits = {fit: pool.submit(work, fit) for fit in dict.fromkeys(chain.from_iterable(jobs.values()))}
            runs = [pool.submit(work, job, [fits[fit] for fit in needed]) for job, needed in jobs.items()]
            return all([run.result() for run in runs])  # noqa: C419 - all of them are waited for
        except BaseException:  # a signal: what runs writes its checkpoint and ends
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                process.terminate()
            raise


def table(runs: Sequence[Path], folder: Path) -> None:
    """Join the finished runs of each arm over its folds, and compare the arms with the first one."""
    sources = [open_source(str(run)) for run in runs if (run / HEADS_FILE).is_file()]
    if sources:
        evaluate_folds([(one, parse_config(one.recipe, build_parser("folds"))[0]) for one in sources], folder)


def fit(role: str, config: Config) -> None:
    """Fit the teacher, or the guide, of a recipe unless it is there."""
    config = guide_config(config) if role == "guide" else config
    with process_group(config.train.device) as processes:
        fitted_teacher(config, processes, build_splits(config))


def read_arms(file: Path, base: str | None) -> dict[str, dict[str, Any]]:
    """Return the keys that each arm overrides, the base arm first.

    Raises:
        InputError: the file names no arms, or no such base.
    """
    arms = {name: arm or {} for name, arm in read_recipe(file).items()}
    wrong = [name for name, arm in arms.items() if not isinstance(arm, dict)]
    if not arms or wrong:
        raise InputError(f"--arms: {file}: {wrong or 'nothing'} is not an arm, which is a name and keys with values")
    base = next(iter(arms)) if base is None else base
    if base not in arms:
        raise InputError(f"--base: {base!r} is not an arm; use one of {', '.join(arms)}")
    return {base: arms[base], **arms}


def main() -> int:
    """Train, join, compare; return 1 where a run has failed."""
    if sys.argv[1:2] == ["--fit"]:
        fit(sys.argv[2], parse_config(sys.argv[3:])[0])
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--arms", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=Path("runs/arms"))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="+", default=None)
    parser.add_argument("--base", default=None)
    parser.add_argument("--at-once", type=int, default=2)
    options, common = parser.parse_known_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    arms = read_arms(options.arms, options.base)
    jobs = plan(options, ["--evaluate.report", "false", *common], arms)
    options.to.mkdir(parents=True, exist_ok=True)
    done = work_all(jobs, options.at_once)
    folds = options.only if options.only is not None else range(options.folds)
    table([options.to / f"{name}-{fold}" for name in arms for fold in folds], options.to / "joined")
    return 0 if done else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
