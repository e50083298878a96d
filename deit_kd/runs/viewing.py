"""The training views of a recipe: its photos, perhaps decoded in advance, and the loader that shows them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from deit_kd import data
from deit_kd.config import Config
from deit_kd.console import say, size_text
from deit_kd.data import CAN_SHARE, CHANNELS, PILLOW, PREFETCHED, Decoded, Photos, batches_ahead
from deit_kd.distributed import Processes, together
from deit_kd.interfaces import counted
from deit_kd.runs.photos import skips
from deit_kd.views import EXECUTOR_VERSION, Drawing, Executor, Transform, training_transform

FLOAT32 = 4  # bytes


def cached(config: Config, photos: Photos, processes: Processes) -> Photos:
    """Return training photos as the recipe's loader reads them: in its size and, if it has a cache, decoded.

    Where there are several processes, one of each machine decodes for all of them, in main memory.

    Raises:
        InputError: they do not fit, one of them cannot be read and ends the run, or no view of them could be made.
    """
    _making(config)  # what cannot be made is refused before anything is decoded
    decoder = data.decoder_named(config.data.decoder)
    cache, device = config.data.cache, processes.device
    photos = replace(photos, short_side=config.data.cache_size, decoder=decoder)
    if cache == "none" or photos.decoded is not None:
        return photos
    are_shared = CAN_SHARE and processes.count > 1
    neighbours = processes.of_this_machine()
    first = neighbours[0] if are_shared else processes.rank
    place = device if cache == "device" and not are_shared else torch.device("cpu")

    def decode() -> Decoded | None:
        if first != processes.rank:
            return None
        with processes.busy("decodes the photos"):
            return photos.cached(cache, place, skips(config), processes.is_main).decoded

    mine = together(processes, decode)
    found = processes.gather(None if mine is None else mine.without_pixels())[first]

    def received() -> Photos:
        assert found is not None
        decoded = found.with_shared_pixels() if mine is None else mine
        return replace(photos, decoded=decoded.on(device) if cache == "device" else decoded)

    kept = together(processes, received)
    if processes.is_main and kept.decoded is not None:
        size = size_text(len(kept.decoded.pixels))
        say(
            f"cache: {counted(len(kept), 'photo')} decoded, {size} "
            + ("in main memory" if cache == "memory" else "on the device")
        )
    return kept


def training_order(config: Config, photos: Photos, processes: Processes) -> data.TrainingBatchSampler:
    """Return which views this process computes in each step; no photo is read.

    Raises:
        InputError: the batch cannot be dealt evenly, or the set is smaller than one batch.
    """
    return data.TrainingBatchSampler(
        photos=len(photos),
        repeats=config.augment.repeats,
        seed=config.seed,
        batch_size=config.train.batch_size,
        accumulation_steps=config.train.accumulation_steps,
        rank=processes.rank,
        processes=processes.count,
        pairs=_mixing(config, len(photos.classes)).is_on,
        epochs=config.train.epochs,
    )


def build_training_loader(config: Config, photos: Photos, processes: Processes) -> data.TrainingLoader:
    """Return the loader of this process's training views.

    Raises:
        InputError: see `training_order`; or what it needs does not fit into memory.
    """
    section = config.data
    batch_sampler = training_order(config, photos, processes)
    mixing = _mixing(config, len(photos.classes))
    making, kept = _making(config), cached(config, photos, processes)
    ahead = _batches_ahead(config, kept, processes)
    if not isinstance(making, Drawing):
        views = data.Views(kept, making, config.seed, skips(config))
        has_gpu = processes.device.type == "cuda"
        return data.PillowLoader(views, batch_sampler, mixing, section.workers, pin_memory=has_gpu, ahead=ahead)
    executor = Executor(image_size=section.image_size, mean=section.mean, std=section.std, device=processes.device)
    if processes.is_main and processes.device.type == "cuda" and not executor.uses_kernels:
        say(
            "views: Triton cannot start its kernels here (it needs a C compiler and the headers of Python), so PyTorch "
            "makes them: the same bits, but slower"
        )
    return data.DeviceLoader(
        data.Draws(kept, making, config.seed, skips(config)),
        executor,
        batch_sampler,
        label_smoothing=mixing.label_smoothing,
        workers=section.workers,
        device=processes.device,
        ahead=ahead,
    )


def build_loader_of_all(config: Config, photos: Photos, processes: Processes) -> data.TrainingLoader:
    """Return a loader of all views of an epoch; the caller decides which of them a process loads."""
    return build_training_loader(config, photos, replace(processes, rank=0, count=1))


def _mixing(config: Config, classes: int) -> data.Mixing:
    augment = config.augment
    return data.Mixing(
        classes=classes,
        seed=config.seed,
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        probability=augment.mix_probability,
        switch_probability=augment.mix_switch_probability,
        label_smoothing=augment.label_smoothing,
    )


def _batches_ahead(config: Config, photos: Photos, processes: Processes) -> int:
    """Return how many batches each worker makes ahead, and say what they take.

    Raises:
        InputError: they do not fit into shared memory, or into ``data.prefetch_mb``.
    """
    section = config.data
    workers = section.workers
    needs_workers = section.executor == "pillow" or photos.decoded is None
    if not workers or not needs_workers:
        return PREFETCHED
    views = config.train.batch_size // (processes.count * config.train.accumulation_steps)
    pixels = section.image_size**2 * FLOAT32 if section.executor == "pillow" else photos.largest_pixels()
    batch_bytes = max(1, views) * CHANNELS * pixels
    loaders = len(processes.of_this_machine())
    ahead = together(processes, lambda: batches_ahead(batch_bytes, workers, loaders, section.prefetch_mb))
    if processes.is_main:
        each = (ahead + 1) * workers * batch_bytes
        say(f"workers: {workers} hold up to {(ahead + 1) * workers} batches, {size_text(each)} of shared memory")
    return ahead


def _making(config: Config) -> Transform | Drawing:
    """Return what makes the views: Pillow's transform, or what the device executor draws from.

    Raises:
        InputError: the policy is unknown, or one that only Pillow's views have.
    """
    section, augment = config.data, config.augment
    views: dict[str, Any] = {
        "image_size": section.image_size,
        "interpolation": section.interpolation,
        "auto_augment": augment.auto_augment,
        "color_jitter": augment.color_jitter,
        "horizontal_flip": augment.horizontal_flip,
        "scale": augment.scale,
        "ratio": augment.ratio,
        "erasing": augment.erasing,
    }
    if section.executor == "pillow":
        return training_transform(**views, mean=section.mean, std=section.std)
    return Drawing(
        **views,
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        mix_probability=augment.mix_probability,
        mix_switch_probability=augment.mix_switch_probability,
    )


def makers_of(config: Config) -> dict[str, str]:
    """Return what makes a recipe's views, by its keys in ``data``, with versions where a maker has its own.

    Raises:
        InputError: one is not installed.
    """
    executor = f"device {EXECUTOR_VERSION}" if config.data.executor == "device" else PILLOW.version
    return {"executor": executor, "decoder": data.decoder_named(config.data.decoder).version}
