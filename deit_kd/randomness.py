"""Every random choice is a pure function of named integers, so nothing random is ever stored."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

# The version of what follows from a seed: the photo at each position, and the randomness of a view. 2: the rounds of
# repeated views are shuffled, a teacher's fit has its own views, and a store's epochs show all photos equally often.
VIEWS_VERSION = 2
# The version of what drop-path drops. 2: drawn for all paths at once, before the forward pass.
PATHS_VERSION = 2


def derive(stream: str, *integers: int) -> int:
    """Return a 64-bit seed from the name of a stream and the integers that index it.

    The same on every machine and in every process (BLAKE2b), and independent between streams.
    """
    key = f"{stream}:{','.join(map(str, integers))}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def generator(stream: str, *integers: int) -> np.random.Generator:
    """Return a numpy generator for the choices of one stream, e.g. the order of an epoch."""
    return np.random.Generator(np.random.PCG64(derive(stream, *integers)))


def seed_view(seed: int, epoch: int, position: int) -> None:
    """Seed the three generators that timm's and torchvision's transforms draw from, for one view."""
    view_seed = derive("view", seed, epoch, position)
    random.seed(view_seed)
    np.random.seed(view_seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(view_seed)


def seed_step(seed: int, step: int, micro_step: int, rank: int, peer: int = 0) -> None:
    """Seed drop-path and dropout of one forward pass, on every device; peers of the student count from 1."""
    of_peer = (peer,) if peer else ()  # the student draws as it does without peers
    torch.manual_seed(derive("step", seed, step, micro_step, rank, *of_peer))


def seed_initialisation(stream: str, seed: int) -> None:
    """Seed the initial weights of one network, the same on every rank."""
    torch.manual_seed(derive(f"initialisation of {stream}", seed))
