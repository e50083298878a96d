"""Which kernels compute on CUDA: convolutions by their speed, attention by its error against fp32 and its speed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from deit_kd.machine import seconds_of

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ROUNDS = 5  # of each backend; the fastest counts


def choose_kernels(device: torch.device, deterministic: bool) -> None:
    """Let cuDNN choose convolutions by measuring them, or, if `deterministic`, let every run compute the same bits.

    A run's batches have a fixed size, so each convolution is measured once; the choice may differ from run to run.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True, warn_only=True)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()


class Measured(NamedTuple):
    """One attention backend, on random queries, keys and values."""

    error: float  # of the output: the norm of the difference from fp32, over the norm of the latter
    gradient_error: float  # the largest among the gradients of queries, keys and values
    seconds: float  # forward and backward


def attention_shape(answer: Callable[[], Any]) -> torch.Size | None:
    """Return the shape [B, heads, N, D] of the queries of the first fused attention while `answer` runs, if any."""
    watch = _Watch()
    with watch, torch.no_grad():
        answer()
    return watch.shape


class _Watch(TorchFunctionMode):
    shape: torch.Size | None = None

    def __torch_function__(
        self, act: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if act is scaled_dot_product_attention and self.shape is None:
            self.shape = args[0].shape
        return act(*args, **(kwargs or {}))


def measure_attention(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> dict[str, Measured]:
    """Return each backend that takes queries of `shape` [B, heads, N, D] in `dtype`, with its errors and its time.

    With torch's deterministic algorithms on, only those that are.

    The real length matters: a backend may be wrong at lengths that are not a multiple of its tile.
    """
    chance = torch.Generator(device).manual_seed(0)
    given = [torch.randn(shape, generator=chance, device=device).to(dtype) for _ in range(4)]
    with sdpa_kernel(SDPBackend.MATH):
        exact = _attended([tensor.float() for tensor in given])
    found = {}
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend), _warning_always(), warnings.catch_warnings():
                # A backend that is not deterministic only warns of it; others warn of why they do not take the shape.
                warnings.simplefilter("error" if torch.are_deterministic_algorithms_enabled() else "ignore")
                errors = [_error(*pair) for pair in zip(_attended(given), exact, strict=True)]
                seconds = min(seconds_of(lambda: _attended(given), device) for _ in range(ROUNDS))
        except (RuntimeError, UserWarning):
            continue
        found[name] = Measured(errors[0], max(errors[1:]), seconds)
    return found


@contextmanager
def _warning_always() -> Iterator[None]:
    """Within the context, torch repeats a warning: otherwise a backend says only once that it is not deterministic."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        yield
    finally:
        torch.set_warn_always(before)


def _attended(given: list[Tensor]) -> list[Tensor]:
    """Return the output of attention, and the gradients of queries, keys and values; all [B, heads, N, D]."""
    queries, keys, values, upstream = (tensor.detach().requires_grad_() for tensor in given)
    output = scaled_dot_product_attention(queries, keys, values)
    return [output.detach(), *torch.autograd.grad(output, (queries, keys, values), upstream)]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def best_attention(measured: Mapping[str, Measured], dtype: torch.dtype) -> str:
    """Return the fastest backend whose errors are those of rounding to `dtype`; ``math`` if there is none.

    One wrong row among 198 is an error of 0.07; rounding to bf16 is one below 0.01.
    """
    limit = max(2 * torch.finfo(dtype).eps, 1e-5)  # NaN is not below it
    right = {name: row for name, row in measured.items() if row.error <= limit and row.gradient_error <= limit}
    return min(right, key=lambda name: right[name].seconds, default="math")


def preferred_attention(name: str | None) -> AbstractContextManager[Any]:
    """Use one backend meanwhile, and ``math`` for what it does not take; None leaves the choice to PyTorch."""
    return nullcontext() if name is None else sdpa_kernel([BACKENDS[name], SDPBackend.MATH])
