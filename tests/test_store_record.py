"""One record of a label store: what comes back is what went in, as near as its size allows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deit_kd.losses import soft_distillation
from deit_kd.store import Record
from deit_kd.store.record import is_missing, is_whole


def logits(rows: int, classes: int, scale: float = 4.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("classes", "top", "size"),
    [
        (1000, 10, 44),
        (1000, 100, 404),
        (1000, 1000, 2000),
        (1000, 0, 2),
        (21841, 10, 44),
        (10, 10, 20),
        (10, 50, 20),
        (10, 3, 16),
        (2**15 + 1, 0, 4),
        (2**15 + 1, 10, 64),
    ],
)
def test_a_record_takes_4k_and_4_bytes_or_less(classes: int, top: int, size: int) -> None:
    assert Record(classes, top).bytes_per_view == size


def test_by_hand_the_rest_shares_its_mass_evenly() -> None:
    asked = torch.tensor([[2.0, 5.0, 1.0, 1.0, math.log(2 * math.e)]])  # the rest: e + e + 2e = 4e
    record = Record(classes=5, top=2)
    answered = record.decode(record.encode(asked))
    share = math.log(4 * math.e / 3) - 5
    torch.testing.assert_close(answered, torch.tensor([[-3.0, 0.0, share, share, share]]))


ROWS = st.lists(st.lists(st.floats(-60, 60, width=32), min_size=6, max_size=6), min_size=1, max_size=5)


@settings(deadline=None, derandomize=True)
@given(ROWS, st.integers(0, 7))
def test_the_argmax_is_what_it_was(rows: list[list[float]], top: int) -> None:
    asked = torch.tensor(rows)
    record = Record(classes=6, top=top)
    assert torch.equal(record.decode(record.encode(asked)).argmax(-1), asked.argmax(-1))


@pytest.mark.parametrize("top", [0, 1, 2, 5, 6])
def test_a_tie_is_broken_as_it_was(top: int) -> None:
    asked = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 3.0], [0.0] * 6, [7.0, 7.0 + 1e-6, 7.0, 7.0, 7.0, 7.0]])
    record = Record(classes=6, top=top)
    assert torch.equal(record.decode(record.encode(asked)).argmax(-1), asked.argmax(-1))


@settings(deadline=None, derandomize=True)
@given(ROWS, st.integers(1, 5))
def test_the_mass_of_the_rest_holds_unless_it_would_outweigh_a_kept_class(rows: list[list[float]], top: int) -> None:
    asked = torch.tensor(rows)
    record = Record(classes=6, top=top)
    columns = record.encode(asked)
    answered = record.decode(columns)
    kept = torch.zeros_like(asked, dtype=torch.bool).scatter_(1, columns["classes"].long(), True)
    relative = asked - asked.max(-1, keepdim=True)[0]
    mass = relative.masked_fill(kept, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(answered.masked_fill(kept, -torch.inf).logsumexp(-1), mass, atol=0.02, rtol=1e-3)
    assert (answered[~kept].view(len(asked), -1) <= answered.gather(1, columns["classes"].long()[:, -1:])).all()


@pytest.mark.parametrize("top", [3, 20])
def test_kept_logits_are_within_fp16_rounding(top: int) -> None:
    asked = logits(100, 20)
    record = Record(classes=20, top=top)
    columns = record.encode(asked)
    relative = asked - asked.max(-1, keepdim=True)[0]
    assert (record.gap(columns, asked) <= 2.0**-11 * relative.abs().max(-1)[0] + 2.0**-24).all()


@pytest.mark.parametrize(
    ("column", "other"), [("logits", "logits"), ("rest", "logits"), ("dense", "dense"), ("pooled", "pooled")]
)
def test_a_column_of_another_answer_is_found_and_no_other(column: str, other: str) -> None:
    record = Record(classes=20, top=3, grid=(2, 2), width=8)
    answer = logits(100, 20), torch.arange(400).view(100, 2, 2) % 20, logits(100, 8)
    columns = record.encode(*answer)
    assert all(gap.share < 1e-3 for gap in record.gaps(columns, *answer).values())
    columns[column] = columns[column].roll(1, 0)
    found = {name: gap.share for name, gap in record.gaps(columns, *answer).items()}
    assert [name for name, share in found.items() if share > 0.05] == [other]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_all_logits_give_the_soft_loss_of_the_teacher_itself(temperature: float) -> None:
    teacher, student = logits(50, 10), logits(50, 10, seed=1)
    record = Record(classes=10, top=10)
    torch.testing.assert_close(
        soft_distillation(student, record.decode(record.encode(teacher)), temperature),
        soft_distillation(student, teacher, temperature),
        rtol=2e-3,
        atol=2e-3,
    )


def test_more_kept_logits_are_never_further_from_the_teacher() -> None:
    teacher = logits(200, 100)
    for temperature in (1.0, 2.0, 4.0):
        gaps = [
            float(
                soft_distillation(
                    Record(100, top).decode(Record(100, top).encode(teacher)), teacher, temperature
                ).mean()
            )
            for top in (1, 5, 10, 50, 100)
        ]
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[-1] < 1e-4


def test_a_hard_label_comes_back_as_a_distribution_of_one_class() -> None:
    record = Record(classes=4, top=0)
    answered = record.decode(record.encode(torch.tensor([[1.0, 4.0, 2.0, 3.0]])))
    assert torch.equal(answered.softmax(-1), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("top", [0, 2, 6])
@pytest.mark.parametrize(
    ("value", "whole"), [(math.nan, False), (math.inf, False), (-math.inf, True), (1e30, True), (-1e30, True)]
)
def test_an_answer_that_is_not_finite_is_no_record(top: int, value: float, whole: bool) -> None:
    asked = logits(3, 6)
    asked[1, 4] = value
    columns = Record(classes=6, top=top).encode(asked)
    assert is_whole(columns) is whole
    if whole:
        assert Record(classes=6, top=top).decode(columns).isfinite().all()


def test_bf16_answers_are_recorded_from_fp32() -> None:
    asked = logits(20, 10).bfloat16()
    record = Record(classes=10, top=4)
    for column, other in zip(record.encode(asked).values(), record.encode(asked.float()).values(), strict=True):
        assert torch.equal(column, other)


def test_classes_of_places_and_vectors_are_columns_of_their_own() -> None:
    record = Record(1000, 0, grid=(7, 7), width=5)
    places, vectors = torch.randint(1000, (3, 7, 7)), torch.randn(3, 5)
    columns = record.encode(torch.randn(3, 1000), places, vectors)
    assert record.bytes_per_view == 2 + 98 + 10
    assert torch.equal(columns["dense"].long(), places)
    assert torch.equal(columns["pooled"], vectors.half())
    assert record.of_whole_images == Record(1000, 0)
    assert is_missing(record.missing(2)).all()
    assert is_whole(record.missing(2))


@pytest.mark.parametrize(
    ("name", "value", "what"), [("dense", -1, "whole"), ("dense", 9, "named"), ("pooled", 1e6, "whole")]
)
def test_a_place_without_a_class_or_a_vector_that_is_not_finite_is_no_record(
    name: str, value: float, what: str
) -> None:
    record = Record(9, 0, grid=(2, 2), width=3)
    further = {"dense": torch.zeros(2, 2, 2), "pooled": torch.zeros(2, 3)}
    further[name][1, 1] = value
    columns = record.encode(torch.zeros(2, 9), further["dense"], further["pooled"])
    assert (is_whole(columns), record.names_its_classes(columns)) == (what != "whole", what != "named" and value >= 0)
