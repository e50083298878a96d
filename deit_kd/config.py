"""The schema of a recipe, and the one way from YAML and dotted overrides to a checked value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from deit_kd.interfaces import InputError, nearest

Statistics = tuple[float, float, float]


class Section(BaseModel):
    """A part of a recipe: unknown keys and infinite numbers are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, frozen=True)


class Data(Section):
    """Where the photos are and how large the student sees them."""

    name: str = "folder"
    """dataset: folder, digits, imagenette, cifar10 or cifar100"""
    root: str | None = None
    """folder of the data"""
    train_split: str = "train"
    """folder of the training split under root"""
    validation_split: str = "validation"
    """folder of the validation split under root; where it is missing, the tree is split"""
    validation_fraction: float = Field(0.2, gt=0, lt=1)
    """share of each class to hold out where there is no validation split"""
    download: bool = False
    """let torchvision download the data to root"""
    image_size: int = Field(224, gt=0)
    """pixels of a side, as the student sees it"""
    crop_fraction: float = Field(0.9, gt=0, le=1)
    """evaluation resizes the shorter side to image_size / crop_fraction, then crops the centre"""
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """of resizing"""
    mean: Statistics = IMAGENET_DEFAULT_MEAN
    """normalisation of the student's images, by channel"""
    std: Statistics = IMAGENET_DEFAULT_STD
    """normalisation of the student's images, by channel"""
    workers: int = Field(2, ge=0)
    """processes that make views, for each training process"""


class Augment(Section):
    """How views are made; the defaults are DeiT's."""

    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's policy: rand-m9-mstd0.5-inc1, 3a (three-augment), … or null"""
    color_jitter: float = Field(0.3, ge=0)
    """strength; timm leaves it out where auto_augment is a RandAugment policy"""
    horizontal_flip: float = Field(0.5, ge=0, le=1)
    """probability"""
    scale: tuple[float, float] = (0.08, 1.0)
    """area of the random crop, as a share of the photo"""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """aspect ratio of the random crop"""
    erasing: float = Field(0.25, ge=0, le=1)
    """probability of random erasing"""
    repeats: int = Field(3, gt=0)
    """repeated augmentation: views of a photo in one epoch"""
    mixup: float = Field(0.8, ge=0)
    """alpha of mixup; 0 is off"""
    cutmix: float = Field(1.0, ge=0)
    """alpha of CutMix; 0 is off"""
    mix_probability: float = Field(1.0, ge=0, le=1)
    """that a pair is mixed"""
    mix_switch_probability: float = Field(0.5, ge=0, le=1)
    """of CutMix where mixup is on too"""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """mass spread over all classes"""


class Optim(Section):
    """timm's optimiser and cosine schedule; the defaults are DeiT's."""

    name: str = "adamw"
    """timm's name of the optimiser"""
    lr: float = Field(5e-4, gt=0)
    """for a batch of lr_reference_batch; scaled linearly with the batch"""
    lr_reference_batch: int = Field(512, ge=0)
    """images; 0 takes lr as it is"""
    weight_decay: float = Field(0.05, ge=0)
    """of matrices; tokens, position embeddings, biases and norms have none"""
    warmup_epochs: int = Field(5, ge=0)
    """epochs of linear warm-up"""
    warmup_lr: float = Field(1e-6, ge=0)
    """where the warm-up starts"""
    min_lr: float = Field(1e-5, ge=0)
    """where the cosine ends"""
    clip_grad_norm: float | None = Field(None, gt=0)
    """largest gradient norm; null does not clip"""
    args: dict[str, Any] = {}
    """handed to the optimiser: betas, eps, …"""


class StudentSection(Section):
    """The network that learns."""

    name: str | None = None
    """timm name; a *_distilled_* one unless distill.kind is none"""
    pretrained: bool = False
    """start from timm's weights"""
    checkpoint: str | None = None
    """start from these weights: a run, a timm local-dir, .safetensors or .pth"""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """rate of stochastic depth"""
    args: dict[str, Any] = {}
    """handed to timm.create_model: patch_size, embed_dim, depth, …"""


class Fit(Section):
    """Train the teacher first, on the same data, when no weights for these classes exist yet."""

    epochs: int = Field(0, ge=0)
    """0 does not fit"""
    folder: str = "runs/teachers"
    """where fitted teachers are kept and found again"""
    batch_size: int = Field(64, gt=0)
    """images per optimiser step"""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """of the average of the weights; 0 keeps none"""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """rate of stochastic depth"""
    augment: Augment = Augment(auto_augment=None, erasing=0.0, repeats=1, mixup=0.0, cutmix=0.0, scale=(0.35, 1.0))
    """how the teacher's views are made"""
    optim: Optim = Optim(lr=1e-3, lr_reference_batch=0, warmup_epochs=1)
    """the teacher's optimiser"""


class TeacherSection(Section):
    """The frozen network that is learned from; its weights come from exactly one place."""

    name: str | None = None
    """timm name; pin the tag of pretrained weights (regnety_160.deit_in1k)"""
    pretrained: bool = False
    """timm's weights, head included"""
    checkpoint: str | None = None
    """weights from a run, a timm local-dir, .safetensors or .pth"""
    random_weights: bool = False
    """no weights at all: for benchmarks and tests"""
    fit: Fit = Fit()
    """train it first"""
    image_size: int | None = Field(None, gt=0)
    """pixels that it sees; null sees the student's"""
    mean: Statistics | None = None
    """its normalisation; null takes its pretrained config's, or the student's"""
    std: Statistics | None = None
    """its normalisation; null takes its pretrained config's, or the student's"""
    precision: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """of its weights; auto is train.precision"""
    channels_last: bool = True
    """memory format"""
    compile: bool = False
    """run it through torch.compile"""
    args: dict[str, Any] = {}
    """handed to timm.create_model"""


class Distill(Section):
    """(1 - alpha) * classification(cls) + alpha * distillation(dist)."""

    kind: Literal["none", "soft", "hard"] = "hard"
    """none is plain supervised training"""
    alpha: float = Field(0.5, ge=0, le=1)
    """weight of the distillation term"""
    temperature: float = Field(3.0, gt=0)
    """of soft distillation"""
    scale: Literal["batchmean", "numel"] = "batchmean"
    """numel divides by the classes too, as the published deit code does"""


class Train(Section):
    """The loop."""

    epochs: int = Field(300, gt=0)
    """passes over the set"""
    batch_size: int = Field(1024, gt=0)
    """images per optimiser step, over all processes and accumulation steps"""
    accumulation_steps: int = Field(1, gt=0)
    """micro-batches an optimiser step"""
    precision: Literal["bf16", "fp16", "off"] = "bf16"
    """autocast"""
    ema_decay: float = Field(0.99996, ge=0, lt=1)
    """of the average of the weights, warmed up; 0 keeps none"""
    compile: bool = False
    """run the student through torch.compile"""
    attention: Literal["auto", "fused", "plain"] = "auto"
    """auto is PyTorch's fused attention on CUDA and timm's plain one on the CPU"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1"""
    log_every_steps: int = Field(20, gt=0)
    """steps between records"""
    checkpoint_every_steps: int = Field(500, gt=0)
    """steps between checkpoints; one more is written after every epoch"""
    keep_checkpoints: int = Field(2, gt=0)
    """how many stay"""


class Evaluate(Section):
    """How heads are scored."""

    fusion: Literal["softmax", "logits"] = "softmax"
    """softmax is the paper's mean of the two softmaxes; logits is timm's and deit's mean of the logits"""
    batch_size: int = Field(128, gt=0)
    """images, for each process"""
    report: bool = True
    """write report/report.html at the end of the run"""


class Tracking(Section):
    """Where records go beside metrics.jsonl and TensorBoard."""

    wandb: bool = False
    """log to Weights & Biases, too; needs the package wandb"""
    project: str = "deit_kd"
    """name of the project there"""


class Config(Section):
    """A whole recipe."""

    data: Data = Data()
    augment: Augment = Augment()
    student: StudentSection = StudentSection()
    teacher: TeacherSection = TeacherSection()
    distill: Distill = Distill()
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()
    recipe: str = "run"
    """name of the run's folder; the recipe file's name unless set"""
    seed: int = Field(0, ge=0)
    """everything random follows from it"""
    output: str | None = None
    """folder of the run; null takes the next free runs/<recipe>-<n>"""
    resume: Literal["auto"] | None = None
    """auto continues the run in output from its newest checkpoint"""

    @model_validator(mode="after")
    def _check_across(self) -> Config:
        teacher = self.teacher
        if self.distill.kind != "none" and teacher.random_weights and teacher.fit.epochs:
            raise ValueError("teacher.random_weights and teacher.fit.epochs exclude each other")
        if teacher.checkpoint is not None and teacher.fit.epochs:
            raise ValueError("teacher.checkpoint and teacher.fit.epochs exclude each other; unset one")
        if self.train.precision == "fp16" and self.train.device == "cpu":
            raise ValueError("train.precision: fp16 needs CUDA; use bf16 or off on the CPU")
        return self

    def to_yaml(self) -> str:
        """Return the recipe as YAML, every key with its value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def build_parser(program: str) -> ArgumentParser:
    """Return a parser of ``--config FILE`` and every key of `Config` as a dotted option."""
    parser = ArgumentParser(prog=program, exit_on_error=False, description=Config.__doc__)
    parser.add_argument("--config", action="config", help="recipe file; later options override it")
    for name, field in Config.model_fields.items():
        parser.add_argument(f"--{name}", type=field.annotation, default=field.default, help=field.description)
    return parser


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return every key of the schema with its path, e.g. ``distill.temperature``."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def parse_config(arguments: list[str], parser: ArgumentParser | None = None) -> tuple[Config, dict[str, Any]]:
    """Return the checked config of a command line, and whatever else the parser was told to read.

    Raises:
        InputError: an unknown key, a wrong type or range, a file that is not there.
    """
    parser = parser or build_parser("deit-kd train")
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise InputError(_one_line(str(error))) from error
    values = parsed.as_dict()
    files = values.pop("config") or []
    others = {key: values.pop(key) for key in list(values) if key not in Config.model_fields}
    if files and values["recipe"] == Config.model_fields["recipe"].default:
        values["recipe"] = Path(str(files[-1])).stem
    try:
        return Config.model_validate(values), others
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{key}: {first['input']!r}: {reason}" if key else reason) from error


def _one_line(message: str) -> str:
    """Turn an error of jsonargparse or pydantic into ``key: value, reason, cure``."""
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if unknown or in_group:
        key = unknown[1].lstrip("-").split("=")[0] if unknown else f"{in_group[1]}.{in_group[2]}" if in_group else ""
        return f"{key}: unknown key{_nearest_key(key)}"
    key_match = re.search(r'Parser key "([\w.]+)"', message)
    value_match = re.search(r"Got value: (.*)", message, re.DOTALL)
    lines = [line.strip() for line in message.splitlines() if "For further information" not in line]
    reasons = [re.sub(r"\s*\[type=.*", "", line) for line in lines[1:]] or lines
    reason = next(
        (line for line in reasons if line.startswith(("Input should", "Expected", "Value error"))), reasons[0]
    )
    reason = re.sub(r"\.? ?Got value: .*", "", reason).replace("typing.", "")
    key = key_match[1] if key_match else ""
    value = f" {value_match[1].splitlines()[0]!r}" if value_match else ""
    return f"{key}:{value} {reason}" if key else reason


def _nearest_key(key: str) -> str:
    keys = known_keys()
    by_path = nearest(key, keys)
    return by_path or nearest(key.rsplit(".", 1)[-1], [known.rsplit(".", 1)[-1] for known in keys])
