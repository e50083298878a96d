"""Compares the executor's Triton kernels with its reference; runs under ``TRITON_INTERPRET=1``, in its own process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime import interpreter

from deit_kd.views import executor as executor_module
from deit_kd.views import reference
from tests.executed import buffer, drawn, executor, photos

PATCH = interpreter._patch_lang_tensor
CASES = (("rand-m9-n8-p1.0-mstd0.5-inc1", 15, torch.bfloat16), ("3a", 5, torch.float32))


def patched(tensor: Any, *scope: Any) -> None:
    """Do as Triton; but Triton 3.6 takes the int of an array [1], which numpy 2.5 refuses."""
    PATCH(tensor, *scope)
    tensor.__index__ = lambda number: number.handle.data.item()


def made(policy: str, operations: int, dtype: torch.dtype, by_kernels: bool) -> Tensor:
    """Return 8 views of 13 px with all `operations` of a policy."""
    which, rows = drawn(8, auto_augment=policy, image_size=13, erasing=0.5)
    assert len(set(rows.operations.flat)) == operations
    chosen = executor(image_size=13, dtype=dtype)
    assert chosen.uses_kernels == by_kernels
    return chosen(buffer(photos()), which, rows)


interpreter._patch_lang_tensor = patched
by_kernels = [made(*case, by_kernels=True) for case in CASES]
executor_module._primitives = lambda device: reference
assert all(torch.equal(made(*case, by_kernels=False), views) for case, views in zip(CASES, by_kernels, strict=True))
print("same bits")
