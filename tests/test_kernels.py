"""Kernels that are chosen on CUDA; the same measurements run on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from deit_kd import kernels
from deit_kd.config import parse_config
from deit_kd.kernels import (
    Measured,
    attention_shape,
    best_attention,
    choose_kernels,
    measure_attention,
    preferred_attention,
)
from deit_kd.models.create import chosen_attention
from deit_kd.runs.attention import attention_line, attention_of, measured_attention
from deit_kd.runs.run import prepare
from tests.helpers import ONE_PROCESS, tiny
from tests.tiny_parts import Operations, make_batch, tiny_student

CPU = torch.device("cpu")
ODD_LENGTH = torch.Size([2, 3, 198, 64])
RIGHT, SLOW = Measured(0.002, 0.003, 1.0), Measured(0.002, 0.003, 3.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_at_an_odd_length_is_as_exact_as_its_dtype(dtype: torch.dtype) -> None:
    found = measure_attention(ODD_LENGTH, dtype, CPU)
    assert {"flash", "math"} <= found.keys()
    assert best_attention(found, dtype) in found
    for row in found.values():
        assert max(row.error, row.gradient_error) < max(2 * torch.finfo(dtype).eps, 1e-5)
        assert row.seconds > 0


def test_backends_that_warn_once_are_heard_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    def attended(given: list[torch.Tensor]) -> list[torch.Tensor]:
        heard.append(torch.is_warn_always_enabled())
        return given

    monkeypatch.setattr(kernels, "_attended", attended)
    measure_attention(torch.Size([1, 1, 2, 2]), torch.float32, CPU)
    assert all(heard[1:])
    assert not torch.is_warn_always_enabled()


def test_one_wrong_row_is_an_error_beyond_that_of_rounding() -> None:
    exact = torch.randn(ODD_LENGTH)
    wrong = exact.clone()
    wrong[:, :, -1] = 0
    assert float((wrong - exact).norm() / exact.norm()) > 4 * 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ({"flash": SLOW, "cudnn": RIGHT, "math": SLOW}, "cudnn"),
        ({"flash": SLOW, "cudnn": Measured(0.002, 0.07, 1.0), "math": SLOW._replace(seconds=9.0)}, "flash"),
        ({"flash": SLOW, "cudnn": Measured(math.nan, math.nan, 1.0)}, "flash"),
        ({"cudnn": Measured(0.07, 0.07, 1.0)}, "math"),
        ({}, "math"),
    ],
    ids=["the fastest", "not the fastest with a wrong gradient", "not one with NaN", "no right one", "none"],
)
def test_the_fastest_right_attention_is_chosen(measured: dict[str, Measured], best: str) -> None:
    assert best_attention(measured, torch.bfloat16) == best


@pytest.mark.parametrize(("choice", "shape"), [("fused", (8, 2, 6, 16)), ("plain", None)])
def test_the_shape_of_attention_is_the_students_own(choice: str, shape: tuple[int, ...] | None) -> None:
    with chosen_attention(choice, CPU):
        student = tiny_student()
    assert attention_shape(lambda: student(make_batch(8).images)) == (None if shape is None else torch.Size(shape))


@pytest.mark.parametrize(("name", "kernel"), [("flash", 1), ("math", 0), (None, 1)])
def test_a_preferred_attention_is_used(name: str | None, kernel: int) -> None:
    given = [torch.randn(2, 2, 6, 16) for _ in range(3)]
    with preferred_attention(name), Operations() as operations:
        scaled_dot_product_attention(*given)
    assert operations.counts["_scaled_dot_product_flash_attention_for_cpu"] == kernel


def test_a_run_measures_its_students_attention_and_chooses_nothing_on_the_cpu(
    photos_root: Path, tmp_path: Path
) -> None:
    options = {"train__attention": "fused", "train__precision": "bf16", "distill__kind": "none"}
    run = prepare(parse_config(tiny(photos_root, tmp_path / "run", **options))[0], ONE_PROCESS)
    found = measured_attention(run)
    assert found is not None
    assert found["shape"] == [8, 2, 5, 16]
    assert found["kernel"] in found["measured"]
    assert f"attention: {found['kernel']} at 5 tokens" in attention_line(found)
    assert run.student.training
    assert attention_of(run, is_resumed=False) is None


@pytest.fixture
def _as_before() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("deterministic", [True, False])
def test_cudnn_measures_convolutions_unless_a_run_is_deterministic(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    choose_kernels(torch.device("cuda"), deterministic)
    assert torch.backends.cudnn.benchmark is not deterministic
    assert torch.are_deterministic_algorithms_enabled() is deterministic
