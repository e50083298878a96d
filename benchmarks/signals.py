"""What the processes of a run ask of their store, and how long it takes, for several numbers of processes.

    python benchmarks/signals.py --processes 8 64 256

Each process is a thread with a connection of its own to one TCPStore, and does what a process does while it trains
(`stopping.Watch`: twice a second) and when all wait for one another (`Processes.wait`). They share this machine's cores
and Python's lock, so the times are upper bounds.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deit_kd.distributed import Processes
from deit_kd.signs import Signs
from deit_kd.stopping import SECONDS_BETWEEN_LOOKS, Watch

TIMEOUT = 600.0  # train.timeout_seconds
SECONDS_LATE = 3.0


class Counting:
    """A connection to a store that counts what it is asked for."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.requests = 0

    def __getattr__(self, name: str) -> Any:
        ask = getattr(self._store, name)

        def count(*arguments: Any) -> Any:
            self.requests += 1
            return ask(*arguments)

        return count


class Asked(NamedTuple):
    """What one number of processes asked for."""

    processes: int
    requests_per_second: float  # while they train
    requests_to_meet: int  # in one meeting that all come to at once
    seconds_to_meet: float
    requests_per_second_of_waiting: float  # while all wait for one
    looks_per_second: float  # of one process while they train; 2 unless the store is saturated


def simulate(count: int, seconds: float) -> Asked:
    """Return what `count` processes ask for in `seconds` of training, and in two meetings."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    stores = [Counting(server.clone()) for _ in range(count)]
    processes = [Processes(rank, count, torch.device("cpu"), TIMEOUT) for rank in range(count)]
    signs = [Signs(store, rank) for rank, store in enumerate(stores)]
    for each in signs:
        each.begin()
    watches = []
    for process, store in zip(processes, stores, strict=True):
        Watch._opened = 0  # all are the first watch of their process
        watches.append(Watch(process, 0, TIMEOUT))
        watches[-1].connect(store)
    looks = [0] * count

    def train(rank: int) -> None:
        last = time.monotonic() + seconds
        while (since := time.monotonic()) < last:
            watches[rank].beat()
            watches[rank].look()
            looks[rank] += 1
            time.sleep(max(0.0, SECONDS_BETWEEN_LOOKS - time.monotonic() + since))

    def meet(rank: int) -> None:
        processes[rank].meet(signs[rank], 1)

    def meet_late(rank: int) -> None:
        time.sleep(SECONDS_LATE * (rank == count - 1))
        processes[rank].meet(signs[rank], 2)

    trained, took = _asked(stores, train)
    met, seconds_to_meet = _asked(stores, meet)
    waited, of_waiting = _asked(stores, meet_late)
    return Asked(count, trained / took, met, seconds_to_meet, waited / of_waiting, sum(looks) / count / took)


def _asked(stores: list[Counting], act: Callable[[int], None]) -> tuple[int, float]:
    """Let every process act; return how many requests that took, and how many seconds."""
    before, since = sum(store.requests for store in stores), time.monotonic()
    threads = [threading.Thread(target=act, args=(rank,)) for rank in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(store.requests for store in stores) - before, time.monotonic() - since


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    print("| processes | requests/s | looks/s of each | requests of a meeting | its seconds | requests/s of waiting |")
    print("|---|---|---|---|---|---|")
    for count in arguments.processes:
        asked = simulate(count, arguments.seconds)
        print(
            f"| {asked.processes} | {asked.requests_per_second:.0f} | {asked.looks_per_second:.2f} | "
            f"{asked.requests_to_meet} | {asked.seconds_to_meet:.2f} | {asked.requests_per_second_of_waiting:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
