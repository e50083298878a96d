"""Signals that end a run, and processes that stall: all stop after the same step, and none waits forever."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from deit_kd.interfaces import Stopped
from deit_kd.interrupts import EXIT_CODES, handlers, raise_pending, stopped_by
from deit_kd.signs import GONE, Signs, no_progress

if TYPE_CHECKING:  # the command line needs the signals without waiting for torch
    from deit_kd.distributed import Processes

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_AGREE = 20.0
SECONDS_OF_ONE_INTERRUPT = 1.0  # torchrun forwards the interrupt that the terminal has already sent to all

Item = TypeVar("Item")


class Watch:
    """Lets all processes of a run stop after the same step, and ends them when one of them makes no progress.

    A thread that never touches the device passes a signal from any process to all others through the process group's
    store. Each process then announces the step that it has begun, and begins no other until all have announced theirs;
    all stop after the last of these steps. A second SIGINT ends the process at once.

    Use it as a context manager around the training loop, in the main thread. A signal that the loop did not act on is
    raised at the end.

    Args:
        processes: of the run.
        step: steps done before.
        timeout: seconds without progress of a process after which all end; 0 waits forever. A process that announces
            its work may take any time.
    """

    _opened = 0

    def __init__(self, processes: Processes, step: int, timeout: float) -> None:
        self._processes, self._timeout = processes, timeout
        self._begun = step + 1
        self._signal: int | None = None
        self._interrupted = 0.0
        self._lock = threading.Lock()
        self._said = False  # whether it has announced the step that it has begun
        self._last_step: int | None = None
        self._agreed = threading.Event()
        self._closed = threading.Event()
        self._beats, self._told = 0, -1  # signs of progress, and how many of them the others know of
        self._seen: dict[int, tuple[int, float]] = {}  # by rank: beats, and when they last changed
        Watch._opened += 1  # the same in every process, so that a later watch does not read an earlier one's entries
        self._prefix = f"watch/{Watch._opened}"
        self._thread = threading.Thread(target=self._look_now_and_then, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        raise_pending()
        self._handlers = handlers(self._hear)
        self._handlers.__enter__()
        if self._processes.count > 1:
            import torch.distributed as dist

            store: Any = dist.distributed_c10d._get_default_store()
            self.connect(store.clone() if hasattr(store, "clone") else store)
            self._thread.start()
        return self

    def connect(self, store: Any) -> None:
        """Use a store, which no other thread may use, to signal through."""
        self._store, self._signs = store, Signs(store, self._processes.rank)
        self._lookout = self._signs.lookout(self._key("stalled"))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._handlers.__exit__(None, None, None)
        if kind is None and self._signal is not None:  # it came after the last question
            raise stopped_by(self._signal)

    @property
    def signal(self) -> int | None:
        """The signal that any process received, as far as this one knows."""
        return self._signal

    def beat(self) -> None:
        """Give a sign of progress."""
        self._beats += 1

    def may_go_on(self, step: int) -> bool:
        """Return whether to begin another step after `step` are done; the same in every process."""
        raise_pending()
        self.beat()
        if self._processes.count == 1:
            return self._signal is None
        with self._lock:
            if not self._said:
                self._begun = step + 1
                return True
        if not self._agreed.wait(SECONDS_TO_AGREE) or self._last_step is None:
            raise Stopped(GONE, 1)
        return step < self._last_step

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`, each a sign of progress."""
        for item in items:
            self.beat()
            yield item

    def until_signal(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`, each a sign of progress, and stop once a signal was received, but after at least one.

        A sum over processes afterwards then has something to add in each of them.
        """
        for item in self.over(items):
            yield item
            if self._signal is not None:
                return

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            again = time.monotonic() - self._interrupted
            handed_on = "TORCHELASTIC_RUN_ID" in os.environ and again < SECONDS_OF_ONE_INTERRUPT
            if self._interrupted and not handed_on:
                os._exit(EXIT_CODES[signal.SIGINT])
            self._interrupted = self._interrupted or time.monotonic()
        self._signal = number

    def _look_now_and_then(self) -> None:
        while not self._closed.wait(SECONDS_BETWEEN_LOOKS):
            try:
                self.look()
            except RuntimeError:  # the store is gone, and so is the process that held it
                self._agreed.set()
                self._end_if_stuck()
                return

    def look(self) -> None:
        """Tell the others what happened here, and do what they have agreed on; twice a second in a thread."""
        self._agree()
        self._look_for_gone()
        if self._timeout:
            self._look_for_stalled()

    def _agree(self) -> None:
        if self._signal is None and self._store.check([self._key("signal")]):
            self._signal = int(self._store.get(self._key("signal")))
        if self._signal is not None and not self._said:
            self._store.set(self._key("signal"), str(int(self._signal)))
            with self._lock:
                self._said = True
            self._store.set(self._key(f"begun/{self._processes.rank}"), str(self._begun))
        begun = [self._key(f"begun/{rank}") for rank in range(self._processes.count)]
        if self._said and self._last_step is None and self._store.check(begun):
            self._last_step = max(map(int, self._store.multi_get(begun)))
            self._agreed.set()

    def _look_for_gone(self) -> None:
        """End this process if another has ended and a collective that waits for it does not notice."""
        if self._signs.one_has_failed():
            self._end_if_stuck()

    def _end_if_stuck(self) -> None:
        """End this process unless its main thread notices in a while that another has ended."""
        # The main thread may notice, and the main process has a checkpoint to write.
        if not self._closed.wait(SECONDS_TO_AGREE if self._processes.is_main else 4 * SECONDS_BETWEEN_LOOKS):
            print(GONE, file=sys.stderr, flush=True)
            with suppress(RuntimeError):  # the store may be gone
                self._signs.leave()
            os._exit(1)

    def _look_for_stalled(self) -> None:
        if self._told != self._beats:
            self._told = self._beats
            self._signs.beat(self._told)
        is_lookout = self._lookout.is_mine()
        if is_lookout and self._lookout.late is None and (late := self._stalled()) is not None:
            self._lookout.tell(late)
        if self._lookout.late is None:
            return
        print(f"error: {no_progress(self._lookout.late, self._timeout)}", file=sys.stderr, flush=True)
        if is_lookout or self._processes.rank == self._lookout.late:
            time.sleep(4 * SECONDS_BETWEEN_LOOKS)  # give the others time to read and to print it, too
        os._exit(1)

    def _stalled(self) -> int | None:
        """Return the process that stopped making progress first, if none makes any.

        A process that waits for another makes no progress either, but is not the cause.
        """
        said, now = self._signs.of_all(self._processes.count), time.monotonic()
        if said is None:
            return None
        for rank, (beats, work) in enumerate(zip(said.beats, said.works, strict=True)):
            if rank not in self._seen or self._seen[rank][0] != beats or work:
                self._seen[rank] = beats, now
        if any(now - since < self._timeout for _, since in self._seen.values()):
            return None
        return min(self._seen, key=lambda rank: self._seen[rank])  # it has given the fewest signs
