"""Compares the executor's Triton kernels with its reference; runs under ``TRITON_INTERPRET=1``, in its own process."""

from __future__ import annotations

import torch
from torch import Tensor

from deit_kd.views import executor as executor_module
from deit_kd.views import reference
from tests.executed import buffer, drawn, executor, photos

CASES = (("rand-m9-n8-p1.0-mstd0.5-inc1", 15, torch.bfloat16), ("3a", 5, torch.float32))


def made(policy: str, operations: int, dtype: torch.dtype, by_kernels: bool) -> Tensor:
    """Return 8 views of 13 px with all `operations` of a policy."""
    which, rows = drawn(8, auto_augment=policy, image_size=13, erasing=0.5)
    assert len(set(rows.operations.flat)) == operations
    chosen = executor(image_size=13, dtype=dtype)
    assert chosen.uses_kernels == by_kernels
    return chosen(buffer(photos()), which, rows)


by_kernels = [made(*case, by_kernels=True) for case in CASES]
executor_module._primitives = lambda device: reference
assert all(torch.equal(made(*case, by_kernels=False), views) for case, views in zip(CASES, by_kernels, strict=True))
print("same bits")
