"""How starting and memory grow with the number of photos: trees of synthetic photos, with and without an index.

    python benchmarks/scale.py [--photos 10000 100000 1281167] [--columns 10000 100000 1000000 10000000]
        [--workers 2] [--to FOLDER] [--json FILE]

A tree has up to 1,000 classes; its files are links to one tiny JPEG for each class, so that it takes little disk. Every
start is a process of its own, as ``deit-kd train`` starts until it asks for the views of its first step. Memory is what
that process holds besides its libraries: its own, and what it maps from the index, which all processes share. Workers
then make an epoch of views; their memory is what each holds for itself. ``--columns`` times what only needs the
columns, without any files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from PIL import Image
from rich.table import Table

from deit_kd.console import console, say
from deit_kd.runs.photos import agreed_splits

CLASSES, VALIDATION_SHARE = 1000, 25  # one validation photo for so many training photos, as in ImageNet
MEGABYTE = 2**20


def make_tree(root: Path, photos: int) -> None:
    """Write a tree of `photos` training photos and its validation split."""
    classes = min(CLASSES, photos // 20)
    for split, count in (("train", photos), ("validation", max(photos // VALIDATION_SHARE, classes))):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            first = folder / f"{folder.name}_0.JPEG"
            Image.new("RGB", (8, 8), (label % 256, 99, 9)).save(first)
            for index in range(1, count // classes + (label < count % classes)):
                os.link(first, f"{folder}/{folder.name}_{index}.JPEG")


def memory(process: int | str = "self") -> dict[str, float]:
    """Return the megabytes that a process holds for itself, and those that it maps from files or shares."""
    fields = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        fields[name] = int(value.split()[0]) * 1024 / MEGABYTE
    own = fields["Private_Dirty"] + fields["Private_Clean"]
    return {"own": fields["Private_Dirty"], "mapped": fields["Rss"] - own + fields["Private_Clean"]}


def started(root: Path, began: float, workers: int) -> dict[str, Any]:
    """Start as a training run does, until it asks for the views of its first step; with `workers`, make an epoch."""
    import torch

    from deit_kd.config import parse_config
    from deit_kd.distributed import process_group
    from deit_kd.engine import Trainer  # noqa: F401 (as a run imports it)
    from deit_kd.jobs.train import train  # noqa: F401
    from deit_kd.runs.viewing import build_training_loader, cached

    recipe = ["--data.root", str(root), "--data.image_size", "8", "--train.batch_size", "256", "--distill.kind", "none"]
    config, _ = parse_config([*recipe, "--augment.auto_augment", "null", "--data.workers", str(workers)])
    found: dict[str, Any] = {"imports": time.time() - began}
    with process_group("cpu") as processes:
        before = memory()
        splits = agreed_splits(config, processes)
        found["listed"] = time.time() - began
        splits = splits._replace(train=cached(config, splits.train, processes))
        loader = build_training_loader(config, splits.train, processes)
        digests = [photos.digest() for photos in splits]
        loader.views_of_step(0)
        found["first views"] = time.time() - began
        after = memory()
        found |= {f"MB {kind}": after[kind] - before[kind] for kind in after}
        found["photos"], found["digests"] = len(splits.train), digests
        if workers:
            torch.set_num_threads(1)
            found["MB of each worker"] = _worker_memory(splits.train, workers)
    return found


def _worker_memory(photos: Any, workers: int) -> dict[str, float]:
    """Return what the largest worker holds for itself after its first batches, and after an epoch."""
    import torch

    from deit_kd import data

    def smallest(image: Image.Image) -> torch.Tensor:
        return torch.zeros(3, 1, 1)

    sampler = data.TrainingBatchSampler(
        photos=len(photos), repeats=1, seed=0, batch_size=256, accumulation_steps=1, rank=0, processes=1, pairs=False,
        epochs=1,
    )  # fmt: skip
    mixing = data.Mixing(
        classes=len(photos.classes), seed=0, mixup=0.0, cutmix=0.0, probability=1.0, switch_probability=0.5,
        label_smoothing=0.0,
    )  # fmt: skip
    loader = data.PillowLoader(data.Views(photos, smallest, 0), sampler, mixing, workers, pin_memory=False)
    held: list[float] = []
    for step, _ in enumerate(loader.batches(0)):
        if step == 2 * workers or step % 500 == 499:
            children = multiprocessing.active_children()
            held.append(max(memory(child.pid or 0)["own"] for child in children))
    return {"first": held[0], "last": held[-1]}


def columns_only(count: int, folder: Path) -> dict[str, Any]:
    """Time what needs no file: the index, the digest, the order of an epoch, the identity of a store."""
    from deit_kd.config import parse_config
    from deit_kd.data import Photos, Splits
    from deit_kd.data.index import read_index, write_index
    from deit_kd.data.names import Names
    from deit_kd.data.order import epoch_order
    from deit_kd.data.source import TreeFiles
    from deit_kd.teaching.store_identity import identity

    labels = np.arange(count) * CLASSES // count
    names = arrow.array((f"n{label:08d}/n{label:08d}_{index}.JPEG" for index, label in enumerate(labels)))
    columns = {"size": np.full(count, 110_000), "changed_ns": np.full(count, time.time_ns())}
    place = folder / f"{count}.arrow"
    found: dict[str, Any] = {"entries": count}

    def timed(name: str, act: Callable[[], Any]) -> Any:
        since = time.perf_counter()
        answer = act()
        found[name] = time.perf_counter() - since
        return answer

    timed("write index", lambda: write_index(place, names.cast(arrow.large_string()), columns, {}))
    found["index MB"] = place.stat().st_size / MEGABYTE
    index = timed("open index", lambda: read_index(place))
    classes = tuple(f"n{label:08d}" for label in range(CLASSES))

    def photos() -> Photos:
        return Photos(
            Names(index.names), labels, classes, TreeFiles(index.columns["size"], index.columns["changed_ns"])
        )

    timed("digest", lambda: photos().digest())
    timed("epoch order", lambda: epoch_order(count, 1, 0, 0))
    config, _ = parse_config(["--teacher.name", "resnet18", "--distill.kind", "soft"])
    few = photos().subset(np.arange(0, count, VALIDATION_SHARE))
    timed("store manifest", lambda: identity(config, Splits(photos(), few)))
    return found


def in_a_process(*arguments: str, cache: Path) -> dict[str, Any]:
    """Return what this program says when it is started with `arguments`."""
    command = [sys.executable, __file__, "--child", *arguments, "--began", str(time.time())]
    environment = {**os.environ, "DEIT_KD_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def table_of(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Return rows of the same keys as a table."""
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else _shown(value) for value in row.values()))
    return table


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def measured(photos: int, folder: Path, workers: int) -> list[dict[str, Any]]:
    """Return what starts with and without an index take for a new tree."""
    root, cache = folder / "tree", folder / "cache"
    since = time.perf_counter()
    make_tree(root, photos)
    say(f"a tree of {photos:,} photos, made in {time.perf_counter() - since:.0f} s")
    time.sleep(3)  # a folder that changed just now is not taken from an index
    rows = []
    for index in ("none", "there"):
        if index == "there":  # for a small tree, none was made without being asked for
            in_a_process("index", str(root), cache=cache)
        found = in_a_process("start", str(root), "--workers", str(workers if index == "there" else 0), cache=cache)
        held = found.pop("MB of each worker", {"first": None, "last": None})
        rows.append({"photos": found.pop("photos"), "index": index})
        rows[-1] |= {key: value for key, value in found.items() if key != "digests"}
        rows[-1] |= {"MB of a worker, first": held["first"], "after an epoch": held["last"]}
    shutil.rmtree(root)
    shutil.rmtree(cache)
    return rows


def main() -> None:
    """Print the tables, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="*", default=[10_000, 100_000, 1_281_167])
    parser.add_argument("--columns", type=int, nargs="*", default=[10_000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--to", type=Path, default=None, help="folder on the disk to measure; a temporary one unless set"
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        what, root = options.child
        if what == "start":
            print(json.dumps(started(Path(root), options.began, options.workers)))
        elif what == "index":
            from deit_kd.data.folder import index_tree

            print(json.dumps(index_tree(root=root, train_split="train", validation_split="validation")))
        else:
            print(json.dumps(columns_only(int(what.removeprefix("columns")), Path(root))))
        return
    with tempfile.TemporaryDirectory(dir=options.to) as place:
        folder = Path(place)
        rows = [row for photos in options.photos for row in measured(photos, folder, options.workers)]
        if rows:
            console.print(table_of("Starts: seconds since the process began, megabytes besides the libraries", rows))
        others = [in_a_process(f"columns{count}", place, cache=folder) for count in options.columns]
        if others:
            console.print(table_of("Without files: seconds", others))
    if options.json is not None:
        options.json.write_text(json.dumps({"starts": rows, "columns": others}, indent=2) + "\n")


if __name__ == "__main__":
    main()
