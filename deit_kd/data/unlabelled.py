"""Photos without labels: every image below a folder, for students that learn only from a teacher's features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from deit_kd.data.listing import Listing, list_images, stamps_of
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
    found = list_images(top, "", "data.unlabelled")
    kept = _rows_of_others(top, found, validation)
    if not kept:
        raise InputError(
            f"data.unlabelled: {folder} has no images ({', '.join(IMG_EXTENSIONS)}) besides those of the validation "
            "split; name a folder with some"
        )
    rows = np.array(sorted(kept, key=list(found.names).__getitem__))
    files = TreeFiles(found.sizes, found.changed_ns)
    return Photos(found.names.take(rows), np.full(len(rows), UNLABELLED), validation.classes, files, top, rows)


def _rows_of_others(top: Path, found: Listing, photos: Photos) -> list[int]:
    """Return the rows of what was found below `top` that are no files of `photos`, whatever links lead to them."""
    paths = [] if photos.root is None else [photos.root / name for name in photos.names]
    stamps = {tuple(stamp) for stamp in stamps_of([str(path) for path in paths]).tolist()}
    seen = zip(found.sizes.tolist(), found.changed_ns.tolist(), strict=True)
    alike = [row for row, stamp in enumerate(seen) if stamp in stamps]  # only their links are followed
    files = {path.resolve() for path in paths} if alike else set()
    known = {row for row in alike if (top / found.names[row]).resolve() in files}
    return [row for row in range(len(found.names)) if row not in known]
