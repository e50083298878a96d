"""Photos without labels: every image below a folder, for students that learn only from a teacher's features."""

from __future__ import annotations

import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from deit_kd.data.folder import check_encoding
from deit_kd.data.photos import UNLABELLED, Photos
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
    found = [Path(place) / name for place, _, names in os.walk(top, followlinks=True) for name in names]
    images = [path for path in found if path.name.lower().endswith(IMG_EXTENSIONS)]
    kept = [path for path in images if not held_out or path.resolve() not in held_out]
    names = sorted(path.relative_to(top).as_posix() for path in kept)
    if not names:
        raise InputError(
            f"data.unlabelled: {folder} has no images ({', '.join(IMG_EXTENSIONS)}) besides those of the validation "
            "split; name a folder with some"
        )
    for name in names:
        check_encoding("data.unlabelled", str(top / name))
    return Photos.of_files(top, names, [UNLABELLED] * len(names), validation.classes)


def _files_below(top: Path, photos: Photos) -> set[Path]:
    """Return the files of `photos`, if any of them can be below `top`."""
    if photos.root is None:
        return set()
    root, top = photos.root.resolve(), top.resolve()
    if not (root.is_relative_to(top) or top.is_relative_to(root)):
        return set()
    return {(root / name).resolve() for name in photos.names}
