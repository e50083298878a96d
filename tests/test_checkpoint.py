"""Checkpoints: what goes in comes out, broken ones are passed over, and only the newest stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deit_kd.checkpoint import BEST, CheckpointWriter, load_checkpoint, newest_checkpoint, save_checkpoint

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
tensors = st.builds(
    lambda shape, dtype, seed: torch.rand(shape, generator=torch.Generator().manual_seed(seed)).mul(9).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    dtypes,
    st.integers(0, 99),
)
leaves = tensors | st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text()
keys = st.text(max_size=5) | st.sampled_from(["tensor", "dict", "a.b", ""]) | st.integers(0, 9)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=st.dictionaries(keys, trees, max_size=4))
def test_what_goes_in_comes_out(tmp_path: Path, tree: Any) -> None:
    assert same(load_checkpoint(save_checkpoint(tmp_path, 1, tree, keep=1)), tree)


def test_tensors_that_are_strided_or_views_come_out(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    tree = {"transposed": base.t(), "part": base[1:, ::2], "channels_last": torch.rand(2, 3, 4, 5).permute(0, 3, 1, 2)}
    assert same(load_checkpoint(save_checkpoint(tmp_path, 1, tree, keep=1)), tree)


def test_an_optimizers_state_comes_out(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, optimizer.state_dict(), keep=1))
    optimizer.load_state_dict(loaded)
    assert optimizer.state[layer.weight]["step"] == 1


def three(folder: Path) -> list[Path]:
    return [save_checkpoint(folder, step, {"step": step, "x": torch.ones(5) * step}, keep=3) for step in (1, 2, 10)]


def newest_step(folder: Path) -> int:
    found, _ = newest_checkpoint(folder)
    return found.parts["step"]


def test_the_newest_checkpoint_is_that_of_the_largest_step(tmp_path: Path) -> None:
    three(tmp_path)
    found, skipped = newest_checkpoint(tmp_path)
    assert (found.parts["step"], skipped) == (10, [])


@pytest.mark.parametrize("folder", ["", "not-there"])
def test_no_checkpoint_is_none(tmp_path: Path, folder: str) -> None:
    assert newest_checkpoint(tmp_path / folder) == (None, [])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_checkpoint_is_passed_over(tmp_path: Path, share: float) -> None:
    newest = three(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[: int(share * newest.stat().st_size)])
    found, skipped = newest_checkpoint(tmp_path)
    assert found.parts["step"] == 2
    assert len(skipped) == 1
    assert newest.name in skipped[0]


@pytest.mark.parametrize("place", [0, 3, 20, 100, -1, -17])
def test_a_checkpoint_with_one_flipped_bit_is_passed_over(tmp_path: Path, place: int) -> None:
    newest = three(tmp_path)[-1]
    content = bytearray(newest.read_bytes())
    content[place] ^= 1
    newest.write_bytes(content)
    assert newest_step(tmp_path) == 2


def test_every_flipped_bit_is_seen_or_harmless(tmp_path: Path) -> None:
    path = three(tmp_path)[-1]
    whole, expected = path.read_bytes(), load_checkpoint(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            assert same(load_checkpoint(path), expected), f"byte {place}"
        except ValueError:
            continue


def test_a_file_that_was_being_written_is_no_checkpoint(tmp_path: Path) -> None:
    three(tmp_path)
    (tmp_path / ".step-000000011.safetensors.partial").write_bytes(b"half")
    assert newest_step(tmp_path) == 10


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_only_the_newest_stay(tmp_path: Path, keep: int) -> None:
    for step in range(8):
        save_checkpoint(tmp_path, step, {"step": step}, keep)
    steps = sorted(int(path.stem.removeprefix("step-")) for path in tmp_path.iterdir())
    assert steps == list(range(8 - keep, 8))


def test_the_best_stays_when_newer_ones_push_it_out(tmp_path: Path) -> None:
    for step, is_best in enumerate((False, True, False, False, True, False, False)):
        save_checkpoint(tmp_path, step, {"step": step}, keep=1, is_best=is_best)
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, "step-000000006.safetensors"]
    assert load_checkpoint(tmp_path / BEST)["step"] == 4


def test_a_damaged_checkpoint_of_a_later_step_pushes_nothing_out(tmp_path: Path) -> None:
    (tmp_path / "step-000000240.safetensors").write_bytes(b"half")
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step}, keep=1)
    assert newest_step(tmp_path) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_the_best_is_there_before_the_step_that_knows_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    save_checkpoint(tmp_path, 1, {"step": 1}, keep=2)
    monkeypatch.setattr("deit_kd.checkpoint.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, {"step": 2}, keep=2, is_best=True)
    assert newest_step(tmp_path) == 1


def test_a_checkpoint_holds_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    writer, weights = CheckpointWriter(tmp_path, keep=3), torch.zeros(1000, 1000)
    for step in range(3):
        writer.save(step, {"weights": weights, "also": [weights[0]]})
        weights += 1
    writer.close()
    for step, path in enumerate(sorted(tmp_path.iterdir())):
        found = load_checkpoint(path)
        assert (found["weights"] == step).all()
        assert (found["also"][0] == step).all()


def test_a_checkpoint_that_could_not_be_written_is_said_when_it_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file stands where the folder should be")
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=1)
    writer.save(1, {"step": 1})
    with pytest.raises(OSError, match="File exists"):
        writer.wait()
    writer.close()
