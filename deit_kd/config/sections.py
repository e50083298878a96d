"""The sections of a recipe: photos, views, student, teachers, optimiser."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    JsonValue,
    ValidationInfo,
    field_validator,
)

from deit_kd.config.effects import ANSWERS, FIT, NOTHING, RESULT, VIEWS, effect_of, key
from deit_kd.interfaces import Preprocessing, Statistics

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

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for name, field in cls.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            if not is_section and effect_of(field) is None:
                raise TypeError(f"{cls.__name__}.{name}: say what it changes, as in key(default, RESULT)")


def _check_positive(value: Statistics | None) -> Statistics | None:
    if value is not None and min(value) <= 0:
        raise ValueError("must be above 0 in every channel")
    return value


def _check_share(value: Statistics | None) -> Statistics | None:
    if value is not None and not 0 <= min(value) <= max(value) <= 1:
        raise ValueError("must be between 0 and 1 in every channel; divide means of levels from 0 to 255 by 255")
    return value


class Data(Section):
    """Where the photos are and how large the student sees them."""

    name: str = key("folder", NOTHING)  # the photos themselves are compared
    """dataset: folder, shards, hf (Hugging Face), digits, imagenette, cifar10 or cifar100"""
    root: str | None = key(None, NOTHING)  # the photos themselves are compared
    """folder of the photos; with hf also a data set of the hub, ID or ID:CONFIGURATION"""
    image_column: str | None = key(None, NOTHING)  # the photos themselves are compared
    """with hf: the column of images; null takes the only one"""
    label_column: str | None = key(None, NOTHING)  # the photos themselves are compared
    """with hf: the column of labels; null takes the only one of classes, or the one that is called label"""
    train_split: str = key("train", RESULT)
    """folder of the training split under root"""
    validation_split: str = key("validation", RESULT)
    """folder of the validation split under root; if it is missing, a share of each class is held out"""
    validation_fraction: float = key(0.2, RESULT, gt=0, lt=1)
    """share of each class to hold out if there is no validation split"""
    folds: int | None = key(None, VIEWS, ge=2)
    """cross-validation: join all photos and divide each class into this many folds, by the hash of the photos' names"""
    fold: int | None = key(None, VIEWS, ge=0)
    """the fold to hold out, from 0; the student trains on the others"""
    classes: list[str] | str | None = key(None, NOTHING)  # the photos themselves are compared
    """take these classes alone: a list, a file with one a line (CSV: the first column), or the name of a list that
    comes with the package: imagenet100, imagenette or imagewoof"""
    rest: str | None = key(None, NOTHING, min_length=1)  # the photos themselves are compared
    """name of one more class, which all classes but data.classes become together; null leaves them out"""
    rest_share: float = key(0.5, NOTHING, gt=0, le=1)  # the photos themselves are compared
    """share of the training photos that data.rest may be at most, by the hash of their names; 1 takes all"""
    fraction: float | None = key(None, VIEWS, gt=0, le=1)
    """share of each class's training photos to take, by the hash of their names; a smaller share lies within a larger
    one, and validation keeps all its photos"""
    per_class: int | None = key(None, VIEWS, gt=0)
    """number of each class's training photos to take, in the same way"""
    unlabelled: str | None = key(None, NOTHING)  # the photos themselves are compared
    """folder of photos without labels to train on, nested in any way; root then only gives classes and validation"""
    download: bool = key(False, NOTHING)
    """let torchvision download the data to root"""
    stage: str | None = key(None, NOTHING)
    """folder on a local disk to copy shards to before they are read, once for all processes of a machine"""
    image_size: int = key(224, VIEWS, gt=0)
    """side of the student's images in pixels"""
    crop_fraction: float = key(0.9, VIEWS, gt=0, le=1)
    """evaluation resizes to image_size / crop_fraction (see crop_mode), then crops the centre"""
    crop_mode: Literal["center", "border", "squash"] = key("center", VIEWS)
    """timm's crop_mode: evaluation resizes the shorter side, the longer side (padded with the mean), or both"""
    interpolation: Literal["bicubic", "bilinear", "random"] = key("bicubic", VIEWS)
    """interpolation of all resizing"""
    mean: Statistics = key(IMAGENET_MEAN, VIEWS)
    """normalisation of the student's images, per channel"""
    std: Statistics = key(IMAGENET_STD, VIEWS)
    """normalisation of the student's images, per channel"""
    executor: Literal["pillow", "device"] = key("pillow", VIEWS)
    """what makes the training views: Pillow in the workers, or the device that trains; each makes views of its own"""
    decoder: Literal["pillow", "torchcodec"] = key("pillow", VIEWS)
    """what decodes training photos: Pillow, or the extra torchcodec, faster for JPEG; scores always see Pillow's"""
    cache: Literal["none", "memory", "device"] = key("none", NOTHING)
    """decode every training photo once, and keep it in main memory or, for executor device, where views are made"""
    cache_size: int | None = key(None, VIEWS, gt=0)
    """bring the shorter side of larger training photos to this many pixels first; null keeps their size"""
    workers: int = key(2, NOTHING, ge=0)
    """data loader workers per training process"""
    prefetch_mb: int | None = key(None, NOTHING, gt=0)
    """MB that the batches of a process's workers may take in shared memory; null is two ahead for each, if they fit"""
    on_error: Literal["raise", "skip"] = key("raise", NOTHING)  # what is left out is listed, and marked in a store
    """what to do with a photo that cannot be read: end the run, or leave it out and list it in data_errors.jsonl"""
    max_errors: int = key(100, NOTHING, ge=0)
    """number of photos that may be left out; one more ends the run"""

    _check_mean = field_validator("mean")(_check_share)
    _check_std = field_validator("std")(_check_positive)

    @field_validator("classes", mode="before")
    @classmethod
    def _name_numbers(cls, value: Any) -> Any:
        """Return the classes with names for whole numbers; YAML makes other things of some names, which are refused."""
        if not isinstance(value, list):
            return value
        named = [str(name) if type(name) is int else name for name in value]
        for name in named:
            if not isinstance(name, str):
                raise ValueError(f"{name!r} is no name; put names such as yes, no, null and 1.0 in quotes")
        return named

    @property
    def taken(self) -> str:
        """What part of the photos is taken, in the words of the recipe; empty for all of them."""
        named = self.classes
        if isinstance(named, list):
            named = ", ".join(named[:5]) + " …" * (len(named) > 5)
        parts = {"classes": named, "rest": self.rest, "fraction": self.fraction, "per_class": self.per_class}
        return ", ".join(f"data.{key} {value}" for key, value in parts.items() if value is not None)

    @property
    def preprocessing(self) -> Preprocessing:
        """How a photo reaches the student to be scored."""
        interpolation = "bicubic" if self.interpolation == "random" else self.interpolation
        return Preprocessing(self.image_size, self.mean, self.std, interpolation, self.crop_fraction, self.crop_mode)


class Augment(Section):
    """How views are made; the defaults are DeiT's."""

    auto_augment: str | None = key("rand-m9-mstd0.5-inc1", VIEWS)
    """timm's policy: rand-m9-mstd0.5-inc1, 3a (three-augment), …; null for none"""
    color_jitter: float = key(0.3, VIEWS, ge=0)
    """strength of colour jitter; timm skips it if auto_augment is a RandAugment policy"""
    horizontal_flip: float = key(0.5, VIEWS, ge=0, le=1)
    """probability of a horizontal flip"""
    scale: tuple[float, float] = key((0.08, 1.0), VIEWS)
    """area of the random crop, as a share of the photo"""
    ratio: tuple[float, float] = key((3 / 4, 4 / 3), VIEWS)
    """aspect ratio of the random crop"""
    erasing: float = key(0.25, VIEWS, ge=0, le=1)
    """probability of random erasing"""
    repeats: int = key(3, VIEWS, gt=0)
    """repeated augmentation: views of each photo in an epoch that shows it"""
    mixup: float = key(0.8, VIEWS, ge=0)
    """alpha of mixup; 0 is off"""
    cutmix: float = key(1.0, VIEWS, ge=0)
    """alpha of CutMix; 0 is off"""
    mix_probability: float = key(1.0, VIEWS, ge=0, le=1)
    """probability that a pair of views is mixed"""
    mix_switch_probability: float = key(0.5, VIEWS, ge=0, le=1)
    """probability of CutMix if mixup is also on"""
    label_smoothing: float = key(0.1, RESULT, ge=0, lt=1)
    """probability mass spread over all classes"""

    @field_validator("scale", "ratio")
    @classmethod
    def _check_order(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] or (info.field_name == "scale" and value[1] > 1):
            raise ValueError("must be [low, high] with 0 < low <= high" + (" <= 1" * (info.field_name == "scale")))
        return value


class Optim(Section):
    """timm's optimiser and cosine schedule; the defaults are DeiT's."""

    name: str = key("adamw", RESULT)
    """timm's name of the optimiser"""
    lr: float = key(5e-4, RESULT, gt=0)
    """learning rate for a batch of lr_reference_batch; scales linearly with the batch"""
    lr_reference_batch: int = key(512, RESULT, ge=0)
    """batch size that lr is given for; 0 takes lr as it is"""
    weight_decay: float = key(0.05, RESULT, ge=0)
    """weight decay of matrices; tokens, position embeddings, biases and norms have none"""
    warmup_epochs: int = key(5, RESULT, ge=0)
    """epochs of linear warm-up"""
    warmup_lr: float = key(1e-6, RESULT, ge=0)
    """learning rate at the start of the warm-up"""
    min_lr: float = key(1e-5, RESULT, ge=0)
    """learning rate at the end of the cosine"""
    clip_grad_norm: float | None = key(None, RESULT, gt=0)
    """largest gradient norm; null for no clipping"""
    layer_decay: float | None = key(None, RESULT, gt=0, le=1)
    """factor of the learning rate from each layer to the one below it, starting at the heads; null for one rate"""
    args: dict[str, JsonValue] = key({}, RESULT)
    """further arguments of the optimiser: betas, eps, …"""


class StudentSection(Section):
    """The network that learns."""

    name: str | None = key(None, RESULT)
    """timm name; a plain ViT gets a distillation token unless distill.kind is none"""
    pretrained: bool = key(False, RESULT)
    """start from timm's weights"""
    checkpoint: str | None = key(None, RESULT)
    """start from these weights: a run or a file in it, a timm local-dir, a transformers folder, .safetensors or .pth"""
    token: Literal["cls", "scratch"] = key("cls", RESULT)
    """how a token that the weights lack starts: from their class token with small noise, or from scratch"""
    new_heads: bool = key(False, RESULT)
    """initialise new heads even if those of the weights have the right number of classes"""
    freeze: Literal["none", "patch_embed", "backbone", "all_but_heads"] = key("none", RESULT)
    """what stays frozen; with backbone only tokens and heads learn"""
    drop_path: float = key(0.1, RESULT, ge=0, lt=1)
    """rate of stochastic depth"""
    bits: Literal[8, 4] | None = key(None, RESULT)
    """train for linear layers whose weights are integers of so many bits and whose inputs have 8; null does not"""
    channels_last: bool | None = key(None, RESULT)
    """channels-last memory format; null uses it for networks with BatchNorm"""
    args: dict[str, JsonValue] = key({}, RESULT)
    """further arguments of timm.create_model: patch_size, embed_dim, depth, …"""


class Fit(Section):
    """Train the teacher first, on the same data, when no weights for these classes exist yet."""

    epochs: int = key(0, FIT, ge=0)
    """epochs to train the teacher for; 0 does not train it"""
    folder: str = key("runs/teachers", NOTHING)
    """where fitted teachers are kept and found again"""
    batch_size: int = key(64, FIT, gt=0)
    """images per optimiser step"""
    ema_decay: float = key(0.0, FIT, ge=0, lt=1)
    """decay of the average of the weights; 0 for no average"""
    drop_path: float = key(0.0, FIT, ge=0, lt=1)
    """rate of stochastic depth"""
    augment: Augment = Augment(auto_augment=None, erasing=0.0, repeats=1, mixup=0.0, cutmix=0.0, scale=(0.35, 1.0))
    """how the teacher's views are made"""
    optim: Optim = Optim(lr=1e-3, lr_reference_batch=0, warmup_epochs=1)
    """the teacher's optimiser"""


class TeacherNetwork(Section):
    """A frozen network; its weights come from exactly one place."""

    name: str | None = key(None, ANSWERS | FIT)
    """timm name, best with the tag of pretrained weights (regnety_160.deit_in1k); null takes the checkpoint's"""
    pretrained: bool = key(False, FIT)
    """use timm's weights, head included"""
    checkpoint: str | None = key(None, NOTHING)  # the weights themselves are compared
    """weights: a run or a file in it (RUN:teacher is its teacher), a local-dir, transformers, .safetensors or .pth"""
    random_weights: bool = key(False, FIT)
    """no trained weights; for benchmarks and tests"""
    class_map: str | None = key(None, NOTHING)  # the columns are compared
    """CSV or JSON file that gives each class its column, WordNet id or label of the teacher"""
    label_set: str | None = key(None, ANSWERS)
    """classes of weights without class names: imagenet-1k, imagenet-12k, imagenet-22k, …"""
    image_size: int | None = key(None, ANSWERS | FIT, gt=0)
    """side of its images in pixels, also in its fit; null takes that of its pretrained config, or the student's"""
    mean: Statistics | None = key(None, ANSWERS | FIT)
    """its normalisation; null takes that of its pretrained config, or the student's"""
    std: Statistics | None = key(None, ANSWERS | FIT)
    """its normalisation; null takes that of its pretrained config, or the student's"""
    args: dict[str, JsonValue] = key({}, ANSWERS | FIT)
    """further arguments of timm.create_model"""

    _check_mean = field_validator("mean")(_check_share)
    _check_std = field_validator("std")(_check_positive)


class SoleTeacher(TeacherNetwork):
    """A network that may be fitted first, and whose score is checked before it teaches."""

    role: ClassVar[str] = "teacher"  # whose keys messages name
    fit: Fit = Fit()
    """how it is trained first"""
    head: bool = key(True, RESULT)
    """false uses only its features, of any network with or without a head; no class map is needed"""
    min_top1: float | None = key(None, NOTHING, ge=0, le=100)
    """least top-1 on validation in percent (without a head, that of its k-NN); null is the share of the largest class
    plus three standard errors"""

    @field_validator("min_top1")
    @classmethod
    def _check_percent(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < 1:
            raise ValueError(f"must be in percent, 0 or at least 1; write {100 * value:g} for that share of the photos")
        return value

    @property
    def is_named(self) -> bool:
        """Whether the section says which network it is."""
        return bool(self.name or self.pretrained or self.checkpoint or self.random_weights or self.fit.epochs)


class Guide(SoleTeacher):
    """A network that gives the features; unset, the teacher gives them with its answers."""

    role: ClassVar[str] = "guide"


class TeacherMember(TeacherNetwork):
    """One of several teachers."""

    weight: float = key(1.0, ANSWERS, gt=0)
    """its weight; weights are scaled to sum to 1"""


class TeacherSection(SoleTeacher):
    """What is learned from: one network, several, or the average of the student's own weights."""

    kind: Literal["network", "average"] = key("network", RESULT)
    """network; or average, of the student's own weights, which needs nothing else of this section"""
    members: list[TeacherMember] = key([], ANSWERS)
    """several teachers instead of one, each with its own size, normalisation and class map"""
    combine: Literal["mean", "draw"] = key("mean", ANSWERS)
    """with several teachers: mean of their probabilities, or draw one for each view"""
    store: str | None = key(None, NOTHING)  # what it answers with is compared
    """folder of a label store: the teacher's answers to every view"""
    store_mode: Literal["read", "record"] = key("read", NOTHING)
    """read trains without a teacher in memory; record fills the store while training with the teacher"""
    store_top: int | None = key(None, NOTHING, ge=0)
    """logits that a new store keeps per view; null is 10 for soft labels and 0 (the label alone) for hard labels"""
    precision: Literal["auto", "bf16", "fp16", "off"] = key("auto", ANSWERS)
    """precision of its weights; auto takes train.precision"""
    channels_last: bool | None = key(None, RESULT)
    """channels-last memory format; null lets a run on CUDA measure which one is faster, and is true elsewhere"""
    fold: bool = key(False, ANSWERS)
    """fold batch norms into the convolutions before them: fewer operations, and answers that differ by rounding"""
    compile: bool = key(False, NOTHING)
    """run it through torch.compile"""

    @property
    def undone(self) -> dict[str, str]:
        """The defaults of the keys that have other values, as they are typed; of a fit only that there is none."""
        default = TeacherSection()
        plain = (name for name in type(self).model_fields if name != "fit")
        found: dict[str, Any] = {
            name: value for name in plain if (value := getattr(default, name)) != getattr(self, name)
        }
        if self.fit.epochs:
            found["fit.epochs"] = 0
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}

    @property
    def reads_store(self) -> bool:
        """Whether a label store answers in the network's place."""
        return self.store is not None and self.store_mode == "read"


class GuideAsTeacher(TeacherSection):
    """A guide in the teacher's place, so that both are built, fitted and found alike."""

    role: ClassVar[str] = "guide"
