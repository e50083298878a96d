"""Photos without labels: every image below a folder, for students that learn only from a teacher's features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from deit_kd.data.listing import list_images
from deit_kd.data.photos import UNLABELLED, Photos
from deit_kd.data.source import TreeFiles
from deit_kd.interfaces import InputError


def unlabelled_photos(folder: str, validation: Photos) -> Photos:
    """Return every image below `folder`, by name, with the classes of `validation` and none of its photos.

    Raises:
        InputError: there is no such folder, or it holds no other image.
    """
    top = Path(folder).expanduser()
    if not top.is_dir():
        raise InputError(f"data.unlabelled: {folder} is not a folder; name one with images")
    held_out = _files_below(top, validation)
    found = list_images(top, "", "data.unlabelled")
    kept = [row for row, name in enumerate(found.names) if not held_out or (top / name).resolve() not in held_out]
    if not kept:
        raise InputError(
            f"data.unlabelled: {folder} has no images ({', '.join(IMG_EXTENSIONS)}) besides those of the validation "
            "split; name a folder with some"
        )
    rows = np.array(sorted(kept, key=list(found.names).__getitem__))
    files = TreeFiles(found.sizes, found.changed_ns)
    return Photos(found.names.take(rows), np.full(len(rows), UNLABELLED), validation.classes, files, top, rows)


def _files_below(top: Path, photos: Photos) -> set[Path]:
    """Return the files of `photos`, if any of them can be below `top`."""
    if photos.root is None:
        return set()
    root, top = photos.root.resolve(), top.resolve()
    if not (root.is_relative_to(top) or top.is_relative_to(root)):
        return set()
    return {(root / name).resolve() for name in photos.names}
