"""Photos decoded once, in one buffer of host memory, which all processes of a machine share, or of a GPU's."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from deit_kd.console import console, size_text
from deit_kd.data.decode import UnreadableImage
from deit_kd.interfaces import InputError
from deit_kd.memory import available_memory

Made = TypeVar("Made")

CHANNELS = 3
CAN_SHARE = hasattr(os, "memfd_create")  # Linux; elsewhere, each process has its own copy


class SharedFile(NamedTuple):
    """Where other processes of a machine find memory of one that is still running."""

    path: str
    length: int  # bytes


@dataclass(frozen=True)
class Decoded:
    """Decoded photos, one after the other.

    Args:
        pixels: uint8 [bytes], of each photo [H, W, 3] in RGB; on any device.
        offsets: int64 [n], where each photo begins.
        heights: int64 [n], 0 for a photo that cannot be read.
        widths: int64 [n].
        unreadable: why each photo cannot be read, None where it can.
        shared: where other processes of this machine find the pixels; None if they cannot.
    """

    pixels: Tensor
    offsets: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    unreadable: Sequence[str | None]
    shared: SharedFile | None = None

    def image(self, index: int) -> Image.Image:
        """Return one photo as RGB.

        Raises:
            UnreadableImage: it could not be read.
        """
        return Image.fromarray(self.array(index))

    def array(self, index: int) -> np.ndarray:
        """Return the pixels of one photo, uint8 [H, W, 3], in host memory, without a copy if they are there.

        Raises:
            UnreadableImage: it could not be read.
        """
        reason = self.unreadable[index]
        if reason is not None:
            raise UnreadableImage(reason)
        offset, height, width = (int(values[index]) for values in (self.offsets, self.heights, self.widths))
        pixels = self.pixels[offset : offset + height * width * CHANNELS]
        return pixels.cpu().numpy().reshape(height, width, CHANNELS)

    def subset(self, indices: Sequence[int]) -> Decoded:
        """Return the photos at `indices`, in that order; their pixels stay where they are."""
        rows = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            offsets=self.offsets[rows],
            heights=self.heights[rows],
            widths=self.widths[rows],
            unreadable=[self.unreadable[index] for index in indices],
        )

    def on(self, device: torch.device) -> Decoded:
        """Return the same photos in a device's own memory.

        Raises:
            InputError: they do not fit.
        """
        if self.pixels.device.type == device.type:
            return self
        _refuse_what_does_not_fit("device", len(self.offsets), len(self.pixels), device)
        return replace(self, pixels=self.pixels.to(device), shared=None)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker that is not forked is sent: not the pixels, if it finds them itself."""
        return {**vars(self), "pixels": self.pixels if self.shared is None or not len(self.pixels) else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if state["pixels"] is None:
            vars(self)["pixels"] = self.with_shared_pixels().pixels

    def without_pixels(self) -> Decoded:
        """Return everything but the pixels, for another process of this machine."""
        return replace(self, pixels=torch.empty(0, dtype=torch.uint8))

    def with_shared_pixels(self) -> Decoded:
        """Return what another process sent `without_pixels` with its pixels, which stay in its memory.

        Raises:
            OSError: this process may not see them.
        """
        assert self.shared is not None
        path, length = self.shared
        try:
            return replace(self, pixels=torch.from_file(path, shared=True, size=length, dtype=torch.uint8))
        except RuntimeError as error:
            raise OSError(f"{path} cannot be mapped ({error})") from error


def decode_all(
    array_of: Callable[[int], np.ndarray],
    sizes: Sequence[tuple[int, int]],
    *,
    cache: str,
    place: torch.device,
    skip: bool,
    shown: bool,
) -> Decoded:
    """Decode every photo once, in threads.

    Args:
        array_of: returns the pixels of a photo, uint8 [H, W, 3].
        sizes: width and height of each photo, perhaps of the turned one; (0, 0) if it is not known to be readable.
        cache: ``memory`` or ``device``, for the message.
        place: where they are kept; processes of a machine share main memory.
        skip: whether a photo that cannot be read only fails when it is requested.
        shown: whether a terminal shows a progress bar.

    Raises:
        InputError: they do not fit.
        UnreadableImage: one of them cannot be read, unless `skip`.
    """
    ends = np.cumsum([width * height * CHANNELS for width, height in sizes], dtype=np.int64)
    needed = int(ends[-1])
    _refuse_what_does_not_fit(cache, len(sizes), needed, place)
    pixels, shared = _shared_bytes(needed) if place.type == "cpu" else (_bytes_on(place, needed), None)
    in_host_memory = pixels.numpy() if place.type == "cpu" else None  # torch would start threads for each of ours
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
    shapes = np.zeros((len(sizes), 2), dtype=np.int64)

    def decode(index: int) -> str | None:
        try:
            array = array_of(index)
        except UnreadableImage as error:
            if not skip:
                raise
            return str(error)
        own = slice(offsets[index], ends[index])
        if array.size != ends[index] - offsets[index]:
            raise InputError(f"data.cache: photo {index} was changed while it was in use; start again")
        if in_host_memory is not None:
            in_host_memory[own] = array.reshape(-1)
        else:
            pixels[own].copy_(torch.from_numpy(np.array(array).reshape(-1)))
        shapes[index] = array.shape[:2]
        return None

    unreadable = in_threads(decode, range(len(sizes)), "decoding", shown)
    return Decoded(pixels, offsets, shapes[:, 0], shapes[:, 1], unreadable, shared)


def in_threads(act: Callable[[int], Made], items: Sequence[int], words: str, shown: bool) -> list[Made]:
    """Return what `act` returns for each item; a terminal shows how far it is, if `shown`."""
    with ThreadPoolExecutor() as pool:
        done: Iterable[Made] = pool.map(act, items)
        return list(track(done, words, len(items), console=console, disable=not (shown and console.is_terminal)))


def _refuse_what_does_not_fit(cache: str, photos: int, needed: int, place: torch.device) -> None:
    available = available_memory(place)
    if needed > available:
        where = f"on {place}" if place.type != "cpu" else "in main memory"
        raise InputError(
            f"data.cache: {cache} needs {size_text(needed)} for {photos} photos, and {size_text(available)} are "
            f"available {where}; set a smaller data.cache_size, or data.cache none"
        )


def _bytes_on(device: torch.device, count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


def _shared_bytes(count: int) -> tuple[Tensor, SharedFile | None]:
    """Return host memory, and where other processes of this machine find it.

    It has no name of its own, so nothing is left behind however a process ends, and /dev/shm may be small.
    """
    if not CAN_SHARE or not count:
        return torch.empty(count, dtype=torch.uint8), None  # forked workers share it
    file = os.memfd_create("deit-kd-photos")
    path = f"/proc/{os.getpid()}/fd/{file}"
    os.truncate(file, count)
    pixels = torch.from_file(path, shared=True, size=count, dtype=torch.uint8)
    weakref.finalize(pixels, os.close, file)
    return pixels, SharedFile(path, count)
