"""A store that is built in parts, by any number of machines, is the one that a single process builds."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from deit_kd import FrozenTeacher
from deit_kd.cli import main
from deit_kd.console import console
from deit_kd.interfaces import Batch, TeacherOutput
from deit_kd.runs.data_errors import DataErrors
from deit_kd.store import (
    VALIDATION,
    Division,
    LabelStore,
    RecordingTeacher,
    Share,
    epoch_part,
    missing_parts,
    seconds_left,
)
from deit_kd.teaching.recording import fill_epoch
from tests.forked import run_on_two
from tests.helpers import CLASSES, ONE_PROCESS, REPOSITORY, refused, snapshot, tiny
from tests.started import stopped_job
from tests.tiny_parts import array_photos, pixel_teacher, training_loader, transform

PHOTOS, EPOCHS, BATCH = 30, 3, 4
LOADER = training_loader(array_photos(PHOTOS), transform())

sizes = st.integers(1, 9)


@given(st.builds(dict, parts=sizes, epochs=sizes, batch_size=sizes), st.integers(1, 40), st.integers(0, 40))
def test_every_view_belongs_to_one_part_and_parts_differ_by_one_block(plan: Any, views: int, validation: int) -> None:
    division = Division(plan, views, validation)
    block = plan["batch_size"] + plan["batch_size"] % 2
    shares = [division.positions(number) for number in range(1, plan["parts"] + 1)]
    for epoch in range(plan["epochs"]):
        dealt = np.concatenate([list(share.get(epoch, ())) for share in shares])
        assert dealt.tolist() == list(range(views))  # in order, each once
        owners = division.parts_of(epoch, np.arange(views))
        assert all(position in shares[number - 1][epoch] for position, number in enumerate(owners.tolist()))
    assert all(within.start % block == 0 for share in shares for within in share.values())
    blocks = [sum(-(-len(within) // block) for within in share.values()) for share in shares]
    blocks[0] += -(-validation // block)
    if -(-validation // block) <= sum(blocks) // len(blocks):  # the validation set is no more than a part
        assert max(blocks) - min(blocks) <= 1


def begin(folder: Path) -> LabelStore:
    manifest = {
        "identity": {"seed": 0},
        "classes": list(CLASSES),
        "top": 3,
        "views": LOADER.views_per_epoch,
        "validation": 2,
        "libraries": [{"torch": "2"}],
        "teacher": {"name": "t", "weights": "w", "random_weights": False},
    }
    folder.mkdir(parents=True, exist_ok=True)
    return LabelStore.begin(folder, manifest)


class Mortal:
    """Answers like `pixel_teacher`, and dies after some batches."""

    def __init__(self, batches: float) -> None:
        self._left = batches

    def __call__(self, batch: Batch) -> TeacherOutput:
        if self._left <= 0:
            raise KeyboardInterrupt
        self._left -= 1
        return pixel_teacher(batch)


def fill(store: LabelStore, positions: dict[int, range], lives: float) -> bool:
    """Answer the `positions` of a store until they are done or the teacher dies; return whether they are done."""
    recorder = RecordingTeacher(Mortal(lives), store)
    errors = DataErrors(store.folder, {}, most=0, processes=ONE_PROCESS, skips=False)
    try:
        for epoch, within in positions.items():
            fill_epoch(store, recorder, LOADER, epoch, ONE_PROCESS, BATCH, errors, within=within)
    except KeyboardInterrupt:
        return False
    return True


def answer_validation(store: LabelStore) -> None:
    images = next(iter(LOADER.views(np.array([[0, 0], [0, 1]]), 2)))
    logits = pixel_teacher(images).needed_logits()
    store.write_piece(VALIDATION, images.view_ids[:, 1], store.record.encode(logits))
    store.finish(VALIDATION, {"top1": 50.0, "top5": None, "nll": 1.0})


def files(store: LabelStore) -> dict[str, Any]:
    """Return what each file of a store says of itself, and the bytes of its columns."""
    return {path.name: parsed(path.read_bytes()) for path in store.folder.rglob("*.safetensors")}


def parsed(content: bytes) -> tuple[Any, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]  # safetensors writes the header in any order


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The files of a store that one process built."""
    store = begin(tmp_path_factory.mktemp("alone"))
    answer_validation(store)
    assert fill(store, dict.fromkeys(range(EPOCHS), range(LOADER.views_per_epoch)), np.inf)
    return files(store)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(parts=st.integers(1, 7), chance=st.randoms(use_true_random=False))
def test_whatever_is_killed_and_repeated_the_parts_are_the_store_of_one_process(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    alone: dict[str, Any],
    parts: int,
    chance: Any,
) -> None:
    monkeypatch.setattr("deit_kd.store.teacher.VIEWS_PER_PIECE", chance.choice([1, 7, 4096]))
    monkeypatch.setattr("deit_kd.files.os.fsync", lambda file: None)  # no power is cut here, and it takes long
    store = begin(tmp_path_factory.mktemp("parts"))
    shares = [Share.parse(f"{number}/{parts}", EPOCHS, BATCH) for number in range(1, parts + 1)]
    todo = [*shares, *chance.sample(shares, parts // 2)]  # some are built twice
    chance.shuffle(todo)
    lives = [chance.choice([0, 1, 3, np.inf]) for _ in range(2 * parts)]
    while todo:
        share = todo.pop()
        with share.lock(str(store.folder)):
            share.agree(store.folder)
            if share.number == 1:
                answer_validation(store)
            if not fill(store, share.positions(store), lives.pop() if lives else np.inf):
                todo.insert(chance.randrange(len(todo) + 1), share)
    assert missing_parts(store, shares[0].plan) == {}
    assert join(store.folder) == 0
    assert files(store) == alone
    assert sorted(snapshot(store.folder)) == sorted([".lock", "store.json", *alone])


def join(folder: Path) -> int:
    return main(["store", "build", "--join", "--store", str(folder)])


def arguments(photos: Path, store: Path, part: str | None, **options: Any) -> list[str]:
    recipe = tiny(photos, None, **{"distill.kind": "soft", **options})
    given = ["--store", str(store), "--epochs", "2", "--batch_size", "10"]
    return ["store", "build", *recipe, *given, *([] if part is None else ["--part", part])]


@contextmanager
def dies_at_batch(number: int) -> Iterator[None]:
    """Kill the builder in this process before its teacher answers so many batches."""
    asked = 0

    def count(module: nn.Module, inputs: Any) -> None:
        nonlocal asked
        if isinstance(module, FrozenTeacher) and inputs[0].view_ids is not None:
            asked += 1
            if asked == number:
                raise KeyboardInterrupt

    hook = register_module_forward_pre_hook(count)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, photos_root: Path) -> Path:
    """A store that one process built of `photos_root`."""
    store = tmp_path_factory.mktemp("built") / "store"
    assert main(arguments(photos_root, store, None)) == 0
    return store


def test_parts_with_one_killed_and_one_of_two_processes_give_the_files_of_one_builder(
    photos_root: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deit_kd.store.teacher.VIEWS_PER_PIECE", 10)
    store = tmp_path / "store"
    run_on_two(arguments(photos_root, store, "3/3"), tmp_path / "said.txt")
    with dies_at_batch(3):
        main(arguments(photos_root, store, "2/3"))
    assert main(arguments(photos_root, store, "2/3")) == 0
    line = refused(["store", "build", "--join", "--store", str(store)], capsys)
    assert "lacks 31 answers of part 1/3" in line  # 21 of the validation set, 10 views
    with console.capture() as capture:
        assert main(arguments(photos_root, store, "1/3")) == 0
    assert "all 3 parts are done: deit-kd store build --join finishes" in capture.get()
    assert join(store) == 0
    assert files(LabelStore(store)) == files(LabelStore(built))
    assert join(store) == 0, "a repeated join changes nothing"
    assert files(LabelStore(store)) == files(LabelStore(built))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--part", "17/16"], "--part: 17/16 is out of range; parts are numbered from 1/16 to 16/16"),
        (["--part", "0/16"], "--part: 0/16 is out of range"),
        (["--part", "1/0"], "--part: 1/0 is out of range"),
        (["--part", "three"], "--part: 'three' is not a part; write 3/16"),
        (["--part=-1/4"], "is not a part"),
        (["--part", "1/2", "--join"], "--join: cannot be used with --part 1/2"),
        (["--part", "1/4"], "is being built in 3 parts of 2 epochs with --batch_size 10, not in 4 parts"),
        (["--part", "1/3", "--epochs", "3"], "not in 3 parts of 3 epochs"),
        (["--part", "1/3", "--batch_size", "20"], "epochs with --batch_size 20"),
        (["--part", "1/3", "--seed", "1"], "seed: 0 in the store, 1 here"),
        (["--part", "1/3", "--teacher.store_top", "1"], "teacher.store_top: 10 in the store, 1 here"),
        (["--join"], "lacks 69 answers of parts 1/3, 2/3; build them with --part, then run --join again"),
    ],
)
def test_what_no_part_can_be_is_one_line_and_changes_nothing(
    photos_root: Path, tmp_path: Path, third: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    before = snapshot(third)
    assert said in refused([*arguments(photos_root, third, None), *options], capsys)
    assert snapshot(third) == before


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory, photos_root: Path) -> Path:
    """A store of which only the last of three parts was built."""
    store = tmp_path_factory.mktemp("third") / "store"
    assert main(arguments(photos_root, store, "3/3")) == 0
    return store


def test_a_part_of_a_refused_recipe_leaves_no_folder(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    astray = [*arguments(photos_root, tmp_path / "store", "1/3"), "--data.root", str(tmp_path / "none")]
    assert f"{tmp_path / 'none'} is not a folder" in refused(astray, capsys)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def elsewhere(lock: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Hold a lock in another process."""
    (ready, told), (end, stay) = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which do nothing here
        child = os.fork()
    if not child:
        os.close(stay)
        with lock():
            os.write(told, b"1")
            os.read(end, 1)
        os._exit(0)
    assert os.read(ready, 1)
    try:
        yield
    finally:
        os.close(stay)
        os.waitpid(child, 0)
        for one in (ready, told, end):
            os.close(one)


def part_lock(store: Path, part: str) -> Callable[[], AbstractContextManager[None]]:
    return lambda: Share.parse(part, 2, 10).lock(str(store))


def test_two_builders_of_a_part_two_joins_and_a_join_beside_a_builder_are_refused(
    photos_root: Path, third: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = arguments(photos_root, third, "2/3")
    joins = ["store", "build", "--join", "--store", str(third)]
    with elsewhere(part_lock(third, "2/3")):
        assert "part: 2/3 of" in refused(part, capsys)
        with part_lock(third, "1/3")():
            pass  # another part may be built meanwhile
        assert "is being written by another process" in refused(joins, capsys)
        assert "is being written by another process" in refused(arguments(photos_root, third, None), capsys)
    with elsewhere(lambda: LabelStore.lock(third)):
        assert "is being written by another process" in refused(part, capsys)
        assert "is being written by another process" in refused(joins, capsys)


def test_a_damaged_file_is_named_by_the_join_and_then_its_parts_are(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    for part in ("1/2", "2/2"):
        assert main(arguments(photos_root, store, part)) == 0
    file = store / f"{epoch_part(1)}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    joins = ["store", "build", "--join", "--store", str(store)]
    assert f"{file} is truncated or altered" in refused(joins, capsys)
    file.unlink()
    assert "lacks 48 answers of part 2/2;" in refused(joins, capsys)


def test_views_that_parts_left_out_are_listed_once_after_the_join(photos_root: Path, tmp_path: Path) -> None:
    photos, store, one = tmp_path / "photos", tmp_path / "store", tmp_path / "one"
    for name, content in snapshot(photos_root).items():
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(b"none" if name.endswith("train/bars/003.png") else content)
    skip = {"data.on_error": "skip", "data.max_errors": 1}
    for part in ("2/2", "1/2", "1/2"):
        assert main(arguments(photos, store, part, **skip)) == 0
    assert join(store) == 0
    assert main(arguments(photos, one, None, **skip)) == 0
    assert (store / "data_errors.jsonl").read_text() == (one / "data_errors.jsonl").read_text()
    assert files(LabelStore(store)) == files(LabelStore(one))


def test_one_part_fits_the_teacher_and_a_part_that_does_not_see_it_fits_no_other(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = {
        "teacher.random_weights": None,
        "teacher.min_top1": 0,
        "teacher.fit.epochs": 1,
        "teacher.fit.batch_size": 24,
        "teacher.fit.optim.warmup_epochs": 0,
        "teacher.fit.folder": tmp_path / "teachers",
    }
    store = tmp_path / "store"
    assert main(arguments(photos_root, store, "2/2", **fit)) == 0
    there = {**fit, "teacher.fit.folder": tmp_path / "others"}
    line = refused(arguments(photos_root, store, "1/2", **there), capsys)
    assert line.startswith("error: teacher.fit.folder: ")
    assert "is not here" in line
    assert not (tmp_path / "others").exists()
    assert main(arguments(photos_root, store, "1/2", **fit)) == 0
    assert join(store) == 0


def test_parts_that_need_a_fit_wait_for_the_one_that_does_it(
    photos_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fit is held in the folder of the store, which all parts see, whatever they see of the teachers."""
    store = tmp_path / "store"
    fit = {"teacher.random_weights": None, "teacher.fit.epochs": 1, "teacher.fit.folder": tmp_path / "teachers"}
    from deit_kd.files import held

    class Waits(Exception):
        pass

    def give_up(seconds: float) -> None:
        raise Waits

    monkeypatch.setattr("deit_kd.runs.opening.time.sleep", give_up)
    with (
        elsewhere(lambda: held(store / "parts" / "teacher", "busy")),
        console.capture() as capture,
        pytest.raises(Waits),
    ):
        main(arguments(photos_root, store, "1/2", **fit))
    assert "fits the teacher; waiting" in capture.get()
    assert not (tmp_path / "teachers").exists()


def test_info_says_how_far_the_parts_are(third: Path) -> None:
    with console.capture() as capture:
        assert main(["store", "info", str(third)]) == 0
    assert "parts: 1 of 3 parts have begun, 50.0 % of 96 views are answered" in capture.get()


def told(done: int, views: int, rate: float, at: float = 1000.0) -> Any:
    return {"done": done, "views": views, "views_per_second": rate, "at": at}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([told(50, 100, 10.0), told(50, 100, 10.0)], 5.0),
        ([told(50, 100, 10.0), told(0, 100, 1.0)], 100.0),  # as long as the slowest
        ([told(50, 100, 10.0), None], 15.0),  # who is there does the work of who is not
        ([told(100, 100, 0.0), told(50, 100, 5.0)], 10.0),
        ([told(50, 100, 10.0, at=0.0), told(50, 100, 10.0)], 10.0),  # one has been silent for long
        ([None, told(100, 100, 0.0)], None),
    ],
)
def test_the_time_left_is_that_of_all_parts(parts: list[Any], expected: float | None) -> None:
    assert seconds_left(parts, 200, now=1001.0) == expected


def test_the_first_manifest_stays(tmp_path: Path) -> None:
    """Of two parts that begin a store at once, the second reads what the first has written."""
    first = begin(tmp_path).manifest
    again = LabelStore.begin(tmp_path, {**first, "top": 1})
    assert again.manifest == first
    assert [name for name in snapshot(tmp_path) if "partial" in name] == []
    assert json.loads((tmp_path / "store.json").read_text()) == first


BUILDER = """#!/bin/bash
printf '%s\\n' "$@" > built.txt
trap 'echo heard > heard.txt; exit 75' USR1
for _ in $(seq 200); do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
echo "$@" > requeued.txt
"""


def test_the_job_array_builds_its_part_and_goes_back_into_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "DATA": "photos", "STORE": "labels"}
    programs = {"deit-kd": BUILDER, "scontrol": SCONTROL}
    assert stopped_job("slurm_store.sbatch", tmp_path, programs, "built.txt", **slurm) == 75
    assert (tmp_path / "heard.txt").read_text() == "heard\n"
    assert (tmp_path / "requeued.txt").read_text() == "requeue 7_3\n"
    called = (tmp_path / "built.txt").read_text().splitlines()
    assert called[called.index("--part") + 1] == "3/16"
    monkeypatch.chdir(REPOSITORY)
    assert "photos is not a folder" in refused(called, capsys), "all its options exist"
