"""The nouns that cross the borders between rooms: batches, outputs, and what a student and a teacher are."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

if TYPE_CHECKING:  # the command line needs the errors without waiting for torch
    import torch
    from torch import Tensor

MAP_KINDS = ("guide", "relations")  # of terms that compare maps
POOLED = "pooled"  # one vector per image: the feature, and the kind of term that compares it
FEATURE_KINDS = (*MAP_KINDS, POOLED)  # of terms that compare features; the others compare logits
SOFT_TEMPERATURE = 3.0  # of soft labels, unless a recipe says otherwise
DENSE = "dense"  # the kind of term that compares logits at every place

Head = Literal["cls", "dist", "patch"]  # the class token's, the distillation token's, and the latter on the patches
Answer = Literal[Head, "fused"]  # of a student: its heads, and the mean of those that it has
HEADS: tuple[str, ...] = get_args(Head)
ANSWERS: tuple[str, ...] = get_args(Answer)
PAIRS = {f"fused_{first}_{second}": (first, second) for first, second in combinations(HEADS, 2)}  # of three heads


class InputError(Exception):
    """An input from the user cannot be used; the message is one line: value, reason, cure."""


class Stopped(BaseException):
    """A signal, or the loss of another process, ends the run; like KeyboardInterrupt, it is not an error to handle.

    Args:
        message: one line for the user, or empty if another process prints it.
        code: the exit code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def nearest(value: str, known: Iterable[str]) -> str:
    """Return `` (nearest: a, b)`` for the known names most similar to `value`, itself excluded, or an empty string."""
    close = difflib.get_close_matches(value, [name for name in known if name != value], n=3, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, of which only the last word changes: ``1 photo``, ``2 classes``."""
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


class Missing(NamedTuple):
    """A view that is missing from its batch because its photo cannot be read."""

    row: int  # its place in the batch
    photo: int  # index in its split
    epoch: int | None  # of the view; None in evaluation
    position: int  # of the view in its epoch; in evaluation, of the photo in its split
    reason: str


def printable(text: str) -> str:
    """Return `text` on one line, with escapes for control characters and for what cannot be encoded."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


Statistics = tuple[float, float, float]  # by channel


class Rest(NamedTuple):
    """The last class of photos or of a network, where it stands for several classes together (Hinton et al. 2015)."""

    name: str
    classes: tuple[str, ...]  # that it stands for
    kept: float = 1.0  # share of their training photos that were taken


class Preprocessing(NamedTuple):
    """The preprocessing of an image for evaluation: resized and cropped to a square, then normalised by channel.

    The resize brings an image to ``image_size / crop_fraction`` pixels: its shorter side (`crop_mode` ``center``), the
    longer one (``border``, which fills what is left with the mean) or both (``squash``, which gives up the aspect
    ratio). The centre is cropped.
    """

    image_size: int  # pixels of a side
    mean: Statistics
    std: Statistics
    interpolation: str  # of the resize, ``bicubic`` or ``bilinear``
    crop_fraction: float
    crop_mode: str = "center"


class Batch(NamedTuple):
    """One block of views; B counts those that exist, and nothing replaces those that are missing."""

    images: Tensor  # [B, 3, H, W], normalised for the student
    targets: Tensor  # [B, C], soft, after mixing and smoothing; 0 for a photo without a label
    labels: Tensor  # [B], the class of each photo before mixing; -1 if it has none
    view_ids: Tensor | None = None  # [B, 2]: epoch and position, in host memory; None outside our loader
    missing: Sequence[Missing] = ()

    @property
    def places(self) -> int:
        """How many views there would be if none were missing."""
        return len(self.labels) + len(self.missing)

    def rows(self) -> Tensor:
        """Return the places [B] of the views that exist."""
        return _all_but(self.missing, self.places)

    def at_places(self, values: Tensor, filler: bool | int) -> Tensor:
        """Return `values` [B] at their places, with `filler` where views are missing: [places]."""
        if not self.missing:
            return values
        rows = self.rows()
        if values.device.type == "cuda":
            rows = rows.pin_memory().to(values.device, non_blocking=True)
        return values.new_full((self.places,), filler).index_copy(0, rows, values)

    def missing_ids(self) -> Tensor:
        """Return epoch and position [places - B, 2] of the training views that are missing."""
        import torch

        return torch.tensor([(view.epoch, view.position) for view in self.missing], dtype=torch.long).reshape(-1, 2)

    def without(self, missing: Sequence[Missing]) -> Batch:
        """Return this batch of whole rows without those of `missing`."""
        if not missing:
            return self
        rows = _all_but(missing, len(self.labels))
        view_ids = None if self.view_ids is None else self.view_ids[rows]
        return Batch(self.images[rows], self.targets[rows], self.labels[rows], view_ids, missing)

    def pinned(self) -> Batch:
        """Copy every tensor but `view_ids` to pinned memory, from which a GPU copies without waiting."""
        images, targets, labels = (tensor.pin_memory() for tensor in self[:3])
        return self._replace(images=images, targets=targets, labels=labels)

    def to(self, device: torch.device) -> Batch:
        """Move every tensor but `view_ids` to `device` without waiting for the copy.

        A label store finds its records by `view_ids`; reading them from a device would synchronise at every step.
        """

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return self._replace(images=moved(self.images), targets=moved(self.targets), labels=moved(self.labels))


def _all_but(missing: Sequence[Missing], places: int) -> Tensor:
    import torch

    gaps = {view.row for view in missing}
    return torch.tensor([row for row in range(places) if row not in gaps], dtype=torch.long)


class StudentOutput(NamedTuple):
    """What a student answers, the same in train and in eval."""

    cls_logits: Tensor  # [B, C]
    dist_logits: Tensor | None = None  # [B, C]; None if the student answers with one head
    features: Mapping[str, Tensor] | None = None  # maps [B, D, h, w] and vectors [B, D]; None unless something asks
    patch_logits: Tensor | None = None  # [B, C]; None unless its recipe has a dense term
    dense_logits: Tensor | None = None  # [B, h, w, C], of its distillation head at places; None unless something asks

    @property
    def logits(self) -> dict[str, Tensor]:
        """The logits [B, C] of the heads that it has, by name, in the order of `HEADS`."""
        heads = zip(HEADS, (self.cls_logits, self.dist_logits, self.patch_logits), strict=True)
        return {name: logits for name, logits in heads if logits is not None}

    @classmethod
    def of(cls, logits: Mapping[str, Tensor]) -> StudentOutput:
        """Return the answer of heads with these `logits` [B, C], by name, and nothing else."""
        return cls(logits["cls"], logits.get("dist"), patch_logits=logits.get("patch"))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> StudentOutput:
        """Return the answer whose heads have the logits that `change` returns for these, and nothing else."""
        return StudentOutput.of({name: change(logits) for name, logits in self.logits.items()})


class TeacherOutput(NamedTuple):
    """What a teacher answers, in the dataset's classes."""

    logits: Tensor | None  # [B, C]; None for a network without a head
    features: Mapping[str, Tensor] | None = None  # maps [B, D, h, w] and vectors [B, D]; None unless something asks
    dense_logits: Tensor | None = None  # [B, h, w, C], of its head at places; None unless something asks
    dense_labels: Tensor | None = None  # [B, h, w], from a label store: the argmax of `mixed`, -1 if it is not finite

    def mixed(self, share: float | Tensor) -> Tensor:
        """Return ``share * dense_logits + (1 - share) * logits`` at each place, [B, h, w, C] in fp32.

        Args:
            share: 0 to 1; a number, or one for each view [B] in fp64, which gives the same bits.

        Raises:
            InputError: the teacher has no logits at places.
        """
        if self.dense_logits is None:
            raise InputError(
                "distill.terms: dense needs the teacher's logits at every place, and this teacher has none; name a CNN"
            )
        own: Any = share
        rest: Any = 1 - own
        if not isinstance(share, float | int):
            own, rest = (value.float()[:, None, None, None] for value in (own, rest))
        return own * self.dense_logits.float() + rest * self.needed_logits().float()[:, None, None]

    def needed_logits(self) -> Tensor:
        """Return the logits [B, C].

        Raises:
            InputError: the teacher has no head.
        """
        if self.logits is None:
            raise InputError("teacher: has no head, so there are no logits to learn from; name one that has a head")
        return self.logits


class Link(NamedTuple):
    """One feature of the student that is compared with one of the teacher's."""

    name: str  # of the student's feature after its connector, if it has one
    student: str  # name of the student's feature
    teacher: str  # name of the teacher's feature
    student_width: int
    teacher_width: int
    has_connector: bool = True  # which brings the student's feature to the teacher's width


class Student(Protocol):
    """Anything that answers images with both heads.

    One that has ``draw_paths`` is asked for the paths of each batch, and gets them as ``paths``; see `TimmStudent`.
    """

    def __call__(self, images: Tensor) -> StudentOutput: ...


class Teacher(Protocol):
    """Anything that answers a batch without gradient: a network, an ensemble, a label store."""

    def __call__(self, batch: Batch) -> TeacherOutput: ...


def reported(answers: Iterable[str]) -> list[str]:
    """Return the names of a student's answers in records, in order, for those that it has.

    Every student has a place for ``cls``, ``dist`` and ``fused``; only one with three heads for ``patch`` and `PAIRS`.
    """
    there = {*answers}
    names = [name for name in ANSWERS if name != "patch" or name in there]
    return [*names, *(name for name in PAIRS if name in there)]


def speaker(answers: Mapping[str, Any]) -> str:
    """Return which of a student's answers speaks for it: the fused one, or that of its class head if it has no other.

    Args:
        answers: by name; those that do not exist are absent or None.
    """
    return "cls" if answers.get("fused") is None else "fused"


def head_probabilities(output: StudentOutput, fusion: str = "softmax") -> dict[str, Tensor]:
    """Return each head's class probabilities in fp32, and of all heads fused; see `head_log_probabilities`."""
    return {head: values.exp() for head, values in head_log_probabilities(output, fusion).items()}


def head_log_probabilities(output: StudentOutput, fusion: str = "softmax") -> dict[str, Tensor]:
    """Return the logarithm of each head's class probabilities in fp32, and of all heads fused.

    A probability below 1e-38 is 0 in fp32; its logarithm is exact.

    Args:
        output: logits of one batch, each [B, C].
        fusion: ``softmax`` is the mean of the heads' softmaxes (DeiT, arXiv 2012.12877, section 4);
            ``logits`` is the softmax of the mean logits (the published deit and timm code).

    Returns:
        ``cls`` and, when the student has further heads, each of them and ``fused``; each [B, C].
    """
    logits = {name: values.float() for name, values in output.logits.items()}
    heads = {name: values.log_softmax(-1) for name, values in logits.items()}
    if len(heads) > 1:
        heads["fused"] = _fused(logits, heads, fusion)
    return heads


def pair_log_probabilities(output: StudentOutput, fusion: str = "softmax") -> dict[str, Tensor]:
    """Return the logarithm of the class probabilities [B, C] of each two of three heads fused, by the names of `PAIRS`.

    Empty for a student with fewer heads; arguments as for `head_log_probabilities`.
    """
    logits = output.logits
    if len(logits) < len(HEADS):
        return {}
    found = {}
    for name, pair in PAIRS.items():
        two = {head: logits[head].float() for head in pair}
        found[name] = _fused(two, {head: values.log_softmax(-1) for head, values in two.items()}, fusion)
    return found


def _fused(logits: Mapping[str, Tensor], heads: Mapping[str, Tensor], fusion: str) -> Tensor:
    import torch

    if fusion == "softmax":
        return reduce(torch.logaddexp, heads.values()) - math.log(len(heads))
    return (reduce(torch.add, logits.values()) / len(logits)).log_softmax(-1)
