"""A photo that cannot be read ends the run by name, or is left out of every mean, listed, and never replaced."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from deit_kd import Batch, Distiller, FrozenTeacher, Objective
from deit_kd.asking import collect, evaluate, score_teacher
from deit_kd.cli import main
from deit_kd.data import build_evaluation_loader, lost_worker
from deit_kd.data.mixing import Example, Mixing
from deit_kd.interfaces import InputError, Missing
from deit_kd.runs.data_errors import DataErrors
from deit_kd.store import VALIDATION, LabelStore, epoch_part
from deit_kd.store.record import is_missing
from tests.forked import run_on_two
from tests.helpers import ONE_PROCESS, REPOSITORY, heads_in, records, refused, tiny
from tests.tiny_parts import (
    array_photos,
    folder_splits,
    make_batch,
    pixel_teacher,
    tiny_student,
    tiny_trainer,
    training_loader,
    transform,
)

BAD_TRAIN = ("bars/001.png", "bars/002.png", "dots/005.png", "dots/006.png", "rings/003.png", "rings/011.png")
BAD_VALIDATION = ("bars/000.png", "rings/004.png")


def spoil(root: Path) -> None:
    for split, names in (("train", BAD_TRAIN), ("validation", BAD_VALIDATION)):
        for name in names:
            (root / split / name).write_bytes(b"no image")


@pytest.fixture
def bad_root(photos_root: Path, tmp_path: Path) -> Path:
    """Photos of which 6 of 48 and 2 of 21 cannot be read."""
    root = shutil.copytree(photos_root, tmp_path / "photos")
    spoil(root)
    return root


def errors(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "data_errors.jsonl").read_text().splitlines()]


def lacking(batch: Batch, *rows: int) -> Batch:
    return batch.without([Missing(row, row, 0, row, "a reason") for row in rows])


def example(position: int, unreadable: str | None = None) -> Example:
    return Example(torch.full((3, 8, 8), position + 1.0), position % 4, 0, position, 10 + position, unreadable)


def test_the_partner_of_a_missing_view_stays_unmixed_and_the_other_pairs_mix_as_ever() -> None:
    mixing = Mixing(classes=4, seed=0, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    whole = mixing([example(p) for p in range(6)])
    batch = mixing([example(p, "gone" if p == 2 else None) for p in range(6)])
    assert batch.rows().tolist() == [0, 1, 3, 4, 5]
    assert batch.missing == [Missing(2, 12, 0, 2, "gone")]
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(batch.images[others], whole.images[[0, 1, 4, 5]])
    assert torch.equal(batch.targets[others], whole.targets[[0, 1, 4, 5]])
    assert torch.equal(batch.images[2], example(3).image)
    torch.testing.assert_close(batch.targets[2], torch.tensor([0.025, 0.025, 0.025, 0.925]))


def training_batches(root: Path, **options: Any) -> list[Batch]:
    return list(training_loader(folder_splits(root).train, transform(), skip=True, **options).batches(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_can_be_read_gives_the_views_that_it_gave_before(workers: int, photos_root: Path, bad_root: Path) -> None:
    missing = 0
    for whole, batch in zip(training_batches(photos_root), training_batches(bad_root, workers=workers), strict=True):
        missing += len(batch.missing)
        assert batch.view_ids is not None
        assert whole.view_ids is not None
        assert torch.equal(batch.view_ids, whole.view_ids[batch.rows()])
        alone = {view.row ^ 1 for view in batch.missing}  # whose partner is missing
        for here, place in enumerate(batch.rows().tolist()):
            if place not in alone:
                assert torch.equal(batch.images[here], whole.images[place])
                assert torch.equal(batch.targets[here], whole.targets[place])
    assert missing == len(BAD_TRAIN)


def test_an_augmentation_that_fails_is_never_left_out(photos_root: Path) -> None:
    def breaks(image: Image.Image) -> Tensor:
        raise ValueError("a bug")

    loader = build_evaluation_loader(
        folder_splits(photos_root).validation,
        breaks,
        batch_size=4,
        rank=0,
        processes=1,
        workers=0,
        pin_memory=False,
        skip=True,
    )
    with pytest.raises(RuntimeError, match=r"validation/bars/000\.png: its view for evaluation cannot be made"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_augmentation_that_fails_names_photo_and_view(
    workers: int, photos_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: Any, image: Image.Image) -> Image.Image:
        raise ValueError("a bug")

    monkeypatch.setattr("timm.data.auto_augment.AugmentOp.__call__", breaks)
    with pytest.raises(RuntimeError, match=r"\.png: its view \(epoch 0, position \d+\) cannot be made"):
        training_batches(photos_root, workers=workers)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("clip_grad_norm", [None, 0.1])  # clipped, a gradient of any size gives the same step
@pytest.mark.parametrize("rows", [(1,), (1, 6), (4, 5, 7), (0, 1, 2, 3)], ids=str)
def test_a_step_is_the_mean_over_what_is_there_however_it_is_accumulated(
    rows: tuple[int, ...], clip_grad_norm: float | None
) -> None:
    expected, at_once, in_two = (
        tiny_trainer(clip_grad_norm=clip_grad_norm, skip=True, accumulation_steps=steps) for steps in (1, 1, 2)
    )
    whole = make_batch()
    keep = [row for row in range(8) if row not in rows]
    halves = [
        lacking(Batch(*(field[half : half + 4] for field in whole[:3])), *(r - half for r in rows if 0 <= r - half < 4))
        for half in (0, 4)
    ]
    terms = [
        expected.step(iter([Batch(*(field[keep] for field in whole[:3]))]), 0),
        at_once.step(iter([lacking(whole, *rows)]), 0),
        in_two.step(iter(halves), 0),
    ]
    for trainer, found in ((at_once, terms[1]), (in_two, terms[2])):
        torch.testing.assert_close(found.terms, terms[0].terms)
        here, there = weights(trainer.student.model), weights(expected.student.model)
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)


def test_a_step_says_at_which_places_views_had_no_finite_loss() -> None:
    batch = make_batch()
    batch.images[5] = float("nan")
    result = tiny_trainer(skip=True).step(iter([lacking(batch, 1)]), 0)
    assert (~result.is_finite).nonzero().tolist() == [[5]]


def test_a_step_of_which_nothing_can_be_read_teaches_nothing() -> None:
    trainer = tiny_trainer(skip=True)
    before = weights(trainer.student.model)
    assert trainer.step(iter([lacking(make_batch(), *range(8))]), 0).terms[:3].tolist() == [0, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer.student.model), before, strict=True))


def test_no_network_is_ever_asked_about_nothing() -> None:
    def refuse_nothing(_: Any, inputs: tuple[Tensor]) -> None:
        assert len(inputs[0])

    student, network = tiny_student(), timm.create_model("test_vit", num_classes=3)
    for module in (student, network):
        module.register_forward_pre_hook(refuse_nothing)
    half = (0.5, 0.5, 0.5)
    teacher = FrozenTeacher(network, student_mean=half, student_std=half, mean=half, std=half, image_size=160)
    empty = lacking(make_batch(2), 0, 1)
    terms = Distiller(student, teacher, Objective("soft"))(empty)
    terms.loss.backward()
    assert [term.item() for term in terms[:3]] == [0, 0, 0]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in student.parameters())
    options: dict[str, Any] = {"classes": 3, "total": 6, "processes": ONE_PROCESS}
    batches = [make_batch(4), empty]
    assert score_teacher(teacher, batches, **options)[1][4:].tolist() == [-1, -1]
    assert evaluate({"model": student}, batches, precision="off", fusion="softmax", **options)["model"]["n"] == 4


def test_skipping_changes_no_bit_where_all_is_well() -> None:
    usual, skipping = tiny_trainer(), tiny_trainer(skip=True)
    for trainer in (usual, skipping):
        trainer.step(iter([make_batch()]), 0)
    both = (weights(trainer.student.model) for trainer in (usual, skipping))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_scores_and_agreement_are_over_what_is_there_and_the_teacher_stays_aligned() -> None:
    batch, model = make_batch(8), tiny_student()
    options: dict[str, Any] = {"classes": 3, "processes": ONE_PROCESS}
    gaps = [lacking(Batch(*(field[:5] for field in batch[:3])), 0, 3), lacking(Batch(*(f[5:] for f in batch[:3])), 1)]
    there = [1, 2, 4, 5, 7]
    readable = [Batch(*(field[there] for field in batch[:3]))]
    taught, classes = score_teacher(pixel_teacher, gaps, total=8, **options)
    assert classes[there].tolist() == batch.images[there, :, 0, 0].argmax(-1).tolist()
    assert classes[[0, 3, 6]].tolist() == [-1, -1, -1]
    assert taught == score_teacher(pixel_teacher, readable, total=5, **options)[0]
    scoring = {"precision": "off", "fusion": "softmax", **options}
    found = evaluate({"model": model}, gaps, total=8, teacher_predictions=classes, **scoring)["model"]
    expected = evaluate({"model": model}, readable, total=5, teacher_predictions=classes[there], **scoring)["model"]
    assert found["n"] == expected["n"] == 5
    assert found["agreement"] == expected["agreement"]
    for head in ("cls", "dist", "fused"):
        assert found["heads"][head] == pytest.approx(expected["heads"][head])
    answers = collect(model, pixel_teacher, gaps, precision="off", **options)
    assert answers.indices.tolist() == there
    assert answers.labels.tolist() == batch.labels[there].tolist()


def test_a_process_without_images_has_no_predictions_of_the_teacher() -> None:
    found, predictions = score_teacher(pixel_teacher, [], classes=3, total=2, processes=ONE_PROCESS)
    assert found == {"top1": 0.0, "top5": None, "nll": 0.0}
    assert predictions.tolist() == []


def test_a_split_of_which_nothing_can_be_read_is_refused() -> None:
    with pytest.raises(InputError, match="no image can be read"):
        score_teacher(pixel_teacher, [lacking(make_batch(2), 0, 1)], classes=3, total=2, processes=ONE_PROCESS)


SKIP = {"data__on_error": "skip", "train__epochs": 2, "train__checkpoint_every_steps": 4}


def test_a_run_that_skips_lists_what_it_left_out_and_counts_only_what_it_saw(
    bad_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny(bad_root, tmp_path / "run", **SKIP)]) == 0
    lines = errors(tmp_path / "run")
    assert {(line["split"], line["path"]) for line in lines} == {
        *(("train", name) for name in BAD_TRAIN),
        *(("validation", name) for name in BAD_VALIDATION),
    }
    for line in lines:
        assert set(line) == {"step", "split", "epoch", "position", "path", "reason"}
        assert f"{line['split']}/{line['path']}: cannot be read as an image" in line["reason"]
        if line["split"] == "train":
            assert line["step"] == 6 * line["epoch"] + line["position"] // 8 + 1
    of_validation = [(line["step"], line["epoch"]) for line in lines if line["split"] == "validation"]
    assert of_validation == [(0, None)] * 2 + [(6, 0)] * 2 + [(12, 1)] * 2
    assert [record["missing"] for record in records(tmp_path / "run") if record["kind"] == "step"][-1] == 12
    assert " % on 19 images" in capsys.readouterr().out  # the teacher's score
    found = heads_in(tmp_path / "run")
    assert found["n"] == 19
    assert set(found["unreadable"]) == set(BAD_VALIDATION)


def test_without_skip_the_photo_is_named_and_a_resumed_run_may_skip_it(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(photos_root, tmp_path / "photos")
    (root / "train" / BAD_TRAIN[0]).write_bytes(b"no image")
    arguments = tiny(root, tmp_path / "run", train__checkpoint_every_steps=1)
    assert f"{root}/train/{BAD_TRAIN[0]}: cannot be read as an image" in refused(["train", *arguments], capsys)
    assert main(["train", *arguments, "--resume", "auto", "--data.on_error", "skip"]) == 0
    assert [line["path"] for line in errors(tmp_path / "run")] == [BAD_TRAIN[0]]


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_more_than_max_errors_end_the_run_and_are_listed(
    cache: str, bad_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**SKIP, "data__max_errors": 4, "data__cache": cache, "train__checkpoint_every_steps": 1}
    line = refused(["train", *tiny(bad_root, tmp_path / "run", **options)], capsys)
    listed = {(line["split"], line["path"]) for line in errors(tmp_path / "run")}
    assert f"data.max_errors: {len(listed)} photos are unreadable, more than 4; the last: " in line
    assert len(listed) > 4


def test_too_many_in_validation_are_refused_before_anything_but_their_list_is_written(
    bad_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**SKIP, "data__max_errors": 1}
    assert "data.max_errors: 2 photos" in refused(["train", *tiny(bad_root, tmp_path / "run", **options)], capsys)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "data_errors.jsonl"}
    assert len(errors(tmp_path / "run")) == 2


def test_a_resumed_run_lists_each_view_once_and_ends_as_the_unbroken_one(bad_root: Path, tmp_path: Path) -> None:
    arguments = tiny(bad_root, tmp_path / "run", **SKIP)
    assert main(["train", *arguments]) == 0
    before, listed, scored = records(tmp_path / "run"), errors(tmp_path / "run"), heads_in(tmp_path / "run")
    max((tmp_path / "run" / "checkpoints").iterdir()).unlink()
    (tmp_path / "run" / "heads.json").unlink()
    with open(tmp_path / "run" / "data_errors.jsonl", "a") as file:
        file.write('{"step": 9, "spl')
    assert main(["train", *arguments, "--resume", "auto"]) == 0
    assert (records(tmp_path / "run"), errors(tmp_path / "run"), heads_in(tmp_path / "run")) == (before, listed, scored)


@pytest.mark.parametrize("executor", ["pillow", "device"])
def test_photos_in_memory_are_skipped_alike(executor: str, bad_root: Path, tmp_path: Path) -> None:
    for name, cache in (("files", "none"), ("memory", "memory")):
        options = {**SKIP, "data__cache": cache, "data__executor": executor}
        assert main(["train", *tiny(bad_root, tmp_path / name, **options)]) == 0
    assert records(tmp_path / "files") == records(tmp_path / "memory")
    assert errors(tmp_path / "files") == errors(tmp_path / "memory")


def test_a_teacher_is_fitted_without_what_cannot_be_read(bad_root: Path, tmp_path: Path) -> None:
    fit = {
        "teacher__random_weights": None,
        "teacher__min_top1": 0,
        "teacher__fit__epochs": 1,
        "teacher__fit__batch_size": 12,
        "teacher__fit__optim__warmup_epochs": 0,
        "teacher__fit__folder": str(tmp_path / "teachers"),
    }
    assert main(["train", *tiny(bad_root, tmp_path / "run", **{**SKIP, **fit, "train__epochs": 1})]) == 0
    (teacher,) = (tmp_path / "teachers").iterdir()
    assert heads_in(teacher)["n"] == 19
    assert {line["path"] for line in errors(teacher) if line["split"] == "train"} == set(BAD_TRAIN)


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")  # of a token without views
def test_two_processes_and_accumulation_leave_out_what_one_process_does(photos_root: Path, tmp_path: Path) -> None:
    root = shutil.copytree(photos_root, tmp_path / "photos")
    spoil(root)
    for index in range(9):  # so many that a micro-batch of two has nothing to show
        (root / "train" / "rings" / f"{index:03d}.png").write_bytes(b"")
    options = {**SKIP, "train__epochs": 1, "optim__clip_grad_norm": 1.0, "distill__kind": "soft", "data__workers": 1}
    assert main(["train", *tiny(root, tmp_path / "one", **options)]) == 0
    two = tiny(root, tmp_path / "two", **options, train__accumulation_steps=2)
    run_on_two(["train", *two], tmp_path / "said.txt")
    assert errors(tmp_path / "one") == errors(tmp_path / "two")
    places = {line["position"] for line in errors(tmp_path / "two") if line["split"] == "train"}
    assert any(place % 2 == 0 and place + 1 in places for place in places)
    for one, other in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        if one["kind"] == "step":
            assert one["missing"] == other["missing"]
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert heads_in(tmp_path / "one")["n"] == heads_in(tmp_path / "two")["n"] == 19
    assert heads_in(tmp_path / "one")["unreadable"] == heads_in(tmp_path / "two")["unreadable"]


def test_lines_of_all_processes_are_written_once_and_the_limit_counts_photos(tmp_path: Path) -> None:
    names = {"train": [f"{index}.png" for index in range(8)]}
    told = DataErrors(tmp_path, names, most=2, processes=ONE_PROCESS)
    for step, rows in ((1, (3, 1)), (2, (1,))):
        told.step = step
        told.note("train", lacking(make_batch(), *rows))
        told.tell()
    assert [(line["step"], line["path"]) for line in errors(tmp_path)] == [(1, "1.png"), (1, "3.png"), (2, "1.png")]
    again = DataErrors(tmp_path, names, most=2, processes=ONE_PROCESS, first_step=1)
    again.tell()
    assert [line["step"] for line in errors(tmp_path)] == [1, 1]
    again.note("train", lacking(make_batch(), 3))
    again.tell()
    assert len(errors(tmp_path)) == 2
    again.note("train", lacking(make_batch(), 5))
    with pytest.raises(InputError, match=r"data\.max_errors: 3 photos are unreadable, more than 2"):
        again.tell()
    assert len(errors(tmp_path)) == 3


STORED = {"teacher__min_top1": 0, "distill__kind": "soft", "train__batch_size": 10, **SKIP}


@pytest.fixture
def stored(bad_root: Path, tmp_path: Path) -> LabelStore:
    """A store of all logits of the views and validation photos that can be read."""
    options = tiny(bad_root, tmp_path / "unused", **STORED)
    assert main(["store", "build", *options, "--store", str(tmp_path / "store")]) == 0
    return LabelStore(tmp_path / "store")


def test_a_store_of_hard_labels_with_marks_is_read_and_recorded_on(bad_root: Path, tmp_path: Path) -> None:
    options = {**STORED, "distill__kind": "hard", "teacher__store": str(tmp_path / "store")}
    recipe = tiny(bad_root, tmp_path / "online", **options, teacher__store_mode="record")
    assert main(["train", *recipe]) == 0
    assert main(["train", *tiny(bad_root, tmp_path / "stored", **options)]) == 0
    assert heads_in(tmp_path / "online") == heads_in(tmp_path / "stored")
    assert main(["store", "build", *recipe, "--store", str(tmp_path / "store")]) == 0


def test_a_store_marks_what_it_could_not_ask_and_its_run_is_the_online_one(
    stored: LabelStore, bad_root: Path, tmp_path: Path
) -> None:
    for epoch in range(2):
        assert int(is_missing(stored.columns(epoch_part(epoch))).sum()) == len(BAD_TRAIN)
    assert int(is_missing(stored.columns(VALIDATION)).sum()) == len(BAD_VALIDATION)
    assert {line["path"] for line in errors(stored.folder) if line["split"] == "train"} == set(BAD_TRAIN)
    assert main(["train", *tiny(bad_root, tmp_path / "online", **STORED)]) == 0
    assert main(["train", *tiny(bad_root, tmp_path / "stored", **STORED, teacher__store=str(stored.folder))]) == 0
    for one, other in zip(records(tmp_path / "online"), records(tmp_path / "stored"), strict=True):
        if one["kind"] == "step":
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    online, replayed = heads_in(tmp_path / "online"), heads_in(tmp_path / "stored")
    assert online["unreadable"] == replayed["unreadable"]
    assert online["teacher"] == pytest.approx(replayed["teacher"])


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_recording_run_marks_what_a_build_marks(kind: str, bad_root: Path, tmp_path: Path) -> None:
    options = {**STORED, "distill__kind": kind}
    places = {}
    for verb in ("record", "build"):
        places[verb] = tmp_path / verb
        recipe = tiny(bad_root, tmp_path / "run", **options)
        if verb == "record":
            arguments = ["train", *recipe, "--teacher.store_mode", "record", "--teacher.store", str(places[verb])]
        else:
            arguments = ["store", "build", *recipe, "--store", str(places[verb])]
        assert main(arguments) == 0
    for part in (VALIDATION, epoch_part(0), epoch_part(1)):
        marks = [is_missing(LabelStore(places[verb]).columns(part)) for verb in ("record", "build")]
        assert torch.equal(*marks)
        assert bool(marks[0].any())
    lines = {(line["epoch"], line["position"]) for line in errors(tmp_path / "run") if line["split"] == "train"}
    assert lines == {(line["epoch"], line["position"]) for line in errors(places["build"]) if line["split"] == "train"}


def test_store_check_passes_a_store_with_marks(stored: LabelStore, bad_root: Path, tmp_path: Path) -> None:
    options = tiny(bad_root, tmp_path / "unused", **STORED)
    assert main(["store", "check", str(stored.folder), *options, "--samples", "60"]) == 0


def test_a_view_that_could_be_asked_then_and_not_now_is_refused(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(photos_root, tmp_path / "photos")
    options = tiny(root, tmp_path / "run", **STORED)
    assert main(["store", "build", *options, "--store", str(tmp_path / "store")]) == 0
    bad = root / "train" / BAD_TRAIN[0]
    bad.write_bytes(b"x" * bad.stat().st_size)  # the size is all that a store knows of a photo's content
    line = refused(["train", *options, "--teacher.store", str(tmp_path / "store")], capsys)
    assert "whose photo could be read when the store was built and is unreadable now" in line


def test_a_view_that_could_not_be_asked_then_and_can_be_now_is_refused(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(photos_root, tmp_path / "photos")
    bad = root / "train" / BAD_TRAIN[0]
    content = bad.read_bytes()
    bad.write_bytes(b"x" * len(content))
    options = tiny(root, tmp_path / "run", **STORED)
    assert main(["store", "build", *options, "--store", str(tmp_path / "store")]) == 0
    bad.write_bytes(content)
    line = refused(["train", *options, "--teacher.store", str(tmp_path / "store")], capsys)
    assert "whose photo was unreadable when the store was built and can be read now" in line


@pytest.fixture
def at_step() -> Iterator[Callable[[int, Callable[[], None]], None]]:
    """Do something right after the n-th optimiser step."""
    handles = []

    def plan(step: int, act: Callable[[], None]) -> None:
        left = [step]

        def count(*_: Any) -> None:
            left[0] -= 1
            if not left[0]:
                act()

        handles.append(register_optimizer_step_post_hook(count))

    yield plan
    for handle in handles:
        handle.remove()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


@pytest.mark.parametrize("skip", ["raise", "skip"])
def test_a_folder_that_disappears_ends_the_run_and_keeps_the_checkpoint(
    skip: str, photos_root: Path, tmp_path: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(photos_root, tmp_path / "photos")
    at_step(3, lambda: shutil.rmtree(root))
    options = {"train__checkpoint_every_steps": 2, "data__on_error": skip}
    line = refused(["train", *tiny(root, tmp_path / "run", **options)], capsys)
    assert f"data.root: {root}/train disappeared" in line
    assert checkpoints(tmp_path / "run") == ["step-000000002.safetensors"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_changes_between_epochs_ends_the_run_though_it_may_skip(
    workers: int, photos_root: Path, tmp_path: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(photos_root, tmp_path / "photos")
    photo = root / "train" / "dots" / "004.png"
    at_step(6, lambda: Image.new("RGB", (20, 20)).save(photo))
    options = {"train__epochs": 9, "data__on_error": "skip", "data__workers": workers}
    line = refused(["train", *tiny(root, tmp_path / "run", **options)], capsys)
    assert f"{photo}: was changed while it was in use" in line
    assert "step-000000006.safetensors" in checkpoints(tmp_path / "run")


# Where the worker dies while it hands over a batch, torch counts open files with temporary ones, and leaves them so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_is_killed_ends_the_run_with_one_line_and_keeps_the_checkpoint(
    photos_root: Path, tmp_path: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    others = set(multiprocessing.active_children())  # left by another test

    def kill() -> None:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()

    at_step(7, kill)
    arguments = tiny(photos_root, tmp_path / "run", train__epochs=200, data__workers=2)
    line = refused(["train", *arguments], capsys)
    assert "data.workers: DataLoader worker" in line
    assert "step-000000006.safetensors" in checkpoints(tmp_path / "run")


def test_the_only_view_that_is_left_of_a_batch_is_normalised_by_running_statistics() -> None:
    student = tiny_student(
        name="levit_128s",
        args={"embed_dim": [16, 32, 48], "depth": [1, 1, 1], "num_heads": [2, 2, 2], "key_dim": 8},
        image_size=64,
    )
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    left = make_batch(2, side=64).without([Missing(1, 1, 0, 1, "broken")])
    Distiller(student, pixel_teacher, Objective("soft"))(left).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters() if parameter.grad is not None)
    assert student.backbone.head_dist.linear.weight.grad.abs().max() > 0
    torch.testing.assert_close(dict(student.named_buffers()), before, rtol=0, atol=0)
    assert all(module.training for module in student.modules())


def test_a_worker_that_dies_while_it_hands_over_a_batch_is_told_as_one_that_died() -> None:
    def dying(image: Image.Image) -> torch.Tensor:
        sharer: Any = resource_sharer._resource_sharer  # type: ignore[attr-defined]  # hands the memory over
        if sharer._listener is not None:
            sharer._listener.close()
            threading.Timer(0.3, os._exit, [1]).start()
        return torch.zeros(3, 8, 8)

    with pytest.raises(RuntimeError) as raised:
        list(training_loader(array_photos(24), dying, batch_size=4, workers=1).batches(0))
    assert "data.workers: DataLoader worker" in str(lost_worker(raised.value))


def program(*arguments: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-u", str(REPOSITORY / "train.py"), *arguments]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_program_that_refuses_a_photo_ends_though_it_has_workers(bad_root: Path, tmp_path: Path) -> None:
    with program(*tiny(bad_root, tmp_path / "run", data__workers=2, distill__kind="none")) as running:
        _, said = running.communicate(timeout=120)
    assert running.returncode == 2
    assert said.count("\n") == 1


INTERRUPTED_AT_ITS_END = """
import os, runpy, signal
from multiprocessing.popen_fork import Popen
terminate, sent = Popen.terminate, []
def interrupted(worker):
    if not sent:
        sent.append(worker)
        os.kill(os.getpid(), signal.SIGINT)
    terminate(worker)
Popen.terminate = interrupted
runpy.run_path("train.py", run_name="__main__")
"""


def test_an_interrupt_while_workers_are_ended_leaves_none(bad_root: Path, tmp_path: Path) -> None:
    arguments = tiny(bad_root, tmp_path / "run", data__workers=2, distill__kind="none")
    words = [sys.executable, "-c", INTERRUPTED_AT_ITS_END, *arguments]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2


def test_a_program_that_is_told_to_stop_ends_though_it_has_workers(photos_root: Path, tmp_path: Path) -> None:
    with program(*tiny(photos_root, tmp_path / "run", data__workers=2, train__epochs=2000)) as running:
        assert running.stdout is not None
        next(line for line in running.stdout if "step 2/" in line)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 143
    assert said.startswith("stopped by SIGTERM; the checkpoint of step ")


def test_evaluation_leaves_out_the_same_photos_as_training_did(bad_root: Path, tmp_path: Path) -> None:
    assert main(["train", *tiny(bad_root, tmp_path / "run", **SKIP)]) == 0
    assert main(["eval", str(tmp_path / "run"), "--to", str(tmp_path / "eval")]) == 0
    trained, evaluated = heads_in(tmp_path / "run"), heads_in(tmp_path / "eval")
    assert (trained["n"], trained["unreadable"]) == (evaluated["n"], evaluated["unreadable"])
    for head in ("cls", "dist", "fused"):
        assert trained["heads"][head]["top1"] == pytest.approx(evaluated["heads"][head]["top1"])


def test_every_process_numbers_its_share_of_a_split_as_the_split_does(bad_root: Path) -> None:
    for rank in range(2):
        loader = build_evaluation_loader(
            folder_splits(bad_root).validation,
            transform(),
            batch_size=4,
            rank=rank,
            processes=2,
            workers=0,
            pin_memory=False,
            skip=True,
        )
        share = range(rank, 21, 2)
        rows = [row for batch in loader for row in batch.missing]
        assert [row.photo for row in rows] == [index for index in (0, 18) if index in share]
