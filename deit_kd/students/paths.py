"""Stochastic depth (Huang et al., arXiv 1603.09382) that is drawn at once before a forward pass, and given to it.

A compiled forward pass then contains no generator: eager or compiled, a student drops the same paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class _Kept:
    """The factors [P, B] of one forward pass, cast once to each dtype that a path asks for."""

    def __init__(self, drawn: Tensor) -> None:
        self._drawn = drawn
        self._cast = {drawn.dtype: drawn}

    def factor(self, path: int, branch: Tensor) -> Tensor:
        """Return the factor of each view, [B, 1, …], for a `branch` [B, …]."""
        if branch.dtype not in self._cast:
            self._cast[branch.dtype] = self._drawn.to(branch.dtype)
        return self._cast[branch.dtype][path].view(-1, *[1] * (branch.ndim - 1))


class GivenPath(DropPath):
    """timm's drop-path, which also takes its choices from outside; without them it draws as timm's does.

    Args:
        own: timm's, whose rate it has.
        paths: that it decides upon, in the order of its calls.
    """

    def __init__(self, own: DropPath, paths: Sequence[int]) -> None:
        super().__init__(own.drop_prob, own.scale_by_keep)
        self.paths = tuple(paths)
        self.kept: _Kept | None = None  # within a forward pass
        self._calls = 0
        self.train(own.training)

    def give(self, kept: _Kept | None) -> None:
        """Take the choices of the forward pass that begins, or forget those of the one that has ended."""
        self.kept, self._calls = kept, 0

    def forward(self, branch: Tensor) -> Tensor:
        """Return `branch` [B, …], of each view either 0 or divided by the rate of being kept."""
        if not self.training or self.kept is None:
            dropped: Tensor = super().forward(branch)
            return dropped
        path = self.paths[self._calls]
        self._calls += 1
        return branch * self.kept.factor(path, branch)


class DropPaths:
    """All paths of a network that training drops at random.

    Args:
        modules: of the network.
        owners: of the attribute ``grad_checkpointing`` of timm. A layer that is computed again for its backward pass
            must draw by itself, since timm repeats only what PyTorch's generator drew.
    """

    def __init__(self, modules: Sequence[GivenPath] = (), owners: Sequence[nn.Module] = ()) -> None:
        self._modules = tuple(modules)
        self._owners = tuple(owners)
        rates = {path: module for module in self._modules for path in module.paths}
        self._keep = [1 - rates[path].drop_prob for path in sorted(rates)]
        self._scale = [1 - rates[path].drop_prob if rates[path].scale_by_keep else 1.0 for path in sorted(rates)]

    def draw(self, views: int, device: torch.device) -> Tensor | None:
        """Return the factors [P, B] of the paths of B `views`, from PyTorch's generator of `device`, in fp32.

        Each is 1 / keep with the probability keep, and 0 otherwise. None if there are no paths, or each has to draw by
        itself.
        """
        if not self._keep or any(owner.grad_checkpointing for owner in self._owners):
            return None
        drawn = torch.rand(len(self._keep), views, device=device)
        paths = list(drawn.unbind())
        torch._foreach_sub_(paths, self._keep)
        drawn.lt_(0)
        torch._foreach_div_(paths, self._scale)
        return drawn

    @contextmanager
    def given(self, drawn: Tensor | None) -> Iterator[None]:
        """Let the network take what `draw` returned meanwhile; None lets every path draw by itself."""
        if drawn is None:
            yield
            return
        kept = _Kept(drawn)
        for module in self._modules:
            module.give(kept)
        try:
            yield
        finally:
            for module in self._modules:
                module.give(None)


@contextmanager
def found_paths(backbone: nn.Module) -> Iterator[Callable[[], DropPaths]]:
    """Watch a forward pass of two views; then call what this yields to let `backbone` take its choices from outside.

    A path whose input does not begin with the views (TNT drops those of its patches) stays timm's own.
    """
    calls: dict[str, list[int]] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, given: calls.setdefault(name, []).append(len(given[0]))

    known = {name: module for name, module in backbone.named_modules() if type(module) is DropPath and module.drop_prob}
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in known.items()]
    try:
        yield lambda: _replaced(backbone, known, calls)
    finally:
        for hook in hooks:
            hook.remove()


def _replaced(backbone: nn.Module, known: Mapping[str, DropPath], calls: Mapping[str, Sequence[int]]) -> DropPaths:
    modules: list[GivenPath] = []
    paths = 0
    for name, views in calls.items():
        if set(views) == {2}:
            modules.append(GivenPath(known[name], range(paths, paths + len(views))))
            backbone.set_submodule(name, modules[-1])
            paths += len(views)
    return DropPaths(modules, [module for module in backbone.modules() if hasattr(module, "grad_checkpointing")])
