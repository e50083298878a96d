"""How many photos a thread decodes with each decoder, as images and as arrays; the decoders take turns.

    python benchmarks/decoders.py --root PHOTOS
    python benchmarks/decoders.py --root PHOTOS --longer_side 500   # as large as ImageNet's

Times are CPU time, so that a busy machine disturbs them less.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from rich.table import Table

from deit_kd.console import console
from deit_kd.data import decoder_named, one_split

DECODERS = ("pillow", "torchcodec")


def main() -> None:
    """Print photos per second of CPU time, and the ratio of torchcodec to Pillow in each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder with one folder of photos for each class")
    parser.add_argument("--photos", type=int, default=500, help="number of photos, spread over the tree")
    parser.add_argument("--longer_side", type=int, default=None, help="bring photos to this size first (JPEG, 90)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each decoder has its turn")
    given = parser.parse_args()
    torch.set_num_threads(1)
    files = photos(given.root, given.photos, given.longer_side)
    pixels = [np.prod(size) for size in (Image.open(io.BytesIO(file)).size for file in files)]
    console.print(f"{len(files)} photos, {np.mean(pixels):.0f} pixels and {np.mean([*map(len, files)]):.0f} bytes each")
    table = Table("result", *DECODERS, "ratio", "lowest", "highest")
    for kind in ("image", "array"):
        acts = [getattr(decoder_named(name), kind) for name in DECODERS]
        rates = np.array([measured(acts, files, backwards=bool(turn % 2)) for turn in range(given.rounds)])
        ratios = rates[:, 1] / rates[:, 0]
        medians = np.median(rates, axis=0)
        found = (np.median(ratios), ratios.min(), ratios.max())
        table.add_row(kind, *(f"{rate:.0f}" for rate in medians), *(f"{ratio:.2f}" for ratio in found))
    console.print(table)


def photos(root: str, count: int, longer_side: int | None) -> list[bytes]:
    """Return the bytes of photos spread over a tree, perhaps brought to another size."""
    found = one_split(name="folder", root=root, split=".")
    chosen = np.linspace(0, len(found) - 1, min(count, len(found))).astype(int).tolist()
    if longer_side is None:
        return [found.content(index) for index in chosen]
    return [resized(found.image(index), longer_side) for index in chosen]


def resized(image: Image.Image, longer_side: int) -> bytes:
    """Return an image at another size as JPEG."""
    scale, file = longer_side / max(image.size), io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale))).save(file, "JPEG", quality=90)
    return file.getvalue()


def measured(acts: list[Callable[[io.BytesIO, str], object]], files: list[bytes], backwards: bool) -> list[float]:
    """Return the photos per second of each act, one after the other."""
    rates = dict.fromkeys(range(len(acts)), 0.0)
    for turn in sorted(rates, reverse=backwards):
        started = time.thread_time()
        for file in files:
            acts[turn](io.BytesIO(file), "a photo")
        rates[turn] = len(files) / (time.thread_time() - started)
    return list(rates.values())


if __name__ == "__main__":
    main()
