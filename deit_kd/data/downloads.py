"""Datasets that torchvision can download: Imagenette, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision import datasets

from deit_kd.data.folder import folder
from deit_kd.data.photos import Photos, Splits
from deit_kd.interfaces import InputError


def imagenette(*, root: str | None, download: bool, validation_fraction: float, **_: Any) -> Splits:
    """Return Imagenette at full size; its classes are WordNet ids."""
    home = _home(root, "imagenette")
    is_there = (home / "imagenette2").is_dir()
    _fetch(home, lambda: datasets.Imagenette(home, split="train", download=download and not is_there))
    return folder(
        root=str(home / "imagenette2"),
        train_split="train",
        validation_split="val",
        validation_fraction=validation_fraction,
    )


def cifar10(*, root: str | None, download: bool, **_: Any) -> Splits:
    """Return CIFAR-10."""
    return _cifar(datasets.CIFAR10, _home(root, "cifar10"), download)


def cifar100(*, root: str | None, download: bool, **_: Any) -> Splits:
    """Return CIFAR-100."""
    return _cifar(datasets.CIFAR100, _home(root, "cifar100"), download)


def _cifar(dataset: Any, home: Path, download: bool) -> Splits:
    def part(train: bool) -> Photos:
        loaded = _fetch(home, lambda: dataset(home, train=train, download=download))
        return Photos.of_arrays(
            names=[f"{'train' if train else 'test'}/{index:05d}" for index in range(len(loaded.targets))],
            labels=list(loaded.targets),
            classes=tuple(loaded.classes),
            arrays=loaded.data,
        )

    return Splits(part(True), part(False))


def _home(root: str | None, name: str) -> Path:
    if root is None:
        raise InputError(f"data.root: is not set; name the folder that holds {name} or that it should be downloaded to")
    return Path(root).expanduser()


def _fetch(home: Path, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0].partition(". You can use download=True")[0]
        raise InputError(
            f"data.root: {home}: {reason}; set --data.download true on a machine with network access"
        ) from error
