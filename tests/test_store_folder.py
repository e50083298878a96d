"""The files of a label store: whole or not there, found when damaged, and never of two makers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deit_kd.config import differences
from deit_kd.interfaces import Batch, InputError, TeacherOutput
from deit_kd.store import VALIDATION, LabelStore, RecordingTeacher, StoredTeacher, epoch_part
from deit_kd.store import teacher as teacher_module
from tests.tiny_parts import STORED_CLASSES, STORED_VIEWS, begin_store, fill_store, store_answers


def view_batch(view_ids: Tensor | None) -> Batch:
    size = 0 if view_ids is None else len(view_ids)
    return Batch(torch.zeros(size, 3, 2, 2), torch.zeros(size, STORED_CLASSES), torch.zeros(size).long(), view_ids)


def views(epoch: int, *positions: int) -> Tensor:
    return torch.tensor([[epoch, position] for position in positions])


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    store = begin_store(tmp_path / "store")
    fill_store(store, 0)
    fill_store(store, 1)
    return store


@pytest.mark.parametrize("top", [0, 3, 6])
def test_a_stored_teacher_answers_any_views_in_any_order(tmp_path: Path, top: int) -> None:
    store = begin_store(tmp_path, top)
    fill_store(store, 0)
    fill_store(store, 1)
    view_ids = torch.cat([views(1, 7, 3), views(0, 19, 0), views(1, 0)])
    asked = torch.stack(
        [store_answers(1)[7], store_answers(1)[3], store_answers(0)[19], store_answers(0)[0], store_answers(1)[0]]
    )
    answered = StoredTeacher(store, 2)(view_batch(view_ids)).logits
    assert torch.equal(answered, store.record.decode(store.record.encode(asked)))


@pytest.mark.parametrize("view_ids", [views(2, 0), views(0, STORED_VIEWS), None])
def test_a_view_that_is_not_in_the_store_has_no_answer(store: LabelStore, view_ids: Tensor | None) -> None:
    with pytest.raises(InputError, match=r"teacher\.store"):
        StoredTeacher(store, 2)(view_batch(view_ids))


class Echo(nn.Module):
    """Answers a view with its number, so that every record can be told."""

    def forward(self, batch: Batch) -> TeacherOutput:
        assert batch.view_ids is not None
        classes = torch.arange(STORED_CLASSES)
        return TeacherOutput(torch.sin(batch.view_ids.sum(-1, keepdim=True) * (classes + 1.0)))


@pytest.mark.parametrize("blocks", [[20], [2] * 10, [6, 6, 8], [1] * 20])
@pytest.mark.parametrize(("views_per_piece", "seconds_per_piece"), [(1, 60), (7, 60), (4096, 60), (4096, 0)])
def test_records_do_not_depend_on_batches_or_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: list[int], views_per_piece: int, seconds_per_piece: float
) -> None:
    monkeypatch.setattr(teacher_module, "VIEWS_PER_PIECE", views_per_piece)
    monkeypatch.setattr(teacher_module, "SECONDS_PER_PIECE", seconds_per_piece)
    store = begin_store(tmp_path)
    recorder = RecordingTeacher(Echo(), store)
    for block in torch.arange(STORED_VIEWS).flip(0).split(blocks):
        recorder(view_batch(views(0, *block.tolist())))
    recorder.flush()
    store.finish(epoch_part(0))
    asked = Echo()(view_batch(views(0, *range(STORED_VIEWS)))).logits
    expected = store.record.encode(asked)
    for name, column in store.columns(epoch_part(0)).items():
        assert torch.equal(column, expected[name])


def test_a_recording_teacher_answers_as_the_other_one(tmp_path: Path) -> None:
    batch = view_batch(views(0, 4, 5))
    assert torch.equal(RecordingTeacher(Echo(), begin_store(tmp_path))(batch).logits, Echo()(batch).logits)


def test_a_recording_teacher_keeps_nothing_of_a_batch_that_may_be_overwritten(tmp_path: Path) -> None:
    store = begin_store(tmp_path)
    recorder, ids = RecordingTeacher(Echo(), store), views(0, *range(STORED_VIEWS))
    batch = view_batch(ids)
    recorder(batch)
    assert batch.view_ids is not None
    batch.view_ids.zero_()
    recorder.flush()
    assert len(store.missing(epoch_part(0))) == 0


def test_an_interrupted_epoch_goes_on_from_its_pieces(tmp_path: Path) -> None:
    store = begin_store(tmp_path)
    positions = torch.tensor([1, 5, 2])
    store.write_piece(epoch_part(0), positions, store.record.encode(store_answers(0)[positions]))
    again = LabelStore(tmp_path)
    missing = torch.from_numpy(again.missing(epoch_part(0)))
    assert sorted({*range(STORED_VIEWS)} - {1, 2, 5}) == missing.tolist()
    assert again.epochs == 0
    again.write_piece(epoch_part(0), missing, again.record.encode(store_answers(0)[missing]))
    again.finish(epoch_part(0))
    assert torch.equal(again.columns(epoch_part(0))["rest"], again.record.encode(store_answers(0))["rest"])
    assert [path.name for path in tmp_path.glob("*.pieces")] == []


def damage_end(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def damage_bit(file: Path) -> None:
    """Name another of the classes, which the checksum alone can tell."""
    content = bytearray(file.read_bytes())
    content[-6] ^= 1
    file.write_bytes(bytes(content))


def damage_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES = [damage_end, damage_bit, damage_header, empty, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_epoch_is_found(store: LabelStore, damage: Any) -> None:
    store.verify([epoch_part(0), epoch_part(1)])
    damage(store.folder / "epoch-00001.safetensors")
    with pytest.raises(InputError, match=r"epoch-00001.*delete it and run deit-kd store build again"):
        store.verify([epoch_part(0), epoch_part(1)])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_piece_is_asked_for_again(tmp_path: Path, damage: Any) -> None:
    store = begin_store(tmp_path)
    store.write_piece(epoch_part(0), torch.arange(5), store.record.encode(store_answers(0)[:5]))
    damage(next(tmp_path.glob("*.pieces/*")))
    assert len(store.missing(epoch_part(0))) == STORED_VIEWS


@pytest.mark.parametrize("other", [{"top": 4}, {"seed": 1}])
def test_an_epoch_of_another_store_is_found(tmp_path: Path, store: LabelStore, other: dict[str, int]) -> None:
    stranger = begin_store(tmp_path / "other", **other)
    fill_store(stranger, 1)
    source, goal = (one.folder / "epoch-00001.safetensors" for one in (stranger, store))
    goal.write_bytes(source.read_bytes())
    with pytest.raises(InputError, match="belongs to another store"):
        store.verify([epoch_part(1)])


def test_only_epochs_without_a_gap_are_counted(store: LabelStore) -> None:
    fill_store(store, 3)
    assert store.epochs == 2


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_is_one_clear_error_and_leaves_what_was_finished(
    store: LabelStore, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store.write_piece(epoch_part(2), torch.arange(3), store.record.encode(store_answers(2)[:3]))
    before = {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(f"deit_kd.files.os.{step}", full)
        with pytest.raises(InputError, match=r"teacher\.store.*No space left on device.*free space"):
            store.write_piece(epoch_part(2), torch.arange(3, STORED_VIEWS), store.record.encode(store_answers(2)[3:]))
    assert {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()} == before
    assert len(store.missing(epoch_part(2))) == STORED_VIEWS - 3


def test_two_builders_cannot_write_to_one_folder(tmp_path: Path) -> None:
    with LabelStore.lock(tmp_path), pytest.raises(InputError, match="being written"), LabelStore.lock(tmp_path):
        pass
    with LabelStore.lock(tmp_path):
        pass


def test_a_builder_that_was_killed_lets_go(tmp_path: Path) -> None:
    holder = (
        "import os, signal, sys, time; from deit_kd.store import LabelStore\n"
        "with LabelStore.lock(sys.argv[1]): os.fork() == 0 and (time.sleep(20), os._exit(0)); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", holder, str(tmp_path)], check=False).returncode == -9
    with LabelStore.lock(tmp_path):
        pass


def test_a_builder_that_was_killed_at_its_first_file_can_begin_again(tmp_path: Path) -> None:
    (tmp_path / ".store.json.partial").write_text("{")
    assert begin_store(tmp_path).epochs == 0


def test_a_store_of_a_later_format_is_refused(store: LabelStore) -> None:
    file = store.folder / "store.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match="has format 2, this version reads 1"):
        LabelStore(store.folder)


@pytest.mark.parametrize("version", [3, "two", [1]])
def test_a_store_of_later_views_is_refused(store: LabelStore, version: Any) -> None:
    file = store.folder / "store.json"
    manifest = json.loads(file.read_text())
    manifest["identity"]["views.version"] = version
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"answers views of version .*; rebuild it"):
        LabelStore(store.folder)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="something that is not a label store"):
        begin_store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_is_not_kept(store: LabelStore, value: float) -> None:
    broken = store_answers(2)
    broken[3, 2] = value
    with pytest.raises(InputError, match=r"epoch-00002 is not finite; check its weights"):
        store.write_piece(epoch_part(2), torch.arange(STORED_VIEWS), store.record.encode(broken))
    assert not store.holds(epoch_part(2))


@pytest.mark.parametrize("top", [0, 3, 6])
@pytest.mark.parametrize("processes", [1, 3])
def test_validation_answers_are_read_without_asking(tmp_path: Path, top: int, processes: int) -> None:
    store, logits = begin_store(tmp_path, top), store_answers(9)[:4]
    store.write_piece(VALIDATION, torch.arange(4), store.record.encode(logits))
    store.finish(VALIDATION, {"top1": 75.0, "top5": None, "nll": 0.5})
    assert LabelStore(tmp_path).score() == {"top1": 75.0, "top5": None, "nll": 0.5}
    for rank in range(processes):
        assert torch.equal(store.predictions(rank, processes), logits.argmax(-1)[rank::processes])


@pytest.mark.parametrize(
    ("stored", "here", "lines"),
    [
        ({"seed": 0}, {"seed": 0}, []),
        ({"seed": 0}, {"seed": 1}, ["seed: 0 in the store, 1 here"]),
        ({"teacher.name": "a", "seed": 0}, {"seed": 0}, []),
        ({}, {"augment.repeats": 3}, []),
        ({}, {"augment.repeats": 4}, ["augment.repeats: 3 in the store, 4 here"]),
        (
            {"classes": ["a", "b", "c", "d", "e"]},
            {"classes": ["a", "b", "x", "d", "e"]},
            ["classes: item 2 is 'c' in the store, 'x' here"],
        ),
        ({"classes": ["a"] * 9}, {"classes": ["a"]}, ["classes: 9 items in the store, 1 here"]),
        ({"scale": [0.1, 1.0]}, {"scale": None}, ["scale: [0.1, 1.0] in the store, None here"]),
    ],
)
def test_a_difference_names_the_field_and_both_values(stored: Any, here: Any, lines: list[str]) -> None:
    assert differences(stored, here, "in the store") == lines
