"""The least time that a step's operations can take, from their FLOPs and bytes and the measured rates of a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from on_gpu.card import Card

UPDATES = ("_fused_adam", "_fused_sgd", "_foreach_", "lerp")  # of weights, moments and the average
WITHOUT_TRAFFIC = ("empty", "new_empty")


class Floor(TorchDispatchMode):
    """While it is on, adds up the least seconds of all operations: the longer of FLOPs and traffic over their rates.

    An operation's traffic is every tensor that it takes and every tensor that it returns or changes, once each, as if
    the card had no cache and no two operations shared a kernel. Products are matrix products, convolutions and
    attention; updates are those of the optimiser and the average, and clipping.

    Args:
        card: its measured rates.
    """

    def __init__(self, card: Card) -> None:
        super().__init__()
        self._card = card
        self.products = self.updates = self.others = 0.0  # seconds
        self.flops = self.bytes = 0

    @property
    def seconds(self) -> float:
        """The floor of a step: products and updates, with everything else done within their kernels."""
        return self.products + self.updates

    @property
    def unfused_seconds(self) -> float:
        """The floor of the same operations one by one, as they run without a compiler."""
        return self.seconds + self.others

    def __torch_dispatch__(
        self, act: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and count it."""
        result = act(*args, **(kwargs or {}))
        if isinstance(act, OpOverload):
            self._count(act, args, kwargs or {}, result)
        return result

    def _count(self, act: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        packet = act.overloadpacket
        count: Callable[..., int] | None = flop_registry.get(packet)
        flops = 0 if count is None else count(*args, **kwargs, out_val=result)
        traffic = _traffic(act, (args, dict(kwargs)), result)
        seconds = max(flops / self._card.matmul_rate, traffic / self._card.bandwidth)
        self.flops, self.bytes = self.flops + flops, self.bytes + traffic
        if flops:
            self.products += seconds
        elif packet.__name__.startswith(UPDATES):
            self.updates += seconds
        else:
            self.others += seconds


def _traffic(act: OpOverload, given: Any, result: Any) -> int:
    """Return the bytes that an operation must read and write; a view moves none."""
    if act.overloadpacket.__name__.startswith(WITHOUT_TRAFFIC):
        return 0
    read, returned = _tensors(given), _tensors(result)
    memory = {_memory(tensor) for tensor in read.values()}
    new = {key: tensor for key, tensor in returned.items() if _memory(tensor) not in memory}
    changed = _tensors(_written(act, given))
    if not new and not changed:
        return 0
    return sum(_bytes(tensor) for group in (read, new, changed) for tensor in group.values())


def _written(act: OpOverload, given: Any) -> list[Any]:
    args, kwargs = given
    schema = act._schema.arguments
    values = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
    changed = [argument.name for argument in schema if argument.alias_info and argument.alias_info.is_write]
    return [values.get(name) for name in changed]


def _tensors(tree: Any) -> dict[int, Tensor]:
    return {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
