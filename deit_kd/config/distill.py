"""The section of a recipe that says what a student learns: terms, weights and their schedules."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from deit_kd.config.effects import RESULT, key
from deit_kd.config.sections import Section
from deit_kd.interfaces import DENSE, FEATURE_KINDS, SOFT_TEMPERATURE
from deit_kd.schedules import Schedule, always


class ScheduleSection(Section):
    """A number that changes over the run; places are shares of the run."""

    start: float = key(..., RESULT, ge=0)
    """value before the change"""
    end: float = key(0.0, RESULT, ge=0)
    """value after the change"""
    begin: float = key(0.0, RESULT, ge=0, lt=1, alias="from")
    """where a linear or cosine change begins"""
    until: float = key(1.0, RESULT, gt=0, le=1)
    """where the change ends"""
    shape: Literal["constant", "linear", "cosine"] = key("constant", RESULT)
    """constant keeps start until the change ends; linear and cosine move from one to the other"""

    @model_validator(mode="after")
    def _check_places(self) -> ScheduleSection:
        if self.begin >= self.until:
            raise ValueError(f"from {self.begin:g} is not below until {self.until:g}")
        if self.shape == "constant" and self.begin > 0:
            raise ValueError(
                f"from {self.begin:g} does not act with shape constant, which keeps start until {self.until:g}; "
                "leave it out, or set shape linear or cosine"
            )
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
    """Return a number or a schedule in words."""
    return "by the classes" if value is None else str(value) if isinstance(value, ScheduleSection) else f"{value:g}"


def as_schedule(value: float | ScheduleSection) -> Schedule:
    """Return the schedule of a key that is a number or describes one."""
    return value.schedule() if isinstance(value, ScheduleSection) else always(value)


_KEYS_OF_TERM: dict[str, set[str]] = {
    "guide": {"blocks", "stages", "grid", "normalise"},
    "relations": {"blocks", "stages", "grid", "temperature"},
    "pooled": {"loss"},
    "soft": {"temperature"},
    "hard": set(),
    "standardised": {"temperature"},
    DENSE: {"mode", "mix", "temperature"},
}


class TermSection(Section):
    """One more term of the objective."""

    kind: Literal["guide", "relations", "pooled", "soft", "hard", "standardised", "dense"] = key(..., RESULT)
    """guide: feature maps; relations: how alike the places of a map are; pooled: one vector per image; soft, hard,
    standardised: the teacher's logits; dense: its logits at every place of its last map"""
    weight: Scheduled = key(1.0, RESULT)
    """a number, or a schedule {start, end, from, until, shape}"""
    temperature: Scheduled | None = key(None, RESULT)
    """for soft, standardised, relations and soft dense; null is 3, by the number of classes, 0.1, or 3"""
    mode: Literal["hard", "soft"] = key("hard", RESULT)
    """for dense: whether a place learns the argmax or the softmax"""
    mix: Scheduled = key(ScheduleSection(start=1.0, end=0.0, shape="linear"), RESULT)
    """for dense: share of a place's own logits in its target, a number from 0 to 1 or a schedule; the rest is the whole
    image's"""
    blocks: list[int] | None = key(None, RESULT)
    """for guide and relations: the student's blocks, from 0; null spreads them evenly, one for each stage"""
    stages: list[str] | None = key(None, RESULT)
    """for guide and relations: the teacher's layers by timm's names; null takes the last three no coarser than the
    student's grid"""
    grid: int | None = key(None, RESULT, gt=0)
    """for guide and relations: side of a coarser grid to compare maps on; null takes the coarser of the two grids"""
    normalise: bool = key(True, RESULT)
    """for guide: layer-normalise the teacher's maps over channels"""
    loss: Literal["cosine", "huber"] = key("cosine", RESULT)
    """for pooled: how vectors are compared"""

    @field_validator("mix")
    @classmethod
    def _check_share(cls, value: Scheduled) -> Scheduled:
        if not all(0 <= number <= 1 for number in as_schedule(value).values):
            raise ValueError("must be between 0 and 1")
        return value

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
        if self.kind == DENSE and self.mode == "hard" and self.temperature is not None:
            raise ValueError("temperature does not act on a dense term of mode hard; leave it out, or set mode soft")
        return self

    @property
    def compares_features(self) -> bool:
        """Whether it compares features at any time; a weight that is always 0 needs none."""
        return self.kind in FEATURE_KINDS and not as_schedule(self.weight).is_always(0)

    def __str__(self) -> str:
        own = f" ({self.mode}, mix {in_words(self.mix)})" if self.kind == DENSE else ""
        return f"{self.kind}{own}, weight {in_words(self.weight)}"

    @model_serializer(mode="wrap")
    def _own_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        own = {"kind", "weight", *_KEYS_OF_TERM[self.kind]}
        return {key: value for key, value in dump(self).items() if key in own}


class Distill(Section):
    """(1 - alpha) * classification(cls) + alpha * distillation(dist) + the sum of weight * term."""

    kind: Literal["none", "soft", "hard", "standardised"] = key("hard", RESULT)
    """how the teacher's logits are learned; none is plain supervised training, unless there are terms"""
    alpha: Scheduled = key(0.5, RESULT)
    """weight of the distillation term, a number from 0 to 1 or a schedule; 1 with kind none leaves the labels out, and
    a schedule gives them the weight 1 - alpha"""
    temperature: Scheduled | None = key(None, RESULT, validate_default=True)
    """for soft and standardised, a number or a schedule; null is 3, or for standardised depends on the classes"""
    scale: Literal["batchmean", "numel"] = key("batchmean", RESULT)
    """numel also divides by the number of classes, as the published deit code does"""
    terms: list[TermSection] = key([], RESULT)
    """further terms: [{kind: guide, weight: {start: 2.5, until: 0.5}}]"""
    peer_weight: Scheduled = key(1.0, RESULT)
    """with peers: how much the student learns from their answers, a number or a schedule"""
    peer_temperature: Scheduled = key(1.0, RESULT)
    """with peers: temperature at which each compares itself with the others, a number or a schedule"""

    @field_validator("terms")
    @classmethod
    def _check_terms(cls, value: list[TermSection], info: ValidationInfo) -> list[TermSection]:
        kinds = [info.data.get("kind"), *(term.kind for term in value)]
        twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is there twice; keep one")
        return value

    @field_validator("alpha", "temperature", "peer_weight", "peer_temperature")
    @classmethod
    def _check_range(cls, value: Scheduled | None, info: ValidationInfo) -> Scheduled | None:
        for number in () if value is None else as_schedule(value).values:
            if info.field_name == "alpha" and not 0 <= number <= 1:
                raise ValueError("must be between 0 and 1")
            if info.field_name == "peer_weight" and number < 0:
                raise ValueError("must not be below 0")
            if str(info.field_name).endswith("temperature") and number <= 0:
                raise ValueError("must be above 0, start and end alike")
        return value

    @field_validator("temperature")
    @classmethod
    def _resolve_temperature(cls, value: Scheduled | None, info: ValidationInfo) -> Scheduled | None:
        # However it is written, it is the same run; only standardised logits need one that depends on the classes.
        return SOFT_TEMPERATURE if value is None and info.data.get("kind") != "standardised" else value

    def described(self) -> str:
        """Return in words what the student learns from."""
        alpha, temperature = in_words(self.alpha), in_words(self.temperature)
        weighed = f"labels, weight 1 - alpha, alpha {alpha}"
        plain = "no labels" if self.ignores_labels else "labels" if self.terms else "labels alone"
        how = {
            "none": weighed if as_schedule(self.alpha).changes else plain,
            "hard": f"labels and the teacher's hard labels, alpha {alpha}",
            "soft": f"labels and the teacher's soft labels, alpha {alpha}, temperature {temperature}",
            "standardised": f"labels and the teacher's standardised logits, alpha {alpha}, temperature {temperature}",
        }
        return "; ".join([how[self.kind], *map(str, self.terms)])

    @property
    def ignores_labels(self) -> bool:
        """Whether no label is learned from at any time."""
        return self.kind == "none" and as_schedule(self.alpha).is_always(1)

    @property
    def has_token(self) -> bool:
        """Whether the student needs a distillation token."""
        return self.kind != "none" or self.logit_kinds != set()

    @property
    def dense(self) -> TermSection | None:
        """The term that compares logits at every place, if there is one."""
        return next((term for term in self.terms if term.kind == DENSE), None)

    @property
    def stores_dense(self) -> bool:
        """Whether a label store can keep what the dense term learns: the class of each place."""
        return self.dense is not None and self.dense.mode == "hard"

    @property
    def logit_kinds(self) -> set[str]:
        """How the teacher's logits are learned from."""
        kinds: set[str] = {self.kind, *(term.kind for term in self.terms)}
        return kinds - {"none", *FEATURE_KINDS}

    @property
    def logit_weights(self) -> dict[str, float | ScheduleSection]:
        """The weights of what is learned from the teacher's logits, by their keys."""
        weights = {"distill.alpha": self.alpha} if self.kind != "none" else {}
        terms = {f"distill.terms: weight of {term.kind}": term for term in self.terms}
        return weights | {key: term.weight for key, term in terms.items() if term.kind not in FEATURE_KINDS}

    @property
    def needs_features(self) -> bool:
        """Whether any term compares features at any time."""
        return any(term.compares_features for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether anybody has to teach."""
        return self.has_token or self.needs_features

    @property
    def takes_hard_labels(self) -> bool:
        """Whether the teacher's decisions on whole images are enough."""
        return self.logit_kinds <= {"hard", DENSE}
