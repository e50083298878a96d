"""Several machines of several processes on one CPU: they start, are stopped, go on with other numbers, and are counted.

    python benchmarks/machines.py --machines 4 --processes 4

A toy student learns from a toy teacher, once on one process and once on all: these are stopped by a signal to one of
them, and half of the machines go on. The losses must be those of the one process. strace counts what each process asks
of the folder that all share (photos, index, run): photos and other files opened, files looked at, folders listed, and
bytes read, mapped ones included. Processes are forked from one that has imported everything, so many fit in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from deit_kd.cli import main as deit_kd

CLASSES, PHOTOS, HELD_OUT = 4, 64, 16
CALLS = "openat,newfstatat,statx,getdents64,read,pread64,mmap"
KINDS = {"openat": "opens", "newfstatat": "looks", "statx": "looks", "getdents64": "lists"}
COLUMNS = ("training photos", "other photos", "opens", "looks", "lists")
LINE = re.compile(r"(\w+)\((.*)\) += (-?\w+)")
MOST = {
    "opens": 60,
    "looks": 150,
    "lists": 10,
}  # of a process that is neither the main one nor the first of its machine
STUDENT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def recipe(shared: Path, output: str, batch_size: int) -> list[str]:
    """Return the arguments of a run of two epochs."""
    options = {
        "data.root": shared / "photos",
        "data.image_size": 16,
        "data.workers": 0,
        "data.cache": "memory",
        "augment.auto_augment": "null",
        "augment.repeats": 1,
        "student.name": "deit_tiny_distilled_patch16_224",
        "student.args": json.dumps(STUDENT),
        "student.drop_path": 0.0,
        "teacher.name": "test_resnet",
        "teacher.random_weights": "true",
        "distill.kind": "soft",
        "optim.warmup_epochs": 0,
        "train.epochs": 2,
        "train.batch_size": batch_size,
        "train.precision": "off",
        "train.device": "cpu",
        "train.log_every_steps": 1,
        "train.checkpoint_every_steps": 1,
        "evaluate.report": "false",
        "output": shared / output,
        "resume": "auto",
    }
    return ["train", *(word for key, value in options.items() for word in (f"--{key}", str(value)))]


def write_photos(root: Path) -> None:
    """Write a tree of noise."""
    for split, count in (("train", PHOTOS), ("validation", HELD_OUT)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([label, index]).integers(0, 255, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:03d}.png")


def forked(act: list[str], rank: int, machines: int, each: int, port: int, said: Path) -> int:
    """Start process `rank` of a run; return its id."""
    if pid := os.fork():
        return pid
    code = 99
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": machines * each, "RANK": rank}
    place |= {"LOCAL_RANK": rank % each, "DEIT_KD_MACHINE": f"machine {rank // each}"}
    os.environ.update({key: str(value) for key, value in place.items()})
    try:
        sys.stdout = sys.stderr = open(said / f"{rank:03d}.txt", "a", buffering=1)  # noqa: SIM115 - until the end
        from deit_kd.console import console

        console.file = sys.stdout
        code = deit_kd(act)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(
    act: list[str], machines: int, each: int, said: Path, stop_when: Path | None = None
) -> tuple[list[int], set[int]]:
    """Run all processes; return their ids by rank, and their exit codes.

    Once `stop_when` is there, the last process gets SIGUSR1.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    said.mkdir(exist_ok=True)
    pids = [forked(act, rank, machines, each, port, said) for rank in range(machines * each)]
    while stop_when is not None and not stop_when.exists():
        time.sleep(0.05)
    if stop_when is not None:
        os.kill(pids[-1], signal.SIGUSR1)
    return pids, {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}


def losses(run_folder: Path) -> list[float]:
    records = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "step"]


def inner(shared: Path, machines: int, each: int) -> None:
    """Run everything; the ids of the processes go to ``pids.json``."""
    from deit_kd.jobs import train  # noqa: F401 - now, and not once more in each process

    said = shared.parent / "said"
    write_photos(shared / "photos")
    time.sleep(2.1)  # an index does not trust folders that have just changed
    assert deit_kd(["data", "index", str(shared / "photos")]) == 0
    batch = 2 * machines * each
    phases = {}
    _, codes = run(recipe(shared, "one", batch), 1, 1, said)
    assert codes == {0}, codes
    stop_when = shared / "run" / "checkpoints" / "step-000000001.safetensors"
    phases["start, and stopped by a signal"], codes = run(recipe(shared, "run", batch), machines, each, said, stop_when)
    assert codes == {75}, f"{codes}; see {said}"
    half = max(1, machines // 2)
    phases["resume on half of the machines"], codes = run(recipe(shared, "run", batch), half, each, said)
    assert codes == {0}, f"{codes}; see {said}"
    expected, found = losses(shared / "one"), losses(shared / "run")
    assert len(expected) == len(found)
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(expected, found, strict=True)), (expected, found)
    print(f"{len(found)} steps: the losses are those of one process (relative 1e-5)")
    (shared.parent / "pids.json").write_text(json.dumps(phases))


def calls(trace: Path) -> Iterator[tuple[int, str, str, int]]:
    """Yield the calls of a trace: the thread, the name, the arguments and the result."""
    begun: dict[str, str] = {}
    for line in trace.read_text(errors="replace").splitlines():
        thread, _, said = line.partition(" ")
        if said.endswith("<unfinished ...>"):
            begun[thread] = said.removesuffix("<unfinished ...>")
            continue
        said = begun.pop(thread, "") + said.partition("resumed>")[2] if "resumed>" in said else said
        if (found := LINE.match(said.strip())) is not None:
            yield int(thread), found[1], found[2], int(found[3], 0)


def counted(trace: Path, shared: Path) -> dict[int, Counter[str]]:
    """Return what each process, threads included, asked of the shared folder."""
    asked: dict[int, Counter[str]] = {}
    parents: dict[int, int] = {}
    for thread, call, given, result in calls(trace):
        if call in ("clone", "clone3"):
            parents |= {result: parents.get(thread, thread)} if "CLONE_THREAD" in given else {}
        elif str(shared) in given:
            mine = asked.setdefault(parents.get(thread, thread), Counter())
            kind = KINDS.get(call, "")
            if kind == "opens" and ".png" in given:
                kind = "training photos" if "/train/" in given else "other photos"
            mine[kind] += "AT_EMPTY_PATH" not in given  # a look at a file that is open costs nothing
            mine["bytes"] += max(result, 0) if call.endswith(("read", "read64")) else 0
            mine["bytes"] += int(given.split(",")[1]) if call == "mmap" else 0
    return asked


def table(asked: dict[int, Counter[str]], phases: dict[str, list[int]], each: int) -> bool:
    """Print what processes asked for; return whether all others ask for no more than MOST."""
    print(f"| phase | process | {' | '.join(COLUMNS)} | kB read or mapped |")
    print("|---|---|---|---|---|---|---|---|")
    is_bounded = True
    for phase, pids in phases.items():
        of = [asked.get(pid, Counter()) for pid in pids]
        groups = {"the main one": of[:1], "first of a machine": of[each::each]}
        groups["any other"] = [each_asked for rank, each_asked in enumerate(of) if rank % each]
        for name, group in groups.items():
            if group:
                most = {kind: max(one[kind] for one in group) for kind in (*COLUMNS, "bytes")}
                counts = " | ".join(str(most[kind]) for kind in COLUMNS)
                print(f"| {phase} | {name} | {counts} | {most['bytes'] / 1e3:.0f} |")
                is_bounded &= name != "any other" or all(most[kind] <= limit for kind, limit in MOST.items())
    return is_bounded


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--machines", type=int, default=4)
    parser.add_argument("--processes", type=int, default=4, help="of each machine")
    parser.add_argument("--inner", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inner is not None:
        inner(arguments.inner, arguments.machines, arguments.processes)
        return
    if shutil.which("strace") is None:
        parser.error("strace: is not installed; it counts what the processes ask for")
    with tempfile.TemporaryDirectory() as home:
        shared, trace = Path(home) / "shared", Path(home) / "trace"
        command = ["strace", "-f", "--seccomp-bpf", "-y", "-s", "0", "-o", str(trace), "-e"]
        command += [f"trace={CALLS},clone,clone3", sys.executable, __file__, "--inner", str(shared)]
        sizes = ["--machines", str(arguments.machines), "--processes", str(arguments.processes)]
        environment = {"DEIT_KD_CACHE": str(shared / "cache"), "OMP_NUM_THREADS": "1"}
        since = time.monotonic()
        done = subprocess.run([*command, *sizes], env={**os.environ, **environment})
        if done.returncode:
            for file in sorted((Path(home) / "said").glob("*.txt")):
                print(f"--- {file.name}\n{file.read_text()[-600:]}", file=sys.stderr)
            sys.exit(1)
        print(f"{arguments.machines} machines of {arguments.processes} processes, {time.monotonic() - since:.0f} s")
        phases = json.loads((Path(home) / "pids.json").read_text())
        if not table(counted(trace, shared), phases, arguments.processes):
            sys.exit(f"a process asks for more than {MOST}")


if __name__ == "__main__":
    main()
