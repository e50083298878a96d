"""The whole recipe: how long a run is, how it is scored and told, and what its sections say together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import field_validator, model_validator

from deit_kd.config.distill import Distill, as_schedule
from deit_kd.config.effects import FIT, NOTHING, RESULT, VIEWS, key
from deit_kd.config.peers import PeerSection, check_peers
from deit_kd.config.sections import Augment, Data, Guide, Optim, Section, StudentSection, TeacherSection
from deit_kd.interfaces import FEATURE_KINDS, POOLED

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile


class Train(Section):
    """The loop."""

    epochs: int = key(300, RESULT, gt=0)
    """passes over the training photos"""
    batch_size: int = key(1024, RESULT, gt=0)
    """images per optimiser step, over all processes and accumulation steps"""
    accumulation_steps: int = key(1, RESULT, gt=0)
    """micro-batches per optimiser step"""
    precision: Literal["bf16", "fp16", "off"] = key("bf16", RESULT)
    """precision of autocast"""
    ema_decay: float | None = key(None, RESULT, ge=0, lt=1)
    """decay of the weights' average (a span of 1 / (1 - decay) steps); null for a twentieth of the run, 0 for none"""
    compile: bool | Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = key(False, RESULT)
    """run the student through torch.compile; a mode of its name is passed on (reduce-overhead uses CUDA graphs)"""
    deterministic: bool = key(False, RESULT)
    """use torch's deterministic algorithms, so that a GPU repeats its bits; slower there, without effect on the CPU"""
    attention: Literal["auto", "fused", "plain"] = key("auto", RESULT)
    """auto is PyTorch's fused attention on CUDA, and timm's plain attention on the CPU"""
    device: str = key("auto", NOTHING)
    """auto, cpu, cuda or cuda:1"""
    log_every_steps: int = key(20, NOTHING, gt=0)
    """steps between records"""
    checkpoint_every_minutes: float = key(10.0, NOTHING, gt=0)
    """minutes between checkpoints, written at the next record; every epoch also ends with one"""
    checkpoint_every_steps: int | None = key(None, NOTHING, gt=0)
    """steps between further checkpoints; null for none"""
    keep_checkpoints: int = key(2, NOTHING, gt=0)
    """how many of the newest checkpoints to keep, besides the one with the best top-1"""
    max_bad_steps: int = key(10, NOTHING, gt=0)
    """bad steps in a row that end the run: no finite gradient, or teacher answers that are not finite"""
    timeout_seconds: float = key(600.0, NOTHING, ge=0)
    """seconds without progress of a process after which all of them stop; 0 waits forever"""


class Evaluate(Section):
    """How heads are scored."""

    fusion: Literal["softmax", "logits"] = key("softmax", RESULT)
    """mean of the two heads' softmaxes, as in the paper, or of their logits, as in timm and deit"""
    batch_size: int = key(128, NOTHING, gt=0)
    """images per process"""
    every_epochs: int = key(1, NOTHING, gt=0)
    """score the heads after every so many epochs, and after the last"""
    report: bool = key(True, NOTHING)
    """write report/report.html at the end of the run"""


class Tracking(Section):
    """Where records go besides metrics.jsonl and TensorBoard."""

    wandb: bool = key(False, NOTHING)
    """also log to Weights & Biases; needs the package wandb"""
    project: str = key("deit_kd", NOTHING)
    """name of the Weights & Biases project"""


class Config(Section):
    """A whole recipe."""

    data: Data = Data()
    augment: Augment = Augment()
    student: StudentSection = StudentSection()
    teacher: TeacherSection = TeacherSection()
    guide: Guide = Guide()
    peers: list[PeerSection] = key([], RESULT)
    """further students that train together with the student and teach one another: [{name: resnet18, weight: 1.0}]"""
    distill: Distill = Distill()
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()
    recipe: str = key("run", NOTHING)
    """name of the run's folder; the name of the recipe file unless set"""
    seed: int = key(0, VIEWS | FIT, ge=0)
    """seed of everything random"""
    output: str | None = key(None, NOTHING)
    """folder of the run; null for the next free runs/<recipe>-<n>"""
    resume: Literal["auto"] | None = key(None, NOTHING)
    """auto continues the run in output from its newest checkpoint, or starts it"""

    @field_validator("recipe")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if value != Path(value).name:
            raise ValueError("must be the name of one folder")
        return value

    @model_validator(mode="after")
    def _check_photos(self) -> Config:
        folds, fold = self.data.folds, self.data.fold
        if folds is None and fold is not None:
            raise ValueError(f"data.fold: {fold} is set, but data.folds is not; set both")
        if folds is not None and fold is None:
            raise ValueError(f"data.folds: {folds} is set, but data.fold is not; set 0 to {folds - 1}")
        if folds is not None and fold is not None and fold >= folds:
            raise ValueError(f"data.fold: {fold} is none of {folds} folds; set 0 to {folds - 1}")
        if self.data.rest is not None and self.data.classes is None:
            raise ValueError(
                f"data.rest: {self.data.rest} stands for all classes but data.classes, which is not set; set both"
            )
        if self.data.fraction is not None and self.data.per_class is not None:
            raise ValueError("data.fraction and data.per_class exclude each other; unset one")
        if self.data.per_class is not None and self.data.unlabelled is not None:
            raise ValueError(
                f"data.per_class: {self.data.unlabelled} has no labels to count by; set data.fraction, or unset one"
            )
        if self.data.cache == "device" and self.data.executor != "device":
            raise ValueError(
                "data.cache: device is for views that are made there; set data.executor device, or data.cache memory"
            )
        return self

    @model_validator(mode="after")
    def _check_teachers(self) -> Config:
        teacher = self.teacher
        if self.distill.kind != "none" and teacher.random_weights and teacher.fit.epochs:
            raise ValueError("teacher.random_weights and teacher.fit.epochs exclude each other")
        for name, section in (("teacher", teacher), ("guide", self.guide)):
            if section.checkpoint is not None and section.fit.epochs:
                raise ValueError(f"{name}.checkpoint and {name}.fit.epochs exclude each other; unset one")
            for columns in ("class_map", "label_set"):
                if not section.head and getattr(section, columns) is not None:
                    raise ValueError(f"{name}.{columns}: names columns, and {name}.head is false; leave one out")
        if not teacher.head and self.distill.logit_kinds:
            raise ValueError(
                f"teacher.head: false gives no logits for {', '.join(sorted(self.distill.logit_kinds))} labels; set "
                "distill.kind none and compare features, or name it as the guide"
            )
        if not teacher.head and teacher.store is not None:
            raise ValueError("teacher.store: keeps logits, and teacher.head false gives none; unset one")
        if self.data.unlabelled is not None and not self.distill.ignores_labels:
            raise ValueError(
                f"data.unlabelled: {self.data.unlabelled} has no labels to learn from; set distill.kind none and "
                "distill.alpha 1, and name in distill.terms what teaches"
            )
        if teacher.members and teacher.is_named:
            raise ValueError("teacher.members and a teacher of the section's own exclude each other; unset one")
        if self.distill.dense is not None and teacher.kind == "average":
            raise ValueError(
                "distill.terms: dense logits are those of a CNN at each place of its last map, and the average of the "
                "student's weights is no CNN; leave out the dense term, or name a CNN as the teacher"
            )
        if teacher.kind == "average":
            self._check_average()
        if self.peers:
            check_peers(self)
        return self

    @model_validator(mode="after")
    def _check_terms(self) -> Config:
        teacher = self.teacher
        if self.guide.is_named and not any(term.kind in FEATURE_KINDS for term in self.distill.terms):
            raise ValueError("guide: is set, but no term of distill.terms compares features; add one, or unset it")
        if self.distill.needs_features and not self.guide.is_named:
            answers_alone = {
                "several teachers give": bool(teacher.members),
                "the average of the student's weights gives": teacher.kind == "average",
                "a label store gives": teacher.reads_store and not teacher.is_named and not self.stores_vectors,
            }
            for what, is_so in answers_alone.items():
                if is_so:
                    raise ValueError(
                        f"distill.terms: features are compared, but {what} answers alone; add an online guide "
                        "(guide.name, and guide.checkpoint or guide.fit.epochs)"
                    )
        if self.distill.dense is not None and not self.distill.stores_dense and teacher.reads_store:
            raise ValueError(
                "teacher.store: keeps the class of each place, and a dense term of mode soft learns from all logits; "
                "set its mode to hard, or unset the store"
            )
        return self

    @model_validator(mode="after")
    def _check_course(self) -> Config:
        if self.teacher.store_mode == "record" and self.teacher.store is None:
            raise ValueError("teacher.store_mode: record needs a folder to fill; set teacher.store")
        if self.train.precision == "fp16" and self.train.device == "cpu":
            raise ValueError("train.precision: fp16 needs CUDA; use bf16 or off on the CPU")
        if self.train.compile in CUDA_GRAPHS and self.train.accumulation_steps > 1:
            raise ValueError(
                f"train.compile: {self.train.compile} replays CUDA graphs, whose gradients do not outlive the next "
                f"micro-batch, and train.accumulation_steps is {self.train.accumulation_steps}; use true or "
                "max-autotune-no-cudagraphs, or set train.accumulation_steps 1"
            )
        return self

    def _check_average(self) -> None:
        if self.train.ema_decay == 0:
            raise ValueError(
                "teacher.kind: average, but with train.ema_decay 0 no average of the weights is kept; set it to null "
                "or above 0"
            )
        if self.teacher.store is not None:
            raise ValueError(
                "teacher.store: no store can keep the answers of the student's own average, which change with every "
                "step; unset it, or set teacher.kind network"
            )
        acting = {"kind", *(("precision", "channels_last", "compile") if self.guide.is_named else ())}
        undone = [f"teacher.{name} {value}" for name, value in self.teacher.undone.items() if name not in acting]
        if undone:
            raise ValueError(
                "teacher.kind: average takes the student's own weights, so no key of a network acts beside it; set "
                f"{' and '.join(undone)}, or teacher.kind network"
            )

    @property
    def stores_vectors(self) -> bool:
        """Whether a label store can keep all that features are compared with: the teacher's pooled vectors."""
        kinds = {term.kind for term in self.distill.terms if term.compares_features}
        own = self.teacher.store is not None and not self.teacher.members and not self.guide.is_named
        return own and kinds == {POOLED}

    @property
    def learns_from_own_average(self) -> bool:
        """Whether the average of the student's weights is its teacher."""
        return self.teacher.kind == "average" and self.distill.has_token

    @property
    def learns_from_peers(self) -> bool:
        """Whether the student learns from the answers of peers at any time."""
        return bool(self.peers) and as_schedule(self.distill.peer_weight).values != (0, 0)

    @property
    def has_token(self) -> bool:
        """Whether the student needs a distillation token; with peers, a network that can't have one learns without."""
        return self.distill.has_token or self.learns_from_peers

    def with_keys(self, **sections: Mapping[str, Any]) -> Config:
        """Return the recipe with other values of some keys, by section; they are not checked."""
        changed = {name: getattr(self, name).model_copy(update=values) for name, values in sections.items()}
        return self.model_copy(update=changed)

    def to_yaml(self) -> str:
        """Return the recipe as YAML, every key with its value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
