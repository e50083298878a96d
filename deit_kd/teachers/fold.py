"""Batch norms folded into the convolutions before them, so that a frozen network has fewer layers to run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from deit_kd.interfaces import InputError

CONVOLUTIONS = (nn.Conv2d, Conv2dSame)  # themselves: others compute with something else than their weight


@torch.no_grad()
def fold_batch_norms(name: str, network: nn.Module, image_size: int) -> int:
    """Fold each BatchNorm2d of a network in eval mode into the convolution whose output it alone reads.

    Args:
        name: of the network, for errors.
        network: changed in place; a folded norm leaves its dropout and activation, if it has some (timm's
            ``BatchNormAct2d``).
        image_size: pixels.

    Returns:
        How many norms are folded.

    Raises:
        InputError: none can be folded, or the network answers differently afterwards.
    """
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    pairs, before = _pairs(network, images)
    if not pairs:
        raise InputError(f"teacher.fold: {name} has no BatchNorm after a convolution; leave it out")
    names = {module: path for path, module in network.named_modules()}
    for convolution, norm in pairs:
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
        network.set_submodule(names[norm], nn.Sequential(*rest) if rest else nn.Identity())
    if not torch.allclose(network(images), before, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        raise InputError(f"teacher.fold: {name} answers differently once its norms are folded; leave it out")
    return len(pairs)


def _pairs(network: nn.Module, images: Tensor) -> tuple[list[tuple[Any, Any]], Tensor]:
    """Return each convolution with the norm that reads its output, both called once, and the network's answer."""
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensors are kept, so that no other takes the place of one
    pairs: list[tuple[Any, Any]] = []
    calls: Counter[nn.Module] = Counter()

    def note_convolution(module: nn.Module, _: Any, output: Tensor) -> None:
        calls[module] += 1
        outputs[id(output)] = module, output

    def note_norm(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        calls[module] += 1
        if id(given[0]) in outputs:
            pairs.append((outputs[id(given[0])][0], module))

    hooks = [
        module.register_forward_hook(note_convolution) for module in network.modules() if type(module) in CONVOLUTIONS
    ]
    hooks += [
        module.register_forward_pre_hook(note_norm)
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
    ]
    answer: Tensor = network(images)
    for hook in hooks:
        hook.remove()
    return [pair for pair in pairs if all(calls[module] == 1 for module in pair)], answer
