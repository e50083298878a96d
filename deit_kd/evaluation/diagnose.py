"""What the distillation token learned beyond the labels, and where both tokens look (DeiT, Table 4 and section 5)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deit_kd.console import say
from deit_kd.engine import autocast
from deit_kd.evaluation.examine import Examination
from deit_kd.evaluation.sources import load_student
from deit_kd.figures import image_png, look, side_by_side
from deit_kd.files import write_atomically, write_json
from deit_kd.interfaces import HEADS, Batch, InputError, nearest
from deit_kd.metrics import followed, linear_cka, token_cosines
from deit_kd.probes import (
    TokenAttention,
    blocks,
    channels_of_stages,
    input_token_cosine,
    leading_tokens,
    pooled,
    recorded,
    stages,
    token_attention,
)
from deit_kd.runs import parts
from deit_kd.runs.photos import build_evaluation_transform
from deit_kd.teachers import FrozenTeacher

COLLAPSED = 0.995  # two class tokens end at .999 in the paper, a class and a distillation token begin at .06
PROBED_IMAGES = 256
GALLERY = 8
TOKENS = HEADS[:2]  # the heads that read a token each


DIAGNOSIS_FILE = "diagnosis.json"
ATTENTION_FOLDER = "attention"
PICTURES = ("gallery", "disputed")  # prefixes of their file names


@dataclass(frozen=True)
class Portrait:
    """One image of the gallery, as the student saw it."""

    path: str
    image: np.ndarray  # [H, W, 3], 0 to 1
    answers: dict[str, tuple[str, float | None]]  # class and probability by predictor; the truth has no probability
    attention: TokenAttention | None  # of this image alone, [1, …]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The heads whose tokens attend to the patches."""
        return () if self.attention is None else tuple(token for token in TOKENS if token in self.answers)

    def maps(self) -> dict[str, dict[str, Tensor]]:
        """Return the attention [h, w] by token: ``last block`` (mean over heads), ``rollout`` and every ``head n``."""
        maps: dict[str, dict[str, Tensor]] = {}
        for position, token in enumerate(self.tokens):
            assert self.attention is not None
            by_head = self.attention.last_block[0, :, position]
            maps[token] = {"last block": by_head.mean(0)}
            if self.attention.rollout is not None:
                maps[token]["rollout"] = self.attention.rollout[0, position]
            maps[token].update({f"head {number}": one for number, one in enumerate(by_head, start=1)})
        return maps

    def panels(self) -> dict[str, np.ndarray]:
        """Return the image and every attention map over it, the tokens side by side, [H, W, 3] each, by caption."""
        panels = {"image": look(self.image)}
        maps = self.maps()
        for what in next(iter(maps.values()), {}):
            panels.update({f"{token}, {what}": look(self.image, maps[token][what].numpy()) for token in maps})
        return panels


@dataclass(frozen=True)
class Diagnosis:
    """The numbers, ready for JSON, and the images that belong to them."""

    numbers: dict[str, Any]
    gallery: list[Portrait]  # where the two heads differ most
    disputed: list[Portrait]  # where the teacher contradicts the label with the highest confidence


def diagnose(examination: Examination, chosen: list[str]) -> Diagnosis:
    """Diagnose a student that has been examined.

    Layers are compared over up to 256 images spread evenly over the split. In the numbers, ``tokens`` are the
    cosines of the two tokens at the input (as learned, before positions are added) and after every block;
    ``collapsed`` means that they are the same at the input, so the second token is of no use; ``cka`` aligns the
    student's blocks with the teacher's stages; ``followed`` counts how often each head follows the label or the teacher
    where the two disagree.

    Args:
        examination: a student and its answers to a split.
        chosen: names of images for the gallery; if empty, those with the largest distance between the heads.

    Raises:
        InputError: a chosen image is not in the split.
    """
    answers = examination.answers
    count = len(answers.labels)
    probed = np.unique(np.linspace(0, count - 1, min(count, PROBED_IMAGES)).round().astype(int)).tolist()
    tokens, alignment = _probe_layers(examination, probed)
    heads = examination.heads()
    distance = _distance(heads)
    disputed: list[int] = []
    follows = None
    taught = answers.teacher_predictions
    if taught is not None:
        sureness = torch.ones(count) if answers.teacher_logits is None else answers.teacher_logits.softmax(-1).amax(-1)
        follows = followed({name: values.argmax(-1) for name, values in heads.items()}, answers.labels, taught)
        candidates = torch.where(taught != answers.labels, sureness, torch.zeros_like(sureness))
        surest = candidates.argsort(descending=True, stable=True).tolist()
        disputed = [row for row in surest if candidates[row] > 0][:GALLERY]
    rows = _rows_of(chosen, examination) or distance.argsort(descending=True, stable=True).tolist()[:GALLERY]
    collapsed = bool(tokens) and tokens[0]["mean"] > COLLAPSED
    portraits = _portraits(examination, [*rows, *disputed])
    numbers = {
        "tokens": tokens,
        "collapsed": collapsed,
        "cka": alignment,
        "followed": follows,
        "gallery": [
            {**_plain(portrait), "distance_of_heads": float(distance[row])}
            for portrait, row in zip(portraits, rows, strict=False)
        ],
        "disputed": [_plain(portrait) for portrait in portraits[len(rows) :]],
    }
    return Diagnosis(numbers, portraits[: len(rows)], portraits[len(rows) :])


def _rows_of(names: list[str], examination: Examination) -> list[int]:
    rows = {examination.photos.names[index]: row for row, index in enumerate(examination.answers.indices.tolist())}
    for name in names:
        if name not in rows:
            raise InputError(f"--images: {name!r} is not a readable image of the split{nearest(name, rows)}")
    return [rows[name] for name in names]


def _distance(heads: dict[str, Tensor]) -> Tensor:
    """Return the total variation [n] between the heads of the tokens, 0 to 1; for a single head, its uncertainty."""
    first, *others = (heads[token] for token in TOKENS if token in heads)
    return (first - others[0]).abs().sum(-1) / 2 if others else 1 - first.max(-1).values


def _batch(examination: Examination, rows: list[int]) -> Batch:
    transform = build_evaluation_transform(examination.config)
    indices = examination.answers.indices[rows].tolist()
    images = torch.stack([transform(examination.photos.image(index)) for index in indices])
    labels = examination.answers.labels[rows]
    targets = torch.nn.functional.one_hot(labels, len(examination.photos.classes)).float()
    device = next(examination.student.parameters()).device
    return Batch(images, targets, labels).to(device)


@torch.inference_mode()
def _probe_layers(examination: Examination, rows: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    student, teacher, config = examination.student, examination.teacher, examination.config
    own = blocks(student.backbone)
    # Several teachers have no layers in common to compare with.
    network = teacher.network if isinstance(teacher, FrozenTeacher) else None
    theirs = {} if network is None else stages(network)
    channels = {} if network is None else channels_of_stages(network)
    own_features: defaultdict[str, list[Tensor]] = defaultdict(list)
    their_features: defaultdict[str, list[Tensor]] = defaultdict(list)
    cosines: defaultdict[str, list[Tensor]] = defaultdict(list)
    two = student.has_distillation_token
    for first in range(0, len(rows), config.evaluate.batch_size):
        batch = _batch(examination, rows[first : first + config.evaluate.batch_size])
        with recorded(own) as said, autocast(batch.images.device, config.train.precision):
            student.backbone.forward_features(batch.images)  # the student itself leaves out its last block's patches
        for name, output in _by_image(said, batch):
            own_features[name].append(pooled(output, _leading_tokens(examination)))
            if two:
                cosines[name].append(token_cosines(output))
        if teacher is not None and theirs:
            with recorded(theirs) as taught:
                teacher(batch)
            for name, output in _by_image(taught, batch):
                leading = leading_tokens(teacher, otherwise=1)
                their_features[name].append(pooled(output, leading, channels.get(name)))
    tokens: list[dict[str, Any]] = []
    if two:
        tokens.append({"layer": "input", "mean": input_token_cosine(student.backbone), "spread": 0.0})
        for name, values in cosines.items():
            joined = torch.cat(values)
            tokens.append({"layer": name, "mean": float(joined.mean()), "spread": float(joined.std(correction=0))})
    if not own_features or not their_features:
        return tokens, None
    matrix = [
        [linear_cka(torch.cat(mine), torch.cat(other)) for other in their_features.values()]
        for mine in own_features.values()
    ]
    names = {"student": list(own_features), "teacher": list(their_features)}
    return tokens, {**names, "matrix": matrix, "images": len(rows)}


def _by_image(said: dict[str, Tensor], batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Yield the outputs of layers that see whole images; blocks between convolutions (mobilevit) see pieces of them."""
    return ((name, output) for name, output in said.items() if len(output) == len(batch.images) and output.ndim > 2)


def _leading_tokens(examination: Examination) -> int:
    student = examination.student
    return leading_tokens(student, otherwise=2 if student.has_distillation_token else 0)


def _portraits(examination: Examination, rows: list[int]) -> list[Portrait]:
    if not rows:
        return []
    config, classes = examination.config, examination.photos.classes
    batch = _batch(examination, rows)
    attention = _attention(examination, batch)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.data.mean, config.data.std))
    answers, predictors = examination.answers, examination.heads()
    portraits = []
    for position, row in enumerate(rows):
        said: dict[str, tuple[str, float | None]] = {"truth": (classes[int(answers.labels[row])], None)}
        if answers.teacher_predictions is not None:
            sure = None if answers.teacher_logits is None else float(answers.teacher_logits[row].softmax(-1).max())
            said["teacher"] = (classes[int(answers.teacher_predictions[row])], sure)
        for name, probabilities in predictors.items():
            sureness, label = probabilities[row].max(-1)
            said[name] = (classes[int(label)], float(sureness))
        own = slice(position, position + 1)
        portraits.append(
            Portrait(
                path=examination.photos.names[int(answers.indices[row])],
                image=(batch.images[position].cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy(),
                answers=said,
                attention=attention
                and TokenAttention(
                    attention.last_block[own], None if attention.rollout is None else attention.rollout[own]
                ),
            )
        )
    return portraits


def _attention(examination: Examination, batch: Batch) -> TokenAttention | None:
    tokens, backbone = _leading_tokens(examination), examination.student.backbone
    if not tokens or not blocks(backbone) or getattr(backbone, "cls_token", None) is None:  # no head reads registers
        return None
    # Fused attention does not keep its weights: use a copy of the model built with plain attention.
    config, classes = parts.with_attention(examination.config, "plain"), examination.matched.classes
    twin = load_student(examination.source, config, classes, examination.processes)
    return token_attention(twin.backbone, batch.images, tokens)


def _plain(portrait: Portrait) -> dict[str, Any]:
    return {
        "path": portrait.path,
        "answers": {name: {"class": label, "probability": sure} for name, (label, sure) in portrait.answers.items()},
        "attention": {
            token: {what: np.round(one.double().numpy(), 6).tolist() for what, one in maps.items()}
            for token, maps in portrait.maps().items()
        },
    }


def write_diagnosis(folder: Path, diagnosis: Diagnosis) -> None:
    """Write ``diagnosis.json`` and, in ``attention/``, each image beside the attention that it gets."""
    write_json(folder / DIAGNOSIS_FILE, diagnosis.numbers)
    (folder / ATTENTION_FOLDER).mkdir(exist_ok=True)
    for kind, portraits in zip(PICTURES, (diagnosis.gallery, diagnosis.disputed), strict=True):
        for number, portrait in enumerate(portraits, start=1):
            strip = image_png(side_by_side(list(portrait.panels().values())))
            write_atomically(folder / ATTENTION_FOLDER / f"{kind}-{number}.png", strip)


def remove_diagnosis(folder: Path) -> None:
    """Remove what `write_diagnosis` wrote, and nothing else."""
    (folder / DIAGNOSIS_FILE).unlink(missing_ok=True)
    pictures = folder / ATTENTION_FOLDER
    for kind in PICTURES:
        for picture in pictures.glob(f"{kind}-*.png"):
            picture.unlink()
    if pictures.is_dir() and not any(pictures.iterdir()):
        pictures.rmdir()


def tell_diagnosis(diagnosis: Diagnosis) -> None:
    """Print the cosines of the tokens, what the heads follow, and a warning if the tokens have collapsed."""
    numbers = diagnosis.numbers
    if numbers["tokens"]:
        cosines = "  ".join(f"{layer['layer']} {layer['mean']:.2f}" for layer in numbers["tokens"])
        say(f"cosine of the two tokens: {cosines}")
    if numbers["collapsed"]:
        say(
            f"warning: the two tokens are the same at the input (cosine {numbers['tokens'][0]['mean']:.4f}, above "
            f"{COLLAPSED}): the distillation token adds nothing; start it from values other than the class token's"
        )
    for head, counts in (numbers["followed"] or {}).items():
        say(
            f"where label and teacher disagree ({sum(counts.values())} images), {head} follows the label in "
            f"{counts['label']}, the teacher in {counts['teacher']}, neither in {counts['neither']}"
        )
