"""A label store is read ahead of the steps: the same answers and the same errors, and no step waits for a disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deit_kd.interfaces import Batch, InputError, Missing, TeacherOutput
from deit_kd.store import Checksums, LabelStore, StoredTeacher, epoch_part
from deit_kd.store.ahead import BATCHES
from tests.tiny_parts import STORED_CLASSES, STORED_VIEWS, begin_store, fill_store, store_answers

SECONDS = 60.0
EPOCHS = (0, 1, 0)  # of a run over two stored epochs
MAIN = "MainThread"


def block(epoch: int, *positions: int) -> Tensor:
    return torch.tensor([[epoch, position] for position in positions]).reshape(-1, 2)


def blocks() -> list[Tensor]:
    return [block(epoch, *range(start, start + 4)) for epoch in EPOCHS for start in range(0, STORED_VIEWS, 4)]


def batch_of(view_ids: Tensor, *missing: Missing) -> Batch:
    size = len(view_ids)
    return Batch(torch.zeros(size, 3, 2, 2), torch.zeros(size, STORED_CLASSES), torch.zeros(size), view_ids, missing)


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    store = begin_store(tmp_path / "store")
    for epoch in range(3):
        fill_store(store, epoch)
    return LabelStore(store.folder)


def reader_of(store: LabelStore) -> StoredTeacher:
    return StoredTeacher(store, 2, Checksums(store, is_mine=lambda part: True))


class Calls:
    """What a method of every store was called with and in which thread, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.seen: list[tuple[str, Any]] = []
        self._more = threading.Condition()
        plain: Callable[..., Any] = getattr(LabelStore, method)

        def noting(store: LabelStore, asked: Any, *options: Any, **named: Any) -> Any:
            with self._more:
                self.seen.append((threading.current_thread().name, asked))
                self._more.notify()
            return plain(store, asked, *options, **named)

        monkeypatch.setattr(LabelStore, method, noting)

    def wait_for(self, count: int) -> None:
        with self._more:
            assert self._more.wait_for(lambda: len(self.seen) >= count, SECONDS), self.seen

    def threads(self) -> list[str]:
        return [thread.partition("_")[0] for thread, _ in self.seen]


@pytest.mark.parametrize("top", [0, 3, 6])
def test_answers_that_were_read_ahead_are_those_of_the_store(tmp_path: Path, top: int) -> None:
    store = begin_store(tmp_path, top)
    fill_store(store, 0)
    fill_store(store, 1)
    teacher = StoredTeacher(store, 2)
    with teacher.reading_ahead(blocks(), EPOCHS, pinned=False):
        answered = [teacher(batch_of(ids)).logits for ids in blocks()]
    asked = [store_answers(int(ids[0, 0]))[ids[:, 1]] for ids in blocks()]
    for own, logits in zip(answered, asked, strict=True):
        assert torch.equal(own, store.record.decode(store.record.encode(logits)))


def test_records_are_read_before_they_are_asked_for_and_never_where_the_step_is(
    store: LabelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, teacher = Calls(monkeypatch, "find"), reader_of(store)
    with teacher.reading_ahead(blocks(), EPOCHS, pinned=False):
        teacher(batch_of(blocks()[0]))
        found.wait_for(BATCHES + 1)
        for ids in blocks()[1:]:
            teacher(batch_of(ids))
    assert [ids.tolist() for _, ids in found.seen] == [ids.tolist() for ids in blocks()]
    assert set(found.threads()) == {"store-records"}


def test_the_next_epoch_is_compared_with_its_checksum_while_this_one_teaches(
    store: LabelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, teacher = Calls(monkeypatch, "verify"), reader_of(store)
    with teacher.reading_ahead(blocks(), EPOCHS, pinned=False):
        teacher(batch_of(blocks()[0]))
        compared.wait_for(2)
        for ids in blocks()[1:]:
            teacher(batch_of(ids))
    assert [parts for _, parts in compared.seen] == [[epoch_part(0)], [epoch_part(1)]]
    assert compared.threads() == [MAIN, "store-checksums"]


def test_only_the_process_whose_turn_it_is_compares_a_checksum(
    store: LabelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = Calls(monkeypatch, "verify")
    teacher = StoredTeacher(store, 2, Checksums(store, is_mine=lambda part: part == epoch_part(1)))
    with teacher.reading_ahead(blocks(), EPOCHS, pinned=False):
        for ids in blocks():
            teacher(batch_of(ids))
    assert [parts for _, parts in compared.seen] == [[epoch_part(1)]]


def flip_a_bit(store: LabelStore) -> None:
    file = store.folder / f"{epoch_part(1)}.safetensors"
    content = bytearray(file.read_bytes())
    content[-6] ^= 1
    file.write_bytes(bytes(content))


def cut(store: LabelStore) -> None:
    file = store.folder / f"{epoch_part(1)}.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def delete(store: LabelStore) -> None:
    (store.folder / f"{epoch_part(1)}.safetensors").unlink()


def mark_as_missing(store: LabelStore) -> None:
    columns = store.record.encode(store_answers(1))
    for name, marks in store.record.missing(1).items():
        columns[name][2] = marks[0]
    delete(store)
    store.write_piece(epoch_part(1), torch.arange(STORED_VIEWS), columns)
    store.finish(epoch_part(1))


def said_and_when(store: LabelStore, ahead: bool) -> tuple[int, str]:
    """Return how many batches were answered before an error, and what it says."""
    teacher = reader_of(LabelStore(store.folder))
    answers: list[TeacherOutput] = []
    context = teacher.reading_ahead(blocks(), EPOCHS, pinned=False) if ahead else nullcontext()
    with pytest.raises(InputError) as said, context:
        answers.extend(teacher(batch_of(ids)) for ids in blocks())
    return len(answers), str(said.value)


@pytest.mark.parametrize("harm", [flip_a_bit, cut, delete, mark_as_missing])
def test_what_cannot_be_read_is_said_at_its_step_as_if_nothing_were_read_ahead(store: LabelStore, harm: Any) -> None:
    harm(store)
    answered, said = said_and_when(store, ahead=True)
    assert answered == STORED_VIEWS // 4
    assert (answered, said) == said_and_when(store, ahead=False)


@pytest.mark.parametrize("answered", [0, 1, 7])
def test_no_thread_outlives_its_run(store: LabelStore, answered: int) -> None:
    before, teacher = threading.enumerate(), reader_of(store)

    def fail() -> None:
        with teacher.reading_ahead(blocks(), EPOCHS, pinned=False):
            for ids in blocks()[:answered]:
                teacher(batch_of(ids))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert threading.enumerate() == before
    assert teacher(batch_of(blocks()[0])).logits is not None


def test_a_batch_that_lacks_a_view_is_answered_and_the_next_one_still_read_ahead(
    store: LabelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark_as_missing(store)
    teacher, lacks = reader_of(LabelStore(store.folder)), Missing(2, 2, 1, 2, "broken")
    whole = [ids for ids in blocks() if ids[0, 0] == 1]
    kept = whole[0][torch.tensor([0, 1, 3])]
    found = Calls(monkeypatch, "find")
    with teacher.reading_ahead(whole, [1], pinned=False):
        answered = teacher(batch_of(kept, lacks)).logits
        for ids in whole[1:]:
            teacher(batch_of(ids))
    expected = store.record.decode(store.record.encode(store_answers(1)[torch.tensor([0, 1, 3])]))
    assert answered is not None
    assert torch.equal(answered, expected)
    assert [ids.tolist() for thread, ids in found.seen if thread == MAIN] == [kept.tolist()]
