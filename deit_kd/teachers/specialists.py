"""Specialists: teachers that know some classes and call all others the rest (Hinton et al. 2015, section 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deit_kd.interfaces import InputError, Rest


class Specialty(NamedTuple):
    """What a teacher answers, if not in all of the dataset's classes: some of them, and then the rest.

    Args:
        classes: how many the dataset has.
        labels: of the classes that it knows, in the order of its answers.
        rest_offset: added to the logit of the rest, of which it has seen fewer photos than there are: the logarithm of
            how many times fewer.
    """

    classes: int
    labels: tuple[int, ...]
    rest_offset: float


def specialty_of(name: str, own: Sequence[str] | None, rest: Rest, classes: Sequence[str]) -> Specialty | None:
    """Return which of the dataset's `classes` a network with a rest knows; None if it knows them all.

    Args:
        name: of the network, for messages.
        own: its classes.
        rest: what the last of them stands for.
        classes: of the dataset.

    Raises:
        InputError: it knows no class, or has never seen one of the others.
    """
    known = set(own or ()) - {rest.name}
    labels = tuple(label for label, class_name in enumerate(classes) if class_name in known)
    others = [class_name for class_name in classes if class_name not in known]
    if not others:
        return None
    if not labels:
        raise InputError(f"teacher.members: {name} knows none of the {len(classes)} classes; leave it out")
    unseen = [class_name for class_name in others if class_name not in rest.classes]
    if unseen:
        raise InputError(
            f"teacher.members: {name} has not seen {unseen[0]!r}, neither as a class of its own nor as part of its "
            f"{rest.name!r}; leave it out, or train it on these photos"
        )
    return Specialty(len(classes), labels, -math.log(rest.kept))


class Panel(nn.Module):
    """Joins the answers of specialists to those of teachers that know all classes.

    The answer is the weighted mean of their probabilities, where what a specialist gives to its rest is spread over the
    classes of the rest in proportion to the answer g [C] of the others. Only those specialists count that know the most
    probable class of g; without any, the answer is g.

    If one specialist counts, as with clusters that share no class, this is the q [C] that minimises the weighted sum of
    KL(g ‖ q) and KL(p ‖ q), q summed over the rest in the latter (Hinton et al. 2015, equation 5). For several, that q
    has no closed form, and iterating towards it can take thousands of passes.

    Args:
        specialties: of the specialists.
        weights: of the specialists, above 0.
        others: the weight of the teachers that know all classes, above 0.
    """

    _weights: Tensor
    _knows: Tensor
    _places: Tensor
    _offsets: Tensor

    def __init__(self, specialties: Sequence[Specialty], weights: Sequence[float], others: float) -> None:
        super().__init__()
        places = torch.stack([_places(specialty) for specialty in specialties])  # [specialists, C]
        knows = places < torch.tensor([[len(specialty.labels)] for specialty in specialties])
        self.register_buffer("_weights", torch.tensor([others, *weights], dtype=torch.float32), persistent=False)
        self.register_buffer("_knows", knows)  # in the state: processes, resumed runs and stores must share them
        self.register_buffer("_places", places, persistent=False)
        self.register_buffer("_offsets", torch.tensor([specialty.rest_offset for specialty in specialties]))

    def forward(self, general: Tensor, special: Sequence[Tensor]) -> Tensor:
        """Return log-probabilities [B, …, C].

        Args:
            general: log-probabilities [B, …, C] of the teachers that know all classes, of images or of places.
            special: logits [B, …, K + 1] of each specialist: of the K classes that it knows, and of its rest.
        """
        counts = self._knows[:, general.argmax(-1)]  # [specialists, B, …]
        own = self._weights.view(-1, *(1,) * (general.ndim - 1))
        weights = torch.cat([torch.ones_like(counts[:1]), counts]) * own  # [1 + specialists, B, …]
        answers = torch.stack([general, *(self._spread(row, logits, general) for row, logits in enumerate(special))])
        return (answers + (weights / weights.sum(0)).log()[..., None]).logsumexp(0)

    def _spread(self, row: int, logits: Tensor, general: Tensor) -> Tensor:
        """Return a specialist's log-probabilities of all classes [B, …, C]."""
        corrected = torch.cat([logits[..., :-1], logits[..., -1:] + self._offsets[row]], dim=-1)
        knows = self._knows[row]
        among_others = general.masked_fill(knows, float("-inf")).log_softmax(-1)
        return corrected.log_softmax(-1)[..., self._places[row]] + among_others.masked_fill(knows, 0)


def _places(specialty: Specialty) -> Tensor:
    """Return the column [C] of its answers that speaks of each class; the last one speaks of all that it lacks."""
    places = torch.full((specialty.classes,), len(specialty.labels))
    places[list(specialty.labels)] = torch.arange(len(specialty.labels))
    return places
