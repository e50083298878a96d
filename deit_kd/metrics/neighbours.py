"""Classification of an image by the nearest neighbours of its vector."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_NEIGHBOURS = 20
TEMPERATURE = 0.07  # of a neighbour's vote
ROWS = 1024  # of similarities in memory at a time


def neighbours_among(images: int) -> int:
    """Return the k of k-NN: DINO's 20 or, among fewer than 400 images, about the root of their number."""
    return max(1, min(MOST_NEIGHBOURS, round(math.sqrt(images))))


def neighbour_classes(known: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """Return the class [n] that the nearest neighbours of each vector vote for, by cosine similarity.

    Each of the k neighbours votes with exp(similarity / 0.07).

    Args:
        known: vectors [N, D].
        labels: their classes [N].
        asked: vectors [n, D].

    Source: Wu et al. 2018, arXiv 1805.01978, section 3.4; k and temperature of DINO, arXiv 2104.14294.
    """
    bank, queries = F.normalize(known.float(), dim=1), F.normalize(asked.float(), dim=1)
    neighbours = neighbours_among(len(bank))
    voted = [torch.empty(0, dtype=torch.long)]
    for rows in torch.arange(len(queries)).split(ROWS):
        near = (queries[rows] @ bank.T).topk(neighbours)
        votes = torch.zeros(len(rows), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[near.indices], (near.values / TEMPERATURE).exp())
        voted.append(votes.argmax(1))
    return torch.cat(voted)


def score_neighbours(known: Tensor, known_labels: Tensor, asked: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return in percent how often the known neighbours of a vector vote for its class, and the settings of k-NN.

    The arguments are those of `judge_features`.
    """
    right = neighbour_classes(known, known_labels, asked) == labels
    return {"knn": 100 * float(right.double().mean()), "images": len(known), **how_asked(len(known))}


def how_asked(images: int) -> dict[str, Any]:
    """Return the settings of k-NN among this number of images."""
    return {"neighbours": neighbours_among(images), "temperature": TEMPERATURE}
