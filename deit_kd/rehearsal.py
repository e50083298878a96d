"""A training step on tensors that have shapes but no values: what it would hold in memory, and that nothing waits."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deit_kd.engine import Trainer, ask, autocast
from deit_kd.interfaces import Batch, Missing


class Rehearsal:
    """A trainer's copy whose tensors have shapes and dtypes, but neither values nor memory.

    Whatever reads a value raises `torch._subclasses.fake_tensor.DataDependentOutputException`; on a GPU it would wait
    for the device. A copy between host and device is not noticed, since all tensors say that they are on the CPU.

    Args:
        trainer: as it is before its first step, or after any; neither wrapped in DDP nor compiled. It is not changed.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._mode = FakeTensorMode()
        averages = [learner.ema for learner in trainer.learners if learner.ema is not None]
        generators = [value for average in averages for value in vars(average).values()]
        shared = [trainer.processes, *(value for value in generators if isinstance(value, torch.Generator))]
        copies: dict[int, Any] = {id(value): value for value in shared}
        with FakeCopyMode(self._mode):
            self._trainer: Trainer = copy.deepcopy(trainer, copies)
        # A copy of an optimiser forgets that it reads from the device whether to leave out a step.
        for learner, copied in zip(trainer.learners, self._trainer.learners, strict=True):
            for name, value in vars(learner.optimizer).items():
                vars(copied.optimizer).setdefault(name, value)
            copied._has_stepped = True  # the first step alone may wait
        self._bytes = LiveBytes(found for found in copies.values() if isinstance(found, Tensor))

    @property
    def peak_bytes(self) -> int:
        """The most that its tensors have held at once."""
        return self._bytes.peak

    @property
    def bytes_now(self) -> int:
        """What its tensors hold now: between two steps weights, buffers, moments, the average and the teacher."""
        return self._bytes.now

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint would keep, see `Trainer.state`."""
        return self._trainer.state()

    def step(self, batches: Iterable[Batch], step: int = 0) -> None:
        """Do optimiser step `step` on its micro-batches, made by `batch`."""
        with self._mode, self._bytes:
            self._trainer.step(iter(batches), step)

    def evaluate(self, batch: Batch) -> None:
        """Answer a batch as an evaluation does, with every network that is scored."""
        with self._mode, self._bytes, torch.no_grad(), autocast(batch.images.device, self._trainer.distiller.precision):
            for network in self._trainer.weights().values():
                ask(network, batch.images)

    def batch(self, views: int, image_size: int, classes: int, missing: Sequence[Missing] = ()) -> Batch:
        """Return a batch of `views` images of `image_size` pixels."""
        with self._mode, self._bytes:
            labels = torch.zeros(views, dtype=torch.long)
            images = torch.zeros(views, 3, image_size, image_size)
            return Batch(images, torch.zeros(views, classes), labels, missing=missing)


class LiveBytes(TorchDispatchMode):
    """While it is on, counts the bytes of all tensors that operations return, until they are freed.

    Tensors that share memory count once, and those without values (`torch._subclasses.FakeTensor`) as if they had some.

    Args:
        tensors: that are alive already.
        block: bytes that an allocation is rounded up to; 512 is that of PyTorch's allocator on CUDA.
    """

    def __init__(self, tensors: Iterable[Tensor] = (), block: int = 512) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._block = block
        self._counted: weakref.WeakKeyDictionary[torch.UntypedStorage, None] = weakref.WeakKeyDictionary()
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(
        self, act: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and count what it returns."""
        result = act(*args, **(kwargs or {}))
        for found in tree_leaves(result):
            if isinstance(found, Tensor):
                self._count(found)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._counted:
            return
        self._counted[storage] = None
        size = -(-storage.nbytes() // self._block) * self._block
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.now -= size
