"""Our loop against timm's ``TokenDistillationTask`` with timm's loader, as timm's ``train.py`` puts them together.

    python benchmarks/against_timm.py --config configs/photos.yaml --data.root PHOTOS --teacher.checkpoint RUN \\
        --teacher.fit.epochs 0 [--rounds 7] [--steps 10] [--photos 4096] [--json FILE] [--any.recipe_key VALUE]

The same student, photos, teacher weights, batch, autocast, workers and strengths of augmentation. timm's side is
timm's defaults: JPEG files opened for every view, fused attention, plain AdamW, a teacher in fp32 and NCHW under the
student's autocast. Each side lives in a process of its own, since the choice of attention and the way freed memory is
kept are a process's; the two take turns, and the one that waits rests. A recipe with mixing or repeated augmentation
is refused: on one process timm deals no repeats, and mixes otherwise.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageDataset, create_loader
from timm.data.readers.reader import Reader
from timm.optim import create_optimizer_v2
from timm.task import TokenDistillationTask
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from deit_kd.config import Config, build_parser, parse_config
from deit_kd.console import say
from deit_kd.data import Photos
from deit_kd.distributed import Processes, pick_device, start
from deit_kd.interfaces import InputError
from deit_kd.jobs.bench import ONLINE, SETTLING_STEPS, STEP, STORED, Clock, open_parts, print_rates, some_photos
from deit_kd.models.create import size_argument
from deit_kd.openmp import SPIN_COUNT
from deit_kd.origins import open_origin
from deit_kd.runs.photos import build_splits
from deit_kd.teaching.fit import fitted_teacher

TIMMS_LOOP, TIMMS_STEP = "timm: loop, teacher online", "timm: student's step"
OURS = {ONLINE: f"ours: {ONLINE}", STORED: f"ours: {STORED}", STEP: f"ours: {STEP}"}
TURNS = (TIMMS_LOOP, OURS[ONLINE], OURS[STORED], TIMMS_STEP, OURS[STEP])
RATIOS = ((OURS[ONLINE], [TIMMS_LOOP]), (OURS[STORED], [TIMMS_LOOP]), (OURS[STEP], [TIMMS_STEP]))
FRESH = multiprocessing.get_context("spawn")
REST_SECONDS = 1.0  # for the workers of the side that was timed before

Act = Callable[[str], object]


class PhotosReader(Reader):
    """The same photos for timm's dataset."""

    def __init__(self, photos: Photos) -> None:
        super().__init__()
        assert photos.root is not None, "timm's dataset reads files"
        self._files = [photos.root / name for name in photos.names]
        self._labels = photos.labels

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open(self._files[index], "rb"), self._labels[index]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return str(self._files[index])


class Known(nn.Module):
    """A teacher that answers whatever it is asked with the same logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, C]."""
        return self.logits


class Timm:
    """The parts of timm's ``train.py``: loader, task, optimiser, clipping, average."""

    def __init__(self, config: Config, steps: int, photos: int) -> None:
        self._config, self._steps = config, steps
        self._device = pick_device(config.train.device)
        splits = build_splits(config)
        self._loader = self._build_loader(some_photos(splits.train, photos))
        classes = splits.train.classes
        teacher = timms_teacher(config, len(classes), Processes(0, 1, self._device), splits).to(self._device)
        self._stream = self._batches()
        held = next(self._stream)
        with torch.no_grad(), self._autocast():
            known = Known(teacher(held[0]))
        self._parts = {
            TIMMS_LOOP: (*self._build_task(teacher, len(classes)), self._stream),
            TIMMS_STEP: (*self._build_task(known, len(classes)), itertools.repeat(held)),
        }

    def _build_loader(self, photos: Photos) -> Any:
        data, augment = self._config.data, self._config.augment
        return create_loader(
            ImageDataset(str(photos.root), reader=PhotosReader(photos)),
            input_size=(3, data.image_size, data.image_size),
            batch_size=self._config.train.batch_size,
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.horizontal_flip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            re_prob=augment.erasing,
            re_mode="pixel",
            interpolation=data.interpolation,
            mean=data.mean,
            std=data.std,
            num_workers=data.workers,
            pin_memory=False,
            device=self._device,
        )

    def _build_task(self, teacher: nn.Module, classes: int) -> tuple[TokenDistillationTask, torch.optim.Optimizer]:
        config = self._config
        assert config.student.name is not None
        arguments = {**size_argument(config.student.name, config.data.image_size), **config.student.args}
        student = timm.create_model(
            config.student.name, num_classes=classes, drop_path_rate=config.student.drop_path, **arguments
        )
        attention = {module.fused_attn for module in student.modules() if hasattr(module, "fused_attn")}
        assert attention <= {True}, "timm's default is fused attention"
        task = TokenDistillationTask(
            student.to(self._device),
            teacher,
            criterion_kwargs={"smoothing": config.augment.label_smoothing},
            distill_type=config.distill.kind,
            task_loss_weight=1 - config.distill.alpha,
            temperature=config.distill.temperature,
            device=self._device,
            verbose=False,
        )
        if config.train.ema_decay != 0:
            task.setup_ema(decay=config.train.ema_decay or 0.9998, use_warmup=True)
        optim = config.optim
        optimizer = create_optimizer_v2(
            student, opt=optim.name, lr=optim.lr, weight_decay=optim.weight_decay, **optim.args
        )
        return task.train(), optimizer

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self._loader

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.train.precision == "bf16")

    def settle(self, name: str) -> None:
        """Bring a part, and its workers, to the pace that it will keep."""
        if name == TIMMS_LOOP:
            for _ in itertools.islice(self._stream, 2 * self._config.data.workers + 1):
                pass
        self.run(name, SETTLING_STEPS)

    def run(self, name: str, steps: int | None = None) -> None:
        """Run one part."""
        task, optimizer, batches = self._parts[name]
        for step, (images, labels) in enumerate(itertools.islice(batches, steps or self._steps)):
            with self._autocast():
                loss = task(images, labels)["loss"]
            loss.backward()
            if self._config.optim.clip_grad_norm is not None:
                dispatch_clip_grad(task.get_clip_parameters(), value=self._config.optim.clip_grad_norm, mode="norm")
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(step=step)


def timms_teacher(config: Config, classes: int, processes: Processes, splits: Any) -> nn.Module:
    """Return the recipe's teacher as timm holds it: fp32, NCHW, its weights the same file's."""
    section = config.teacher
    if section.members or section.pretrained or section.class_map:
        raise InputError("teacher: this comparison takes one teacher of the dataset's own classes; name a checkpoint")
    if section.random_weights:
        assert section.name is not None
        return timm.create_model(section.name, num_classes=classes, **section.args)
    checkpoint = str(fitted_teacher(config, processes, splits)) if section.fit.epochs else section.checkpoint
    assert checkpoint is not None
    weights = open_origin("teacher.checkpoint", checkpoint)
    name = section.name or weights.architecture
    assert name is not None
    teacher = timm.create_model(name, num_classes=classes, **{**weights.arguments_of(name), **section.args})
    teacher.load_state_dict(weights.state)
    return teacher


@contextmanager
def timms_side(config: Config, options: dict[str, Any]) -> Iterator[tuple[Act, Act]]:
    """Yield how to settle and how to run a part of timm's."""
    side = Timm(config, options["steps"], options["photos"])
    yield side.settle, side.run


@contextmanager
def our_side(config: Config, options: dict[str, Any]) -> Iterator[tuple[Act, Act]]:
    """Yield how to settle and how to run a part of ours."""
    processes, splits = start(config.train.device), build_splits(config)
    names = {label: name for name, label in OURS.items()}
    with open_parts(config, processes, splits, options["rounds"], options["steps"], options["photos"]) as timed:
        timed.warm_up()
        yield lambda label: timed.settle(names[label]), lambda label: timed.run(names[label])


def serve(side: Callable[..., Any], arguments: list[str], line: Connection) -> None:
    """Answer each name of a part with its images/s, timed here, until None comes."""
    config, options = read(arguments)
    clock = Clock(pick_device(config.train.device))
    images = options["steps"] * config.train.batch_size
    with side(config, options) as (settle, run):
        line.send("ready")
        for name in iter(line.recv, None):
            settle(name)
            clock.take(name, images, partial(run, name))
            line.send(clock.rates[name][-1])


def read(arguments: list[str]) -> tuple[Config, dict[str, Any]]:
    """Return the recipe and the options of a command line, once both sides can run it."""
    parser = build_parser("against_timm")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--photos", type=int, default=4096)
    parser.add_argument("--json", type=str, default=None)
    config, options = parse_config(arguments, parser)
    if config.augment.repeats > 1 or config.augment.mixup or config.augment.cutmix:
        raise InputError("augment: timm deals and mixes otherwise on one process; set repeats 1, mixup 0 and cutmix 0")
    if config.distill.kind == "none" or config.train.precision == "fp16":
        raise InputError("distill.kind none and train.precision fp16 have no counterpart here; set soft or hard, bf16")
    return config, options


def main() -> None:
    config, options = read(sys.argv[1:])
    clock = Clock(pick_device(config.train.device))
    with ExitStack() as stack:
        lines = {}
        for name, side in (("ours", our_side), ("timm", timms_side)):  # ours fits the teacher where there is none
            lines[name], theirs = FRESH.Pipe()
            if side is timms_side and os.environ.get("GOMP_SPINCOUNT") == SPIN_COUNT:
                del os.environ["GOMP_SPINCOUNT"]  # which a program without this package does not have
            process = FRESH.Process(target=serve, args=(side, sys.argv[1:], theirs))
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(lines[name].send, None)
            lines[name].recv()
        for turn in range(options["rounds"]):
            for part in TURNS if turn % 2 == 0 else reversed(TURNS):
                time.sleep(REST_SECONDS)
                line = lines[part.split(":")[0]]
                line.send(part)
                clock.rates.setdefault(part, []).append(line.recv())
    ratios = clock.ratios(RATIOS)
    say(
        f"{config.student.name}, {config.data.image_size} px, teacher {config.teacher.name}, batch "
        f"{config.train.batch_size}, {config.train.precision}, {config.data.workers} workers, timm {timm.__version__}"
    )
    print_rates("images/s", clock.rates, 1)
    say("")
    print_rates("ratio", ratios, 2)
    if options["json"] is not None:
        found = {"rates": clock.rates, "ratios": ratios, "recipe": config.model_dump(mode="json")}
        Path(options["json"]).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
