"""Peers: further students that train together with the student, and the recipe as each of them sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import field_validator

from deit_kd.config.distill import Scheduled, as_schedule, in_words
from deit_kd.config.effects import RESULT, key
from deit_kd.config.sections import Guide, StudentSection
from deit_kd.interfaces import DENSE, FEATURE_KINDS

if TYPE_CHECKING:
    from deit_kd.config.recipe import Config


class PeerSection(StudentSection):
    """One more student, which learns from the labels, from the others' answers and from the teacher's, if any."""

    name: str = key(..., RESULT)
    """timm name; a ViT gets a distillation token, and a network that cannot have one learns with its only head"""
    weight: Scheduled = key(1.0, RESULT)
    """how much it learns from the others, a number or a schedule"""

    @field_validator("weight")
    @classmethod
    def _check_weight(cls, value: Scheduled) -> Scheduled:
        if min(as_schedule(value).values) < 0:
            raise ValueError("must not be below 0")
        return value

    @property
    def student(self) -> StudentSection:
        """The peer as the student of a recipe."""
        return StudentSection(**{name: getattr(self, name) for name in StudentSection.model_fields})


def names_of_peers(peers: list[PeerSection]) -> list[str]:
    """Return what each peer is called: by its timm name, with a number from the second of that name on."""
    called = [peer.name for peer in peers]
    before = [called[:place].count(name) for place, name in enumerate(called)]
    return [f"{name}-{count + 1}" if count else name for name, count in zip(called, before, strict=True)]


def recipe_of_peer(config: Config, place: int) -> Config:
    """Return the recipe as one of its peers sees it: it is the student, and the others are its peers.

    Terms that compare features or logits at every place are the student's alone.
    """
    own, others = config.peers[place], [*config.peers[:place], *config.peers[place + 1 :]]
    student = PeerSection(**dict(config.student), weight=config.distill.peer_weight)
    terms = [term for term in config.distill.terms if term.kind not in (*FEATURE_KINDS, DENSE)]
    return config.model_copy(
        update={
            "student": own.student,
            "peers": [student, *others],
            "distill": config.distill.model_copy(update={"terms": terms, "peer_weight": own.weight}),
            "guide": Guide(),
        }
    )


def described(config: Config) -> str:
    """Return in words what the student of a recipe learns from."""
    if not config.peers:
        return config.distill.described()
    words = config.distill.described().replace("labels alone", "labels")
    how = f"weight {in_words(config.distill.peer_weight)}, temperature {in_words(config.distill.peer_temperature)}"
    return f"{words}; the answers of {', '.join(peer.name for peer in config.peers)}, {how}"


def check_peers(config: Config) -> None:
    """Refuse what peers cannot be combined with.

    Raises:
        ValueError: it is in the recipe.
    """
    if config.teacher.kind == "average":
        raise ValueError(
            "peers: teach one another, and teacher.kind average is a student that teaches itself; unset one of the two"
        )
    if config.distill.kind == "none" and 1 in as_schedule(config.distill.alpha).values:
        raise ValueError(
            "peers: learn from labels, and distill.alpha 1 with distill.kind none leaves them out; lower distill.alpha"
        )
