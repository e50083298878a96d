"""The processes of one run under torchrun, and the few things they say to one another."""

from __future__ import annotations

import ctypes
import datetime
import os
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deit_kd.interfaces import InputError, Stopped

SECONDS_TO_MEET = 600.0

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many, and the device that it computes on."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the person."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all processes."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, value: Any) -> Any:
        """Return the main process's `value` on every process."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every process's `value`, by rank, on every process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def same_everywhere(self, value: Any) -> bool:
        """Return whether every process holds the same `value`."""
        return all(other == value for other in self.gather(value))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors` with the main process's."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Wait for all the others."""
        if self.count > 1:
            dist.barrier()


def on_main(processes: Processes, act: Callable[[], Answer]) -> Answer | None:
    """Let the main process `act` while the others wait; what it refuses, all of them refuse."""
    answer, refusal = None, None
    if processes.is_main:
        try:
            answer = act()
        except InputError as error:
            refusal = str(error)
    refusal = processes.share(refusal)
    if refusal is not None:
        raise InputError(refusal)
    return answer


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        InputError: CUDA is asked for and there is none, or the name is no device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"train.device: {name!r} is no device; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"train.device: {name!r}, but this machine has no CUDA device; use auto or cpu")
    return device


def _keep_freed_memory() -> None:
    """Let glibc keep freed activations instead of returning them to the system and faulting them in again.

    Costs nothing and gives a DeiT-Ti step on the CPU about a sixth (docs/performance.md); elsewhere than on
    glibc, nothing happens.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mmap_threshold, trim_threshold = -3, -1  # names of parameters in malloc.h
    mallopt(mmap_threshold, 32 * 2**20)  # the largest that glibc takes
    mallopt(trim_threshold, 2**31 - 1)


def start(device_name: str, timeout: float = 0.0) -> Processes:
    """Join the process group that torchrun describes; without torchrun, be the only process.

    Args:
        device_name: see `pick_device`.
        timeout: seconds that one may make the others wait, which `stopping.Watch` looks after; a minute later
            a process that still waits gives up. 0 is torch's own.
    """
    device = pick_device(device_name)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()
    if count > 1 and not dist.is_initialized():
        patience = datetime.timedelta(seconds=timeout + 60) if timeout else None
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_fresh_store(rank, count),
            rank=rank,
            world_size=count,
            timeout=patience,
        )
    return Processes(rank, count, device)


def _fresh_store(rank: int, count: int) -> dist.Store:
    """Return a store for this attempt of the run.

    torchrun may keep one store over restarts; the addresses that lost processes left there would be called again.
    Each process therefore says a word that is new, and the main one answers it with the name of the attempt, until
    every one has taken that name.

    Raises:
        Stopped: a process does not come.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, count))
    word, last = uuid.uuid4().hex, time.monotonic() + SECONDS_TO_MEET
    attempt, missing = (word, set(range(1, count))) if rank == 0 else ("", {rank})
    if rank:
        store.set(f"word/{rank}", word)
    while missing:
        if time.monotonic() > last:
            raise Stopped(f"processes did not meet within {SECONDS_TO_MEET} s (process {min(missing)} is missing)", 1)
        for other in tuple(missing):
            if rank == 0:
                if _read(store, f"taken/{other}") == attempt:
                    missing.remove(other)
                elif their_word := _read(store, f"word/{other}"):
                    store.set(f"answer/{other}", their_word + attempt)
            elif (answer := _read(store, f"answer/{rank}")).startswith(word):
                attempt = answer.removeprefix(word)
                store.set(f"taken/{rank}", attempt)
                missing.clear()
        time.sleep(0.02)
    return dist.PrefixStore(attempt, store)


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def names_lost_process(error: RuntimeError) -> bool:
    """Return whether a collective failed because another process has died or makes no progress."""
    of_torch = isinstance(error, dist.DistError)
    return of_torch or any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer"))


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
