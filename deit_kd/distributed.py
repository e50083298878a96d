"""The processes of one run under torchrun, and the little that they tell one another."""

from __future__ import annotations

import ctypes
import datetime
import itertools
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from deit_kd.interfaces import InputError, Stopped
from deit_kd.interrupts import leave_signals_alone, raise_pending
from deit_kd.signs import GONE, Signs, no_progress

SECONDS_TO_MEET = 600.0
SECONDS_BEFORE_A_LINE = 30.0  # about a wait; the next line comes after twice as long
SECONDS_OF_A_COLLECTIVE = 86400.0  # a backstop: `Processes.wait` and `stopping.Watch` end long waits
SECONDS_TO_LEAVE = 10.0
LONGEST_PAUSE = 0.2

Answer = TypeVar("Answer")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many, and the device that it computes on.

    When they communicate (`share`, `gather`, `wait`), a process may take any time, as long as it has announced its work
    (`busy`).
    """

    rank: int
    count: int
    device: torch.device
    timeout: float = 0.0  # seconds that the others wait for a process that is not busy; 0 waits forever
    _meetings: Iterator[int] = field(default_factory=lambda: itertools.count(1), repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all processes."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, value: Item) -> Item:
        """Return the main process's `value` on every process."""
        if self.count == 1:
            return value
        self.wait()
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Item) -> list[Item]:
        """Return every process's `value`, by rank, on every process."""
        if self.count == 1:
            return [value]
        self.wait()
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
        """Wait for all other processes, and print now and then which one is late.

        Collectives time out, so call this first if a process may be late.

        Raises:
            Stopped: another process has ended, or is not busy and does not arrive within `timeout`.
        """
        if self.count == 1:
            return
        try:
            self.meet(Signs(_group_store(), self.rank), next(self._meetings))
        except dist.DistError as error:  # the store is gone, and so is the process that held it
            raise Stopped(GONE, 1) from error

    def meet(self, signs: Signs, meeting: int) -> None:
        """Wait for all others at a meeting, counted from 1; see `wait`."""
        signs.arrive(meeting)
        lookout = signs.lookout(f"meeting/{meeting}")
        since = last_sign = time.monotonic()
        seen: list[tuple[int, int, str]] = []
        pause, next_line = 0.001, SECONDS_BEFORE_A_LINE
        while not signs.all_have_arrived(meeting, self.count):
            if lookout.late is not None:
                raise Stopped(no_progress(lookout.late, self.timeout), 1)
            if signs.one_has_failed():
                raise Stopped(GONE, 1)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            if pause < LONGEST_PAUSE or not lookout.is_mine() or (said := signs.of_all(self.count)) is None:
                continue
            now, before = time.monotonic(), seen
            seen = [(r, said.beats[r], said.works[r]) for r in range(self.count) if said.meetings[r] < meeting]
            if not seen:
                continue
            if seen != before or any(work for _, _, work in seen):
                last_sign = now
            late, _, work = seen[0]
            if self.timeout and now - last_sign > self.timeout:
                lookout.tell(late)
                time.sleep(4 * LONGEST_PAUSE)  # until all have read it; this process may hold the store
            elif now - since > next_line:
                what = f", which {work}" if work else ""
                print(f"waiting for process {late}{what} ({now - since:.0f} s so far)", file=sys.stderr, flush=True)
                next_line *= 2

    @contextmanager
    def busy(self, work: str) -> Iterator[None]:
        """Announce the work that takes this process long: the others wait for it without a limit, and print it.

        Args:
            work: what it does, such as "reads the photos".

        Raises:
            Stopped: a signal was dropped before, see `interrupts`.
        """
        raise_pending()
        if self.count == 1:
            yield
            return
        signs = Signs(_group_store(), self.rank)
        before = signs.work()
        signs.work_on(work)
        try:
            yield
        finally:
            with suppress(dist.DistError):
                signs.work_on(before)

    def busy_over(self, work: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`, busy with `work` until there are no more."""
        with self.busy(work):
            for item in items:
                raise_pending()
                yield item

    def first_of_machine(self, key: str) -> bool:
        """Return whether this process is the first of its machine to ask for `key`."""
        return self.count == 1 or Signs(_group_store(), self.rank).is_first(f"{this_machine()}/{key}")

    def of_this_machine(self) -> list[int]:
        """Return the ranks of this machine's processes; all of them must ask."""
        mine = this_machine()
        return [rank for rank, machine in enumerate(self.gather(mine)) if machine == mine]


def this_machine() -> str:
    """Return the name of this machine, whose processes share memory: ``DEIT_KD_MACHINE``, or else its host name."""
    return os.environ.get("DEIT_KD_MACHINE") or socket.gethostname()


def on_main(processes: Processes, act: Callable[[], Answer], work: str = "") -> Answer | None:
    """Let the main process `act` while the others wait; without a limit if `work` says what it does.

    An InputError or a full disk there ends all processes; only the main one prints why.
    """
    answer, refusal = None, None
    if processes.is_main:
        try:
            with processes.busy(work):
                answer = act()
        except (InputError, OSError) as error:
            refusal = error
    _end_all(processes, processes.share(refusal))
    return answer


def from_main(processes: Processes, act: Callable[[], Answer], work: str = "") -> Answer:
    """Return on every process what `act` returns on the main one, see `on_main`."""
    answer = on_main(processes, act, work)
    return cast(Answer, processes.share(answer))


def together(processes: Processes, act: Callable[[], Answer]) -> Answer:
    """Let every process `act`; an error in any of them ends all, and the main process prints why, and in which."""
    answer: Any = None
    refusal = None
    try:
        answer = act()
    except (InputError, OSError) as error:
        refusal = error
    refusals = [(rank, error) for rank, error in enumerate(processes.gather(refusal)) if error is not None]
    if refusals:
        rank, first = refusals[0]
        of_another = rank and isinstance(first, InputError)
        _end_all(processes, InputError(f"{first} (process {rank})") if of_another else first)
    return answer


def _end_all(processes: Processes, refusal: Exception | None) -> None:
    if refusal is not None:
        raise refusal if processes.is_main else Stopped("", 2)


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; ``auto`` is CUDA if there is a device, else the CPU.

    Raises:
        InputError: CUDA is asked for and there is none, or the name is not a device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"train.device: {name!r} is not a device; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"train.device: {name!r}, but this machine has no CUDA device; use auto or cpu")
    return device


def _keep_freed_memory() -> None:
    """Let glibc keep freed activations instead of returning them to the system and faulting them in again.

    It costs nothing and makes a DeiT-Ti step on the CPU about a sixth faster (docs/evidence/performance.md). It has no
    effect without glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mmap_threshold, trim_threshold = -3, -1  # names of parameters in malloc.h
    mallopt(mmap_threshold, 32 * 2**20)  # the largest value that glibc accepts
    mallopt(trim_threshold, 2**31 - 1)


def start(device_name: str, timeout: float = 0.0) -> Processes:
    """Join the process group that torchrun describes; without torchrun, be the only process.

    Args:
        device_name: see `pick_device`.
        timeout: seconds that a process may make the others wait unannounced, see `Processes.wait` and `stopping.Watch`;
            0 waits forever.
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
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_fresh_store(rank, count),
            rank=rank,
            world_size=count,
            timeout=datetime.timedelta(seconds=SECONDS_OF_A_COLLECTIVE),
        )
    if count > 1:
        Signs(_group_store(), rank).begin()
    return Processes(rank, count, device, timeout)


def _fresh_store(rank: int, count: int) -> dist.Store:
    """Return a store for this attempt of the run.

    torchrun may keep one store across restarts, with the addresses of lost processes. Each process therefore writes a
    new random word, and the main process answers it with the name of the attempt, until every process has taken that
    name.

    Raises:
        Stopped: a process does not arrive.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, count))
    word, last, pause = uuid.uuid4().hex, time.monotonic() + SECONDS_TO_MEET, 0.02
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
        time.sleep(pause)
        pause = min(1.1 * pause, LONGEST_PAUSE)
    return dist.PrefixStore(attempt, store)


def _group_store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def lost_process(error: RuntimeError) -> Stopped | None:
    """Return the end of a run whose collective failed because another process died; None for any other `error`."""
    said_by_collective = any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer"))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Stopped(GONE, 1) if several and (said_by_collective or isinstance(error, dist.DistError)) else None


def finish() -> None:
    """Leave the process group, if there is one, the main process last; a process that fails only tells the others.

    It stays in the group until `end_failed`: to destroy a group is for all its processes together, and waits for
    collectives that the others may never join. The reason of the failure would be told after that, or never.
    """
    if not is_in_group():
        return
    signs = Signs(_group_store(), dist.get_rank())
    has_failed = sys.exc_info()[0] is not None
    with suppress(dist.DistError):
        if has_failed:
            signs.fail()
        signs.leave()
        if not has_failed:
            _wait_for_the_rest(signs)
    if not has_failed:
        dist.destroy_process_group()


def end_failed(code: int) -> None:
    """End the program here, with the exit `code`, if it has failed within a group; the main process last.

    What is to be told has been told. The usual end of a program would destroy the group as well, see `finish`.
    """
    if not is_in_group():
        return
    leave_signals_alone()
    with suppress(dist.DistError):
        _wait_for_the_rest(Signs(_group_store(), dist.get_rank()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_in_group() -> bool:
    """Return whether this process is in a process group, which one that fails never leaves, see `finish`."""
    return dist.is_available() and dist.is_initialized()


@contextmanager
def process_group(device_name: str, timeout: float = 0.0) -> Iterator[Processes]:
    """Be in the process group from `start` to `finish`; the arguments are those of `start`."""
    raise_pending()  # the imports are over, and work begins
    processes = start(device_name, timeout)
    try:
        yield processes
    finally:
        finish()


def _wait_for_the_rest(signs: Signs) -> None:
    """Let the main process, which may hold the store, wait a moment for processes that still read it."""
    last = time.monotonic() + SECONDS_TO_LEAVE
    others = range(1, dist.get_world_size())
    while dist.get_rank() == 0 and not signs.have_left(others) and time.monotonic() < last:
        time.sleep(0.02)
