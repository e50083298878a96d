"""A few hundred photos: those of a folder, or smooth random images of natural sizes, saved as JPEG."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from bare_step import class_names
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from deit_kd.data import Photos
from deit_kd.interfaces import InputError
from on_gpu.setup import CLASSES

SHAPES = ((4, 3), (3, 4), (3, 2), (2, 3), (1, 1), (16, 9))  # width to height
GRAINS = ((5, 1.0), (30, 0.5), (180, 0.25))  # random values along the longer side, and their share of the contrast


def found(root: Path, count: int) -> Photos:
    """Return up to `count` photos below `root`, evenly spread.

    Raises:
        InputError: there are none.
    """
    names = sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.name.lower().endswith(IMG_EXTENSIONS)
    )
    if not names:
        raise InputError(f"--root: {root} has no images ({', '.join(IMG_EXTENSIONS)}); name a folder with some")
    count = min(count, len(names))
    return _in_classes(root, [names[index * len(names) // count] for index in range(count)])


def generated(root: Path, count: int, longest_side: int) -> Photos:
    """Write `count` JPEG files to `root` and return them."""
    names = [f"{index:04d}.jpg" for index in range(count)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(_write, root, longest_side), names))
    return _in_classes(root, names)


def _in_classes(root: Path, names: list[str]) -> Photos:
    labels = [index % CLASSES for index in range(len(names))]
    return Photos.of_files(root, names, labels, class_names(CLASSES))


def _write(root: Path, longest_side: int, name: str) -> None:
    """Write an image whose size and content depend on its name."""
    number = int(Path(name).stem)
    random = np.random.default_rng(number)
    shape = SHAPES[number % len(SHAPES)]
    size = tuple(round(longest_side * side / max(shape)) for side in shape)
    pixels = np.full((size[1], size[0], 3), 128.0)
    for values, contrast in GRAINS:
        grid = tuple(max(2, round(values * side / longest_side)) for side in size)
        grain = Image.fromarray(random.integers(0, 256, (grid[1], grid[0], 3), dtype=np.uint8)).resize(size)
        pixels += contrast * (np.asarray(grain, dtype=np.float64) - 127.5)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name, quality=90)
