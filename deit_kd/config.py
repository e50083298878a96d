"""The schema of a recipe, and the one way from YAML and dotted overrides to a checked value."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_loader
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from deit_kd.interfaces import InputError, nearest
from deit_kd.schedules import Schedule, always

Statistics = tuple[float, float, float]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # timm's, which takes seconds to import
LARGEST_INTEGER = 2**63 - 1
DEEPEST = 64  # sections and lists of a recipe within each other
MOST_VALUES = 100_000  # of a recipe, each as often as aliases repeat it


class Section(BaseModel):
    """A part of a recipe: unknown keys and infinite numbers are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, frozen=True)

    @field_validator("*", mode="after")
    @classmethod
    def _check_integer(cls, value: Any) -> Any:
        if isinstance(value, int) and value > LARGEST_INTEGER:
            raise ValueError("must be below 2**63")
        return value


def _check_positive(value: Statistics | None) -> Statistics | None:
    if value is not None and min(value) <= 0:
        raise ValueError("must be above 0 in every channel")
    return value


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
    folds: int | None = Field(None, ge=2)
    """cross-validation: joins all photos and parts each class into so many folds, by the hash of the photos' names"""
    fold: int | None = Field(None, ge=0)
    """the fold to hold out, from 0; the others are trained on"""
    unlabelled: str | None = None
    """folder of photos without labels, however nested, to train on; root then gives classes and validation alone"""
    download: bool = False
    """let torchvision download the data to root"""
    image_size: int = Field(224, gt=0)
    """pixels of a side, as the student sees it"""
    crop_fraction: float = Field(0.9, gt=0, le=1)
    """evaluation resizes to image_size / crop_fraction, as crop_mode says, then crops the centre"""
    crop_mode: Literal["center", "border", "squash"] = "center"
    """evaluation resizes the shorter side, the longer one (the mean fills the rest), or both (timm's crop_mode)"""
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """of resizing"""
    mean: Statistics = IMAGENET_MEAN
    """normalisation of the student's images, by channel"""
    std: Statistics = IMAGENET_STD
    """normalisation of the student's images, by channel"""
    in_memory: bool = False
    """decode every training photo once, at the start, and keep it in memory; the views are the same"""
    workers: int = Field(2, ge=0)
    """processes that make views, for each training process"""
    on_error: Literal["raise", "skip"] = "raise"
    """a photo that cannot be read ends the run, or is left out and listed in data_errors.jsonl"""
    max_errors: int = Field(100, ge=0)
    """photos that may be left out; one more ends the run"""

    _check_std = field_validator("std")(_check_positive)


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

    @field_validator("scale", "ratio")
    @classmethod
    def _check_order(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] or (info.field_name == "scale" and value[1] > 1):
            raise ValueError("must be [low, high] with 0 < low <= high" + (" <= 1" * (info.field_name == "scale")))
        return value


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
    layer_decay: float | None = Field(None, gt=0, le=1)
    """the learning rate of each layer below the heads is this times that of the one above; null is the same for all"""
    args: dict[str, JsonValue] = {}
    """handed to the optimiser: betas, eps, …"""


class StudentSection(Section):
    """The network that learns."""

    name: str | None = None
    """timm name; a plain ViT gets a distillation token unless distill.kind is none"""
    pretrained: bool = False
    """start from timm's weights"""
    checkpoint: str | None = None
    """start from these weights: a run or a file in it, a timm local-dir, transformers', .safetensors or .pth"""
    token: Literal["cls", "scratch"] = "cls"
    """what a token that the weights lack starts from: their class token with small noise, or nothing"""
    new_heads: bool = False
    """draw new heads even where the weights' own have as many classes"""
    freeze: Literal["none", "patch_embed", "backbone", "all_but_heads"] = "none"
    """what does not learn; backbone leaves tokens and heads"""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """rate of stochastic depth"""
    channels_last: bool | None = None
    """memory format; null is channels-last for networks with BatchNorm"""
    args: dict[str, JsonValue] = {}
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


class TeacherNetwork(Section):
    """A frozen network; its weights come from exactly one place."""

    name: str | None = None
    """timm name; pin the tag of pretrained weights (regnety_160.deit_in1k); null is what the checkpoint says"""
    pretrained: bool = False
    """timm's weights, head included"""
    checkpoint: str | None = None
    """weights of a run or a file in it (RUN:teacher is its teacher), a local-dir, transformers', .safetensors, .pth"""
    random_weights: bool = False
    """no weights at all: for benchmarks and tests"""
    class_map: str | None = None
    """CSV or JSON file: dataset class, and the teacher's column, WordNet id or label"""
    label_set: str | None = None
    """what the columns of weights without class names are: imagenet-1k, imagenet-12k, imagenet-22k, …"""
    image_size: int | None = Field(None, gt=0)
    """pixels that it sees; null takes its pretrained config's, or the student's"""
    mean: Statistics | None = None
    """its normalisation; null takes its pretrained config's, or the student's"""
    std: Statistics | None = None
    """its normalisation; null takes its pretrained config's, or the student's"""
    args: dict[str, JsonValue] = {}
    """handed to timm.create_model"""

    _check_std = field_validator("std")(_check_positive)


class SoleTeacher(TeacherNetwork):
    """A network that may be fitted first, and whose score is checked before it teaches."""

    fit: Fit = Fit()
    """train it first"""
    head: bool = True
    """false takes its features alone: any network, with a head (which is left out) or without, and no class map"""
    min_top1: float | None = Field(None, ge=0, le=100)
    """least top-1 on validation in percent (without a head, of its k-NN); null is the largest class's share and three
    standard errors"""

    @property
    def is_named(self) -> bool:
        """Whether the section says which network it is."""
        return bool(self.name or self.pretrained or self.checkpoint or self.random_weights or self.fit.epochs)


class Guide(SoleTeacher):
    """A network that gives the features; unset, the teacher gives them with its answers."""


class TeacherMember(TeacherNetwork):
    """One of several teachers."""

    weight: float = Field(1.0, gt=0)
    """its share; shares are scaled to sum to 1"""


class TeacherSection(SoleTeacher):
    """What is learned from: one network, or several."""

    members: list[TeacherMember] = []
    """several teachers, each with its own eyes and class map, instead of one"""
    combine: Literal["mean", "draw"] = "mean"
    """of several teachers: the mean of their probabilities, or one drawn for each view"""
    store: str | None = None
    """folder of a label store: the teacher's answers to every view"""
    store_mode: Literal["read", "record"] = "read"
    """read trains with no teacher in memory; record fills the store while the teacher is asked"""
    store_top: int | None = Field(None, ge=0)
    """logits that a new store keeps of an answer; null is 10 for soft labels, and 0, the label alone, for hard ones"""
    precision: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """of its weights; auto is train.precision"""
    channels_last: bool = True
    """memory format"""
    compile: bool = False
    """run it through torch.compile"""

    @property
    def reads_store(self) -> bool:
        """Whether a label store answers in the network's place."""
        return self.store is not None and self.store_mode == "read"


class ScheduleSection(Section):
    """A number that changes over the run; places are shares of it."""

    start: float = Field(ge=0)
    """value before the change"""
    end: float = Field(0.0, ge=0)
    """value after the change"""
    begin: float = Field(0.0, ge=0, lt=1, alias="from")
    """place at which the change begins"""
    until: float = Field(1.0, gt=0, le=1)
    """place at which it has ended"""
    shape: Literal["constant", "linear", "cosine"] = "constant"
    """constant keeps start until the change has ended; linear and cosine go from one to the other"""

    @model_validator(mode="after")
    def _check_places(self) -> ScheduleSection:
        if self.begin >= self.until:
            raise ValueError(f"from {self.begin:g} is not below until {self.until:g}")
        return self

    @model_serializer
    def _by_key(self) -> dict[str, Any]:
        places = {"from": self.begin, "until": self.until}
        return {"start": self.start, "end": self.end, **places, "shape": self.shape}

    def __str__(self) -> str:
        until = f" until {self.until:g} of the run" if self.shape == "constant" else ""
        since = "" if self.shape == "constant" else f" from {self.begin:g} to {self.until:g} of the run, {self.shape}"
        return f"{self.start:g}{until}, then {self.end:g}{since}"

    def schedule(self) -> Schedule:
        """Return the schedule that these keys describe."""
        return Schedule(self.start, self.end, self.begin, self.until, self.shape)


def _is_schedule(value: Any) -> str:
    return "schedule" if isinstance(value, dict | ScheduleSection) else "number"


Scheduled = Annotated[
    Annotated[float, Tag("number")] | Annotated[ScheduleSection, Tag("schedule")], Discriminator(_is_schedule)
]


def in_words(value: float | ScheduleSection | None) -> str:
    """Return a key that is a number or describes a schedule as a person reads it."""
    return "by the classes" if value is None else str(value) if isinstance(value, ScheduleSection) else f"{value:g}"


def as_schedule(value: float | ScheduleSection) -> Schedule:
    """Return the schedule of a key that is a number or describes one."""
    return value.schedule() if isinstance(value, ScheduleSection) else always(value)


class TermSection(Section):
    """One more term of the objective."""

    kind: Literal["guide", "pooled", "soft", "hard", "standardised"]
    """guide: maps; pooled: one vector an image; soft, hard, standardised: the distillation head against the logits"""
    weight: Scheduled = 1.0
    """a number, or its schedule {start, end, from, until, shape}"""
    temperature: Scheduled | None = None
    """of soft and standardised; null is 3, and of standardised what follows from the number of classes"""
    blocks: list[int] | None = None
    """of guide: the student's blocks, from 0; null spreads them evenly, one for each stage"""
    stages: list[str] | None = None
    """of guide: the teacher's layers by timm's names; null takes the last three not coarser than the student's grid"""
    grid: int | None = Field(None, gt=0)
    """of guide: side of a coarser grid to compare maps on; null is the coarser of the two"""
    normalise: bool = True
    """of guide: layer-normalise the teacher's maps over channels"""
    loss: Literal["cosine", "huber"] = "cosine"
    """of pooled"""

    @field_validator("weight", "temperature")
    @classmethod
    def _check_range(cls, value: Scheduled | None, info: ValidationInfo) -> Scheduled | None:
        least = 0 if value is None else min(as_schedule(value).values)
        if least < 0:
            raise ValueError("must not be below 0")
        if info.field_name == "temperature" and value is not None and least == 0:
            raise ValueError("must be above 0, start and end alike")
        return value

    @model_validator(mode="after")
    def _check_kind(self) -> TermSection:
        own = {"kind", "weight", *_KEYS_OF_TERM[self.kind]}
        foreign = sorted(self.model_fields_set - own)
        if foreign:
            raise ValueError(f"{foreign[0]} does not act on a term of kind {self.kind}; leave it out")
        return self

    @model_serializer(mode="wrap")
    def _own_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        own = {"kind", "weight", *_KEYS_OF_TERM[self.kind]}
        return {key: value for key, value in dump(self).items() if key in own}


_KEYS_OF_TERM: dict[str, set[str]] = {
    "guide": {"blocks", "stages", "grid", "normalise"},
    "pooled": {"loss"},
    "soft": {"temperature"},
    "hard": set(),
    "standardised": {"temperature"},
}
FEATURE_KINDS = ("guide", "pooled")


class Distill(Section):
    """(1 - alpha) * classification(cls) + alpha * distillation(dist) + the sum of weight * term."""

    kind: Literal["none", "soft", "hard", "standardised"] = "hard"
    """none is plain supervised training, unless there are terms"""
    alpha: Scheduled = 0.5
    """weight of the distillation term, a number from 0 to 1 or its schedule; 1 with kind none leaves the labels out"""
    temperature: Scheduled | None = 3.0
    """of soft and standardised, a number or its schedule; null is 3, and of standardised follows from the classes"""
    scale: Literal["batchmean", "numel"] = "batchmean"
    """numel divides by the classes too, as the published deit code does"""
    terms: list[TermSection] = []
    """further terms: [{kind: guide, weight: {start: 2.5, until: 0.5}}]"""

    @field_validator("terms")
    @classmethod
    def _check_terms(cls, value: list[TermSection], info: ValidationInfo) -> list[TermSection]:
        kinds = [info.data.get("kind"), *(term.kind for term in value)]
        twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is there twice; keep one")
        return value

    @field_validator("alpha", "temperature")
    @classmethod
    def _check_range(cls, value: Scheduled | None, info: ValidationInfo) -> Scheduled | None:
        for number in () if value is None else as_schedule(value).values:
            if info.field_name == "alpha" and not 0 <= number <= 1:
                raise ValueError("must be between 0 and 1")
            if info.field_name == "temperature" and number <= 0:
                raise ValueError("must be above 0, start and end alike")
        return value

    @property
    def has_token(self) -> bool:
        """Whether the student needs a distillation token."""
        return self.kind != "none" or self.logit_kinds != set()

    @property
    def logit_kinds(self) -> set[str]:
        """How the teacher's logits are learned from."""
        kinds: set[str] = {self.kind, *(term.kind for term in self.terms)}
        return kinds - {"none", *FEATURE_KINDS}

    @property
    def needs_features(self) -> bool:
        """Whether any term compares features."""
        return any(term.kind in FEATURE_KINDS for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether anybody has to teach."""
        return self.has_token or self.needs_features

    @property
    def takes_hard_labels(self) -> bool:
        """Whether the teacher's decisions are enough."""
        return self.logit_kinds <= {"hard"}


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
    ema_decay: float | None = Field(None, ge=0, lt=1)
    """of the average of the weights, over 1 / (1 - decay) steps; null takes a twentieth of the run, 0 keeps none"""
    compile: bool = False
    """run the student through torch.compile"""
    attention: Literal["auto", "fused", "plain"] = "auto"
    """auto is PyTorch's fused attention on CUDA and timm's plain one on the CPU"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1"""
    log_every_steps: int = Field(20, gt=0)
    """steps between records"""
    checkpoint_every_minutes: float = Field(10.0, gt=0)
    """between checkpoints, at the next record; one more is written after every epoch"""
    checkpoint_every_steps: int | None = Field(None, gt=0)
    """steps between further checkpoints"""
    keep_checkpoints: int = Field(2, gt=0)
    """how many stay, beside the one with the best top-1"""
    max_bad_steps: int = Field(10, gt=0)
    """steps in a row without a finite gradient, or with answers of the teacher that are not finite, that end the run"""
    timeout_seconds: float = Field(600.0, ge=0)
    """without progress of any process after which all of them stop; 0 waits for ever"""


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
    guide: Guide = Guide()
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

    @field_validator("recipe")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if value != Path(value).name:
            raise ValueError("must be the name of one folder")
        return value

    @model_validator(mode="after")
    def _check_across(self) -> Config:
        teacher, folds, fold = self.teacher, self.data.folds, self.data.fold
        if folds is None and fold is not None:
            raise ValueError(f"data.fold: {fold} is set, but data.folds is not; set both")
        if folds is not None and (fold is None or fold >= folds):
            raise ValueError(f"data.fold: {fold} is none of {folds} folds; set 0 to {folds - 1}")
        if self.distill.kind != "none" and teacher.random_weights and teacher.fit.epochs:
            raise ValueError("teacher.random_weights and teacher.fit.epochs exclude each other")
        for name, section in (("teacher", teacher), ("guide", self.guide)):
            if section.checkpoint is not None and section.fit.epochs:
                raise ValueError(f"{name}.checkpoint and {name}.fit.epochs exclude each other; unset one")
        for name, section in (("teacher", teacher), ("guide", self.guide)):
            for key in ("class_map", "label_set"):
                if not section.head and getattr(section, key) is not None:
                    raise ValueError(f"{name}.{key}: names columns, and {name}.head is false; leave one out")
        if not teacher.head and self.distill.logit_kinds:
            raise ValueError(
                f"teacher.head: false gives no logits for {', '.join(sorted(self.distill.logit_kinds))} labels; set "
                "distill.kind none and compare features, or name it as the guide"
            )
        if not teacher.head and teacher.store is not None:
            raise ValueError("teacher.store: keeps logits, and teacher.head false gives none; unset one")
        if self.data.unlabelled is not None and (self.distill.kind, self.distill.alpha) != ("none", 1):
            raise ValueError(
                f"data.unlabelled: {self.data.unlabelled} has no labels to learn from; set distill.kind none and "
                "distill.alpha 1, and name in distill.terms what teaches"
            )
        if teacher.members and teacher.is_named:
            raise ValueError("teacher.members and a teacher of the section's own exclude each other; unset one")
        if self.guide.is_named and not self.distill.needs_features:
            raise ValueError("guide: is set, but no term of distill.terms compares features; add one, or unset it")
        if self.distill.needs_features and not self.guide.is_named:
            answers_alone = "several teachers give" if teacher.members else "a label store gives"
            if teacher.members or (teacher.reads_store and not teacher.is_named):
                raise ValueError(
                    f"distill.terms: features are compared, but {answers_alone} answers alone; add an online guide "
                    "(guide.name, and guide.checkpoint or guide.fit.epochs)"
                )
        if teacher.store_mode == "record" and teacher.store is None:
            raise ValueError("teacher.store_mode: record needs a folder to fill; set teacher.store")
        if self.train.precision == "fp16" and self.train.device == "cpu":
            raise ValueError("train.precision: fp16 needs CUDA; use bf16 or off on the CPU")
        return self

    def to_yaml(self) -> str:
        """Return the recipe as YAML, every key with its value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by the path of their keys, e.g. ``distill.temperature``."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and not key.endswith("args"):
            values.update(flat(value, f"{prefix}{key}."))
        else:
            values[prefix + key] = value
    return values


def build_parser(program: str) -> ArgumentParser:
    """Return a parser of ``--config FILE`` and every key of `Config` as a dotted option.

    The parser knows single values, lists and dicts, and never a class: where it does, it imports the module of
    any ``class_path`` that a recipe names.
    """
    parser = ArgumentParser(
        prog=program, exit_on_error=False, allow_abbrev=False, description=Config.__doc__, parser_mode="recipe"
    )
    parser.add_argument("--config", action="config", help="recipe file; later options override it")
    for path, field, default in _keys_of(Config()):
        plain = _plain(field.annotation)
        kind = Annotated[(plain, *field.metadata)] if field.metadata and plain == field.annotation else plain
        parser.add_argument(f"--{path}", type=kind, default=default, help=field.description)
    return parser


def _plain(annotation: Any) -> Any:
    """Return the type of a key as the parser knows it; what is inside a dict or a list, the schema checks."""
    if get_origin(annotation) in (dict, list):
        return get_origin(annotation)
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return dict
    if get_origin(annotation) in (Union, UnionType):
        return Union[tuple(_plain(part) for part in get_args(annotation))]  # noqa: UP007 - of parts that are computed
    return annotation


def _keys_of(section: Section, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """Yield the path, the field and the default of every key that is no section itself."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _keys_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name, field, value


def as_options(section: Section, prefix: str) -> list[str]:
    """Return every key of a section with its value, as they are typed on a command line."""
    options = []
    for path, _, value in _keys_of(section, prefix):
        options += [f"--{path}", value if isinstance(value, str) else json.dumps(value)]
    return options


def load_recipe(text: str) -> Any:
    """Return the YAML of `text`, once it is known to be plain, shallow and no larger than it looks.

    Raises:
        InputError: it is nested too deeply, its aliases stand for too much, or an integer has too many digits.
        YAMLError: it is no YAML, or names an object.
    """
    _check_size(text)
    try:
        return _load_yaml(text)
    except ValueError as error:
        raise InputError(
            f"config: holds a value that cannot be read ({str(error).splitlines()[0]}); correct it"
        ) from error


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the keys of a recipe file as they stand there, unchecked.

    Raises:
        InputError: it is missing, or is no recipe.
    """
    try:
        tree = load_recipe(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); name a run of deit_kd") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: is no recipe, which is YAML of keys and values; name a run of deit_kd")
    return tree


def _check_size(text: str) -> None:
    """Refuse a text that would fill the stack or the memory; the parser's events show it before anything is built."""
    sizes: dict[str, int] = {}
    within: list[tuple[str | None, int]] = [(None, 0)]  # anchor and values so far, of each collection that is open
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        anchor, size = getattr(event, "anchor", None), 0
        if isinstance(event, yaml.CollectionStartEvent):
            within.append((anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = within.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        elif isinstance(event, yaml.AliasEvent):
            if anchor in [opened for opened, _ in within]:
                raise InputError(f"config: the alias *{anchor} stands within itself; write the value out")
            size = sizes.get(str(anchor), 0)
        if anchor is not None and size:
            sizes[anchor] = size
        within[-1] = (within[-1][0], within[-1][1] + size)
        if len(within) > DEEPEST or within[-1][1] > MOST_VALUES:
            raise InputError(
                f"config: is nested more than {DEEPEST} deep or holds more than {MOST_VALUES} values, aliases "
                "included; write a plain recipe"
            )


_load_yaml = get_loader("yaml")
set_loader("recipe", load_recipe, (yaml.YAMLError,))


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return every key of the schema with its path, e.g. ``distill.temperature``."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def read_options(arguments: list[str], parser: ArgumentParser) -> dict[str, Any]:
    """Return the options of a command line, each checked by itself.

    Raises:
        InputError: an unknown key, a wrong type or range, a recipe that is not there.
    """
    try:
        options: dict[str, Any] = parser.parse_args(arguments).as_dict()
    except (ArgumentError, ValueError) as error:
        raise InputError(_one_line(str(error))) from error
    return options


def parse_config(arguments: list[str], parser: ArgumentParser | None = None) -> tuple[Config, dict[str, Any]]:
    """Return the checked config of a command line, and whatever else the parser was told to read.

    Raises:
        InputError: what `read_options` refuses, or options that exclude each other.
    """
    values = read_options(arguments, parser or build_parser("deit-kd train"))
    files = values.pop("config") or []
    others = {key: values.pop(key) for key in list(values) if key not in Config.model_fields}
    if files and values["recipe"] == Config.model_fields["recipe"].default:
        values["recipe"] = Path(str(files[-1])).stem
    try:
        return Config.model_validate(values), others
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part not in ("number", "schedule"))
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{key}: {first['input']!r}: {reason}" if key else reason) from error


def _one_line(message: str) -> str:
    """Turn an error of jsonargparse or pydantic into ``key: value, reason, cure``."""
    if message.startswith("Problems parsing config: "):
        where = re.sub(r'in "<unicode string>", ', "in ", " ".join(message.split(": ", 1)[1].split()))
        return f"config: is no YAML ({where}); correct the recipe file"
    if "codec can't decode" in message:
        return f"config: is no text ({message}); name a recipe file"
    if message.startswith("Unexpected config: "):
        return "config: is no recipe, which is YAML of keys and values such as 'seed: 0'"
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    unknown = unknown or re.search(r"Option '([\w.]+)' is not accepted", message)
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if unknown or in_group:
        key = unknown[1].lstrip("-").split("=")[0] if unknown else f"{in_group[1]}.{in_group[2]}" if in_group else ""
        return f"{key}: unknown key{_nearest_key(key)}"
    key_match = re.search(r'Parser key "([\w.]+)"', message)
    value_match = re.search(r"(?:Got|Given) value: (.*)", message, re.DOTALL)
    lines = [line.strip() for line in message.splitlines() if "For further information" not in line]
    reasons = [re.sub(r"\s*\[type=.*", "", line) for line in lines[1:]] or lines
    reason = next(
        (line for line in reasons if line.startswith(("Input should", "Expected", "Value error"))), reasons[0]
    )
    subtypes = next((line for line in lines if line.startswith("Subtypes: [")), None)
    if subtypes is not None:
        reason = f"Expected one of {subtypes[len('Subtypes: [') : -1]}"
    reason = re.sub(r"\.? ?Got value: .*", "", reason).replace("typing.", "")
    reason = re.sub(r"<class '([\w.]+)'>", r"\1", reason).replace("NoneType", "null")
    key = key_match[1] if key_match else ""
    value = f" {value_match[1].partition(chr(10))[0]!r}" if value_match else ""
    return f"{key}:{value} {reason}" if key else reason


def _nearest_key(key: str) -> str:
    keys, last = known_keys(), key.rsplit(".", 1)[-1]
    elsewhere = [known for known in keys if known.rsplit(".", 1)[-1] == last and known != key]
    if elsewhere:
        return nearest(key, elsewhere) or f" (nearest: {', '.join(elsewhere[:3])})"
    return nearest(key, keys) or nearest(last, {known.rsplit(".", 1)[-1] for known in keys})
