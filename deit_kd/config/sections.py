"""The sections of a recipe: photos, views, student, teachers, optimiser."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
)

Statistics = tuple[float, float, float]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # timm's, which takes seconds to import
LARGEST_INTEGER = 2**63 - 1


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
