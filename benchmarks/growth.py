"""How a step and a store grow: with the image, with the student, with the classes and with the epochs stored.

    python benchmarks/growth.py --config configs/photos.yaml --teacher.fit.epochs 0 --teacher.random_weights true \\
        [--rounds 3] [--steps 1] [--sizes 96 128 160 224] [--models …] [--classes 10 1000 21000] [--views 1281167] \\
        [--json FILE] [--any.recipe_key VALUE]

Prints Markdown tables. The student's step is the recipe's, on random images in memory and with the teacher's answers
known; the points of a table are timed in turns. What a store costs is measured with the recipe's teacher at its image
size, and multiplied by the views of `--views` photos: that much of the last table is arithmetic. No data is read.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bare_step import BareStep, class_names, random_batch

from deit_kd.config import Config, build_parser, parse_config
from deit_kd.console import say
from deit_kd.distributed import Processes, start
from deit_kd.interfaces import Batch, TeacherOutput
from deit_kd.jobs.bench import Clock, print_markdown
from deit_kd.machine import kind
from deit_kd.runs import parts
from deit_kd.store import LabelStore, Record, RecordingTeacher, StoredTeacher, epoch_part
from deit_kd.teaching.recording import SOFT_TOP

MODELS = [f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")]
EPOCHS = (1, 10, 50, 100, 300)
STORE_BATCHES = 16  # of the store that is timed


def main() -> None:
    parser = build_parser("growth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128, 160, 224])
    parser.add_argument("--models", type=str, nargs="+", default=MODELS)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 1_000, 21_000])
    parser.add_argument("--views", type=int, default=1_281_167)
    parser.add_argument("--json", type=str, default=None)
    config, given = parse_config(sys.argv[1:], parser)
    processes = start(config.train.device)
    growth = Growth(config, processes, given["rounds"], given["steps"])
    say(
        f"{config.student.name}, {config.data.image_size} px, batch {config.train.batch_size}, "
        f"{config.train.precision}, {kind(processes.device)} with {torch.get_num_threads()} threads"
    )
    growth.with_size(given["sizes"])
    growth.with_model(given["models"])
    growth.with_classes(given["classes"])
    growth.with_epochs(given["views"])
    if given["json"] is not None:
        Path(given["json"]).write_text(json.dumps({"torch": torch.__version__, **growth.found}, indent=2) + "\n")


class Growth:
    """The tables; one point of them is a variant of one recipe."""

    def __init__(self, config: Config, processes: Processes, rounds: int, steps: int) -> None:
        self._config, self._processes = config, processes
        self._rounds, self._steps = rounds, steps
        self.found: dict[str, Any] = {}

    def with_size(self, sizes: Iterable[int]) -> None:
        """Print the student's step by image size."""
        self._table("image", {f"{size} px": self._step(image_size=size) for size in sizes})

    def with_model(self, models: Iterable[str]) -> None:
        """Print the step by student."""
        self._table("student", {name: self._step(name=name) for name in models})

    def with_classes(self, counts: Iterable[int]) -> None:
        """Print the step by classes, and what a store of the recipe's record costs then."""
        steps = {f"{count:,} classes": self._step(classes=count) for count in counts}
        stores = {f"{count:,} classes": self._store_costs(count) for count in counts}
        self._table("classes", steps, ["bytes a view", "written, µs a view", "read, µs a view"], stores)

    def with_epochs(self, views: int) -> None:
        """Print time and disk of a store of `views` photos by epochs, from the rate of the recipe's teacher."""
        config = self._config
        classes = class_names(1_000)
        teacher = parts.build_teacher(config, classes, self._processes, config.teacher.checkpoint)
        batch, clock = random_batch(config, len(classes), self._processes.device), Clock(self._processes.device)
        teacher(batch)
        for _ in range(self._rounds):
            clock.take("teacher", len(batch.labels), partial(teacher, batch))
        rate = statistics.median(clock.rates["teacher"])
        self.found["teacher, views/s"] = clock.rates["teacher"]
        label, top = Record(len(classes), 0).bytes_per_view, Record(len(classes), SOFT_TOP).bytes_per_view
        say(f"{config.teacher.name} answers {rate:.1f} views/s here; {views:,} views an epoch")
        print_markdown(
            ["epochs stored", "teacher's time", "hard labels, GB", f"top {SOFT_TOP}, GB"],
            [
                [
                    str(epochs),
                    f"{timedelta(seconds=round(epochs * views / rate))}",
                    f"{epochs * views * label / 1e9:.3g}",
                    f"{epochs * views * top / 1e9:.3g}",
                ]
                for epochs in EPOCHS
            ],
        )

    def _table(
        self,
        what: str,
        points: Mapping[str, Callable[[int], object]],
        more: list[str] | None = None,
        cells: dict[str, list[str]] | None = None,
    ) -> None:
        """Time `points` in turns; print the time of an image with its spread, and over that of the first point."""
        clock = Clock(self._processes.device)
        for point in points.values():
            point(1)
        for _ in range(self._rounds):
            for name, point in points.items():
                clock.take(name, self._steps * self._config.train.batch_size, partial(point, self._steps))
        milliseconds = {name: [1000 / rate for rate in rates] for name, rates in clock.rates.items()}
        self.found[f"{what}, ms an image"] = milliseconds
        first = statistics.median(next(iter(milliseconds.values())))
        rows = [
            [
                name,
                *(f"{pick(values):.2f}" for pick in (statistics.median, min, max)),
                f"{statistics.median(values) / first:.2f}",
                *((cells or {}).get(name, [])),
            ]
            for name, values in milliseconds.items()
        ]
        print_markdown([what, "ms an image", "lowest", "highest", "times the first", *(more or [])], rows)
        say("")

    def _step(self, name: str | None = None, image_size: int | None = None, classes: int = 10) -> Callable[[int], None]:
        """Return the student's step of one point, to be done some times."""
        config = self._config
        data, student = {"image_size": image_size or config.data.image_size}, {"name": name or config.student.name}
        return BareStep(config.with_keys(data=data, student=student), classes, self._processes)

    def _store_costs(self, classes: int) -> list[str]:
        """Return bytes a view, and the microseconds that writing and reading one take."""
        top = 0 if self._config.distill.kind == "hard" else SOFT_TOP
        size, device = self._config.train.batch_size, self._processes.device
        views = STORE_BATCHES * size
        manifest = {
            "identity": {},
            "classes": list(class_names(classes)),
            "top": top,
            "views": views,
            "validation": 0,
            "libraries": [{"torch": torch.__version__}],
            "teacher": {"name": self._config.teacher.name, "random_weights": True, "weights": "0"},
        }
        with TemporaryDirectory(prefix="deit-kd-growth-") as folder:
            store = LabelStore.begin(folder, manifest)
            answer = TeacherOutput(torch.randn(size, classes, device=device))
            recorder, reader = RecordingTeacher(lambda batch: answer, store), StoredTeacher(store, 1)
            images = torch.empty(size, device=device)
            labels = torch.zeros(size, dtype=torch.long)
            ids = torch.stack([torch.zeros(views, dtype=torch.long), torch.arange(views)], 1)
            batches = [Batch(images, images, labels, some) for some in ids.split(size)]

            def write() -> None:
                for batch in batches:
                    recorder(batch)
                recorder.flush()
                store.finish(epoch_part(0))

            def read() -> None:
                for batch in batches:
                    reader(batch)

            seconds = [_seconds(act) for act in (write, read)]
        return [str(store.record.bytes_per_view), *(f"{1e6 * passed / views:.1f}" for passed in seconds)]


def _seconds(act: Callable[[], None]) -> float:
    since = time.perf_counter()
    act()
    return time.perf_counter() - since


if __name__ == "__main__":
    main()
