"""The parts that several test modules share: students, teachers, loaders, stores and trainers of a tiny size."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deit_kd import Batch, Distiller, FrozenTeacher, Objective, TeacherOutput
from deit_kd.data import Mixing, Photos, PillowLoader, Splits, TrainingBatchSampler, TrainingLoader, Views, build_splits
from deit_kd.distributed import Processes
from deit_kd.engine import Trainer
from deit_kd.interfaces import Preprocessing, Statistics
from deit_kd.learner import Learner
from deit_kd.models.state import save_local_dir
from deit_kd.optim import WeightAverage, build_optimizer, build_schedule
from deit_kd.store import LabelStore, epoch_part
from deit_kd.students import TimmStudent, build_student
from deit_kd.teachers import build_teacher
from deit_kd.views import Transform, training_transform
from tests.helpers import CLASSES, FIVE_CLASSES, MEAN, ONE_PROCESS, STD, STUDENT, STUDENT_ARGS, TINY

STORED_CLASSES, STORED_VIEWS = 6, 20


def folder_splits(root: Path | None, **options: Any) -> Splits:
    """Return the photos under `root`, whose fifth is for validation unless they say or `options` say otherwise."""
    base: dict[str, Any] = {
        "name": "folder",
        "root": None if root is None else str(root),
        "train_split": "train",
        "validation_split": "validation",
        "validation_fraction": 0.2,
        "folds": None,
        "fold": None,
        "download": False,
    }
    return build_splits(**{**base, **options})


def training_loader(
    photos: Photos, transform: Any, *, seed: int = 0, workers: int = 0, skip: bool = False, **options: Any
) -> TrainingLoader:
    """Return the loader of one process that mixes, one epoch in batches of 8 unless `options` say otherwise."""
    mixes = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
    mixes |= {name: options.pop(name) for name in mixes if name in options}
    mixing = Mixing(len(photos.classes), seed, **mixes)
    order = {"repeats": 1, "batch_size": 8, "accumulation_steps": 1, "epochs": 1, "rank": 0, "processes": 1, **options}
    sampler = TrainingBatchSampler(photos=len(photos), seed=seed, pairs=mixing.is_on, **order)
    return PillowLoader(Views(photos, transform, seed, skip), sampler, mixing, workers, False)


def tiny_student(**options: Any) -> TimmStudent:
    """Return a small distilled student of 3 classes at 16 px."""
    base: dict[str, Any] = {
        "name": STUDENT,
        "pretrained": False,
        "checkpoint": None,
        "args": STUDENT_ARGS,
        "drop_path": 0.0,
        "classes": CLASSES,
        "image_size": 16,
        "distilled": True,
        "seed": 0,
    }
    return build_student(**{**base, **options})


def array_photos(count: int, size: int = 12, classes: int = 3) -> Photos:
    """Return `count` images in memory, photo i with label i mod `classes`."""
    arrays = np.random.default_rng(0).integers(0, 255, (count, size, size, 3)).astype(np.uint8)
    return Photos.of_arrays(
        names=[f"{i:04d}" for i in range(count)],
        labels=[i % classes for i in range(count)],
        classes=tuple(f"class{c}" for c in range(classes)),
        arrays=arrays,
    )


def make_batch(count: int = 8, seed: int = 0, side: int = 16) -> Batch:
    """Return `count` random images of 3 classes, labelled at random."""
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=chance)
    images = torch.randn(count, 3, side, side, generator=chance)
    return Batch(images, nn.functional.one_hot(labels, 3).float(), labels)


def pixel_teacher(batch: Batch) -> TeacherOutput:
    """Answer with a few pixels, so that a teacher is a plain function of its batch."""
    return TeacherOutput(3 * batch.images[:, :, 0, 0])


def tiny_learner(
    model: TimmStudent,
    ema: float = 0.0,
    *,
    optimizer: str = "sgd",
    lr: float = 0.1,
    weight_decay: float = 0.0,
    clip_grad_norm: float | None = None,
    **options: Any,
) -> Learner:
    """Return what learns with the weights of `model`, in ten steps."""
    built = build_optimizer(
        model.backbone, name=optimizer, lr=lr, lr_reference_batch=0, weight_decay=weight_decay, args={}, batch_size=8
    )
    schedule = build_schedule(built, warmup_epochs=0, warmup_lr=0.0, min_lr=0.0, epochs=2, steps_per_epoch=5)
    average = WeightAverage(model, decay=ema) if ema else None
    return Learner(model, built, schedule, average, clip_grad_norm, **options)


def tiny_trainer(
    drop_path: float = 0.0,
    kind: str = "soft",
    *,
    peers: Sequence[Learner] = (),
    processes: Processes = ONE_PROCESS,
    accumulation_steps: int = 1,
    skip: bool = False,
    **of_student: Any,
) -> Trainer:
    """Return the trainer of a tiny student, which `pixel_teacher` teaches; `of_student` goes to `tiny_learner`."""
    model = tiny_student(drop_path=drop_path)
    return Trainer(
        Distiller(model, pixel_teacher, Objective(kind)),
        (tiny_learner(model, **of_student), *peers),
        torch.amp.GradScaler("cpu", enabled=False),
        processes,
        accumulation_steps,
        seed=0,
        skip=skip,
    )


def transform(**options: Any) -> Transform:
    """Return a strong training transform at 16 px."""
    base: dict[str, Any] = {
        "image_size": 16,
        "mean": MEAN,
        "std": STD,
        "interpolation": "random",
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.3,
        "horizontal_flip": 0.5,
        "scale": (0.3, 1.0),
        "ratio": (0.75, 4 / 3),
        "erasing": 0.5,
    }
    return training_transform(**{**base, **options})


def begin_store(folder: Path, top: int = 3, **identity: Any) -> LabelStore:
    """Begin a store of STORED_VIEWS views an epoch and STORED_CLASSES classes."""
    manifest = {
        "identity": {"seed": 0, **identity},
        "classes": [f"class {i}" for i in range(STORED_CLASSES)],
        "top": top,
        "views": STORED_VIEWS,
        "validation": 4,
        "libraries": [{"torch": "2"}],
        "teacher": {"name": "t", "weights": "w", "random_weights": False},
    }
    folder.mkdir(parents=True, exist_ok=True)
    return LabelStore.begin(folder, manifest)


def store_answers(epoch: int) -> Tensor:
    """Return the logits that `fill_store` writes."""
    return torch.randn(STORED_VIEWS, STORED_CLASSES, generator=torch.Generator().manual_seed(epoch))


def fill_store(store: LabelStore, epoch: int) -> None:
    """Write an epoch of random answers and finish it."""
    store.write_piece(epoch_part(epoch), torch.arange(STORED_VIEWS), store.record.encode(store_answers(epoch)))
    store.finish(epoch_part(epoch))


def seen_at(image_size: int, mean: Statistics = MEAN) -> Preprocessing:
    """Return the preprocessing of whole images at `image_size`."""
    return Preprocessing(image_size, mean, STD, "bicubic", 1.0)


def save_student(student: TimmStudent, folder: Path, classes: Sequence[str], seen: Preprocessing) -> None:
    """Write a student as a timm local-dir."""
    save_local_dir(student.backbone, folder, model_args=student.model_args, classes=tuple(classes), preprocessing=seen)


def tiny_teacher(**options: Any) -> FrozenTeacher:
    """Return a teacher beside a student at 16 px, with random weights unless `options` name others."""
    base: dict[str, Any] = {
        "name": "test_resnet",
        "pretrained": False,
        "checkpoint": None,
        "random_weights": not (options.get("checkpoint") or options.get("pretrained")),
        "args": {},
        "image_size": None,
        "mean": None,
        "std": None,
        "channels_last": True,
        "compiled": False,
        "classes": CLASSES,
        "student": seen_at(16),
        "seed": 0,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    return build_teacher(**{**base, **options})


def save_teacher(folder: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """Save a local-dir with the weights of ``tiny_teacher(seed=7)``, for as many classes."""
    folder.mkdir()
    state = tiny_teacher(seed=7, classes=classes, channels_last=False).network.state_dict()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"label_names": list(classes)}))
    return folder


def student_of_five(name: str = STUDENT, **options: Any) -> TimmStudent:
    """Return a small student of FIVE_CLASSES at 32 px."""
    return tiny_student(**{"name": name, "args": TINY, "classes": FIVE_CLASSES, "image_size": 32, **options})


def write_transformers_folder(
    folder: Path,
    state: dict[str, Tensor],
    classes: Sequence[str] = CLASSES,
    processor: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write a student of STUDENT_ARGS as transformers does, from its `state` under transformers' names."""
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    said = {
        "model_type": "deit",
        "patch_size": 8,
        "image_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "id2label": dict(enumerate(classes)),
    }
    (folder / "config.json").write_text(json.dumps({**said, **config}))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


class Operations(TorchDispatchMode):
    """Counts operations by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, act: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self.counts[act.overloadpacket.__name__] += 1
        return act(*args, **(kwargs or {}))
