"""A run that reads a label store is the run that asked the teacher; what would make it another one is refused."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook, register_module_module_registration_hook

from deit_kd import FrozenTeacher
from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.console import console
from deit_kd.data.order import epoch_order
from deit_kd.distributed import Processes
from deit_kd.interfaces import InputError
from deit_kd.jobs.store import ACCEPTED, check
from deit_kd.losses import soft_distillation
from deit_kd.runs.lesson import Lesson
from deit_kd.runs.run import prepare
from deit_kd.store import VALIDATION, LabelStore, Record, epoch_part
from deit_kd.teaching import recording
from deit_kd.teaching.stored import stored_teacher
from tests.forked import run_on_two
from tests.helpers import (
    assert_same_scores,
    before_steps,
    evaluated,
    heads_in,
    refused,
    short,
    signal_in_step,
    tiny,
)

ONE_PROCESS = Processes(0, 1, torch.device("cpu"))
PHOTOS_PER_CLASS = {"train": 15, "validation": 6}
EPOCHS = 2


@dataclass(frozen=True)
class Home:
    """Photos of ten digits, and a teacher that was fitted to them."""

    photos: Path
    teachers: Path
    teacher: Path

    def arguments(self, output: Path | None = None, **options: Any) -> list[str]:
        """Return a small recipe with everything random on."""
        own = {
            "augment.horizontal_flip": 0.0,
            "augment.scale": [0.6, 1.0],
            "student.drop_path": None,
            "teacher.random_weights": None,
            "teacher.checkpoint": self.teacher,
            "distill.kind": "hard",
            "optim.lr": None,
            "train.epochs": EPOCHS,
            "train.batch_size": 16,
            "train.ema_decay": 0.9,
        }
        return tiny(self.photos, output, **{**own, **options})

    def train(self, output: Path, **options: Any) -> list[dict[str, Any]]:
        """Train, and return the records without their rates."""
        assert main(["train", *self.arguments(output=output, **options)]) == 0
        lines = (output / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines]

    def build(self, store: Path, epochs: int = EPOCHS, batch_size: int = 50, **options: Any) -> LabelStore:
        """Build a store."""
        extra = ["--store", str(store), "--epochs", str(epochs), "--batch_size", str(batch_size)]
        assert main(["store", "build", *self.arguments(**options), *extra]) == 0
        return LabelStore(store)


FIT = {
    "teacher.checkpoint": None,
    "teacher.fit.epochs": 16,
    "teacher.fit.batch_size": 30,
    "teacher.fit.optim.lr": 4e-3,
    "teacher.fit.augment.horizontal_flip": 0.0,
    "teacher.fit.augment.scale": [0.6, 1.0],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    top = tmp_path_factory.mktemp("store")
    digits = load_digits()
    for split, offset in (("train", 0), ("validation", PHOTOS_PER_CLASS["train"])):
        for label in range(10):
            folder = top / "photos" / split / f"digit{label}"
            folder.mkdir(parents=True)
            for index in np.flatnonzero(digits.target == label)[offset : offset + PHOTOS_PER_CLASS[split]]:
                grey = (digits.images[index] * (255 / 16)).astype(np.uint8)
                Image.fromarray(grey).save(folder / f"{index:04d}.png")
    half = Home(top / "photos", top / "teachers", Path())
    half.build(top / "fitted", epochs=1, **FIT, **{"teacher.fit.folder": half.teachers})
    (teacher,) = half.teachers.iterdir()
    return Home(half.photos, half.teachers, teacher)


@pytest.fixture(scope="module")
def hard(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of hard labels, two epochs."""
    return home.build(tmp_path_factory.mktemp("hard") / "store").folder


@pytest.fixture(scope="module")
def soft(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of all logits, two epochs."""
    return home.build(tmp_path_factory.mktemp("soft") / "store", **{"distill.kind": "soft"}).folder


@pytest.mark.parametrize("parts", [[], ["--part", "1/2"]])
def test_one_recipe_that_names_its_store_builds_it_checks_it_and_trains_with_it(
    parts: list[str], home: Home, tmp_path: Path
) -> None:
    recipe = home.arguments(**{"teacher.store": tmp_path / "store", "train.epochs": 1})
    assert main(["store", "build", *recipe, *parts]) == 0
    if parts:
        assert main(["store", "build", *recipe, "--part", "2/2"]) == 0
        assert main(["store", "build", *recipe, "--join"]) == 0
    assert main(["store", "check", str(tmp_path / "store"), *recipe, "--samples", "20"]) == 0
    assert main(["train", *recipe, "--output", str(tmp_path / "run")]) == 0


@pytest.fixture
def no_teacher() -> Iterator[None]:
    def refuse(module: nn.Module, *_: Any) -> None:
        assert not isinstance(module, FrozenTeacher), "a teacher was built"

    hook = register_module_module_registration_hook(refuse)
    yield
    hook.remove()


def test_the_fitted_teacher_knows_its_digits(home: Home, hard: Path) -> None:
    top1 = LabelStore(hard).score()["top1"]
    assert top1 is not None
    assert top1 > 60


@pytest.mark.parametrize(
    "options",
    [{}, {"train.batch_size": 24, "train.accumulation_steps": 3, "data.workers": 2}, {"augment.label_smoothing": 0.0}],
)
def test_a_run_on_stored_hard_labels_is_the_online_run_bit_for_bit(
    home: Home, hard: Path, tmp_path: Path, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    online = home.train(tmp_path / "online", **options)
    request.getfixturevalue("no_teacher")
    stored = home.train(tmp_path / "stored", **options, **{"teacher.store": hard})
    assert stored == online
    weights = [load_file(tmp_path / run / "student" / "model.safetensors") for run in ("online", "stored")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    heads = [heads_in(tmp_path / run) for run in ("online", "stored")]
    assert heads[0] == heads[1]


def test_a_run_on_all_stored_logits_is_the_online_run_within_fp16_rounding(
    home: Home, soft: Path, tmp_path: Path
) -> None:
    options = {"distill.kind": "soft", "distill.temperature": 2.0}
    online = home.train(tmp_path / "online", **options)
    stored = home.train(tmp_path / "stored", **options, **{"teacher.store": soft})
    for one, other in zip(online, stored, strict=True):
        if one["kind"] == "step":
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert one.get("teacher") == other.get("teacher")


def test_stored_logits_serve_hard_distillation_bit_for_bit(home: Home, soft: Path, tmp_path: Path) -> None:
    online = home.train(tmp_path / "online", **{"train.epochs": 1})
    assert home.train(tmp_path / "stored", **{"train.epochs": 1, "teacher.store": soft}) == online


def same_answers(one: LabelStore, other: LabelStore, epochs: int) -> None:
    for part in (VALIDATION, *map(epoch_part, range(epochs))):
        logits = [store.record.decode(store.columns(part)) for store in (one, other)]
        torch.testing.assert_close(*logits, atol=2e-2, rtol=2e-3)
        assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))


def test_recording_changes_nothing_in_the_run_and_fills_every_position(home: Home, soft: Path, tmp_path: Path) -> None:
    options = {"distill.kind": "soft", "train.batch_size": 28}
    online = home.train(tmp_path / "online", **options)
    record = {"teacher.store": tmp_path / "store", "teacher.store_mode": "record"}
    assert home.train(tmp_path / "recorded", **options, **record) == online
    recorded = LabelStore(tmp_path / "store")
    assert recorded.epochs == EPOCHS
    assert recorded.manifest["views"] % 28  # the epoch's end, which no step trains on, was asked for
    assert recorded.digest == LabelStore(soft).digest
    same_answers(recorded, LabelStore(soft), EPOCHS)


@pytest.mark.parametrize(
    "options", [{"augment.repeats": 3}, {"augment.mixup": 0, "augment.cutmix": 0}, {"data.workers": 2}]
)
def test_a_store_does_not_depend_on_how_it_was_asked(home: Home, tmp_path: Path, options: dict[str, Any]) -> None:
    soft_options = {"distill.kind": "soft", **options}
    one = home.build(tmp_path / "one", 1, 7, **soft_options)
    other = home.build(tmp_path / "other", 1, 64, **{**soft_options, "data.workers": 0})
    same_answers(one, other, 1)


@pytest.mark.parametrize("verb", ["build", "record"])
def test_two_processes_store_what_one_does(home: Home, soft: Path, tmp_path: Path, verb: str) -> None:
    place = tmp_path / "store"
    if verb == "build":
        arguments = ["store", "build", *home.arguments(**{"distill.kind": "soft"}), "--store", str(place)]
    else:
        options = {"distill.kind": "soft", "teacher.store": place, "teacher.store_mode": "record"}
        arguments = ["train", *home.arguments(output=tmp_path / "run", **options, **{"train.batch_size": 28})]
    run_on_two(arguments, tmp_path / "said.txt")
    same_answers(LabelStore(place), LabelStore(soft), EPOCHS)


def test_an_interrupted_build_asks_only_for_what_is_missing(
    home: Home, hard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    break_at: float = 215

    def count(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, FrozenTeacher) and inputs[0].view_ids is not None:
            asked.append(len(inputs[0].labels))
            if sum(asked) > break_at:
                raise KeyboardInterrupt

    monkeypatch.setattr("deit_kd.store.teacher.VIEWS_PER_PIECE", 30)
    hook = register_module_forward_pre_hook(count)
    try:
        with pytest.raises(KeyboardInterrupt):
            home.build(tmp_path / "store", batch_size=10)
        assert LabelStore(tmp_path / "store").epochs == 1
        asked.clear()
        break_at = math.inf
        built = home.build(tmp_path / "store", batch_size=10)
    finally:
        hook.remove()
    assert sum(asked) == 300 - 210
    same_answers(built, LabelStore(hard), EPOCHS)


def test_a_recording_run_that_was_interrupted_fills_the_rest_when_it_is_resumed(
    home: Home, hard: Path, tmp_path: Path
) -> None:
    options = {
        "teacher.store": tmp_path / "store",
        "teacher.store_mode": "record",
        "train.checkpoint_every_steps": 2,
    }
    unbroken = home.train(tmp_path / "unbroken")

    def dies(step: int) -> None:
        if step == 13:  # in the second epoch of nine steps; unwritten records are lost
            raise KeyboardInterrupt

    with before_steps(dies), pytest.raises(KeyboardInterrupt):
        home.train(tmp_path / "run", **options)
    assert home.train(tmp_path / "run", **options, resume="auto") == unbroken
    same_answers(LabelStore(tmp_path / "store"), LabelStore(hard), EPOCHS)


@pytest.fixture(scope="module")
def stopped(photos_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments that resume a run which recorded a store and was stopped in its second epoch."""
    place = tmp_path_factory.mktemp("stopped")
    record = {"teacher.store": place / "store", "teacher.store_mode": "record", "train.batch_size": 12}
    arguments = ["train", *short(photos_root, place / "run", **record), "--resume", "auto"]
    with signal_in_step(signal.SIGTERM, 5):
        assert main(arguments) == 143
    return arguments


def test_a_resumed_run_records_into_no_store_that_lacks_what_it_has_behind_it(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused([*stopped, "--teacher.store", str(tmp_path / "other")], capsys)
    assert "other lacks epoch 0 of the views" in said
    assert "store build --epochs 1" in said
    assert not (tmp_path / "other").exists()


def test_a_run_that_records_is_not_resumed_as_one_that_reads(
    stopped: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused([*stopped, "--teacher.store_mode", "read"], capsys)
    assert "was started with a teacher that answers itself" in said
    assert "teacher.store_mode record" in said


def test_a_finished_run_whose_store_is_gone_ends_as_before(stopped: list[str], tmp_path: Path) -> None:
    run = Path(stopped[stopped.index("--output") + 1])
    shutil.copytree(run, tmp_path / "run")
    store = shutil.copytree(run.parent / "store", tmp_path / "store")
    moved = [*stopped, "--output", str(tmp_path / "run"), "--teacher.store", str(store)]
    assert main(moved) == 0
    heads = heads_in(tmp_path / "run")
    shutil.rmtree(store)
    assert main(moved) == 0
    assert heads_in(tmp_path / "run") == heads


def test_a_longer_run_cycles_and_keeps_to_its_epochs_when_the_store_has_grown(home: Home, tmp_path: Path) -> None:
    home.build(tmp_path / "store", 1)
    options = {"teacher.store": tmp_path / "store", "train.epochs": 3}
    with console.capture() as capture:
        records = home.train(tmp_path / "run", **options)
    assert "1 epoch of views, repeated for 3 epochs" in capture.get()
    home.build(tmp_path / "store", 2)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    checkpoints[-1].unlink()
    assert home.train(tmp_path / "run", **options, resume="auto") == records
    assert json.loads((tmp_path / "run" / "run.json").read_text())["teacher"]["view_epochs"] == 1


def test_a_run_reads_all_of_its_store_ahead_also_from_the_middle_of_an_epoch(
    home: Home, soft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []
    options = {"teacher.store": soft, "distill.kind": "soft", "train.epochs": 3, "train.accumulation_steps": 2}
    options |= {"train.checkpoint_every_steps": 4, "train.keep_checkpoints": 99}
    with monkeypatch.context() as patches:
        patches.setattr(Lesson, "reading_ahead", lambda *_: nullcontext())
        unbroken = home.train(tmp_path / "run", **options)
    find = LabelStore.find

    def noting(store: LabelStore, *asked: Any, **named: Any) -> Any:
        readers.append(threading.current_thread().name.partition("_")[0])
        return find(store, *asked, **named)

    monkeypatch.setattr(LabelStore, "find", noting)
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-*"):
        if checkpoint.name > "step-000000012.safetensors":  # an epoch is 9 steps
            checkpoint.unlink()
    assert home.train(tmp_path / "run", **options, resume="auto") == unbroken
    assert readers == ["store-records"] * 2 * (27 - 12)


def test_a_store_of_repeated_views_deals_epochs_that_show_all_photos(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"augment.repeats": 3, "train.epochs": 7}
    reading = home.arguments(output=tmp_path / "run", **options, **{"teacher.store": tmp_path / "store"})
    home.build(tmp_path / "store", 2, **options)
    said = " ".join(capsys.readouterr().out.split())
    assert "2 epochs do not show all photos equally often; for runs of more epochs store 3, or another" in said
    said = refused(["train", *reading], capsys)
    assert "holds 2 epochs of views, but with augment.repeats 3 it takes 3 to show every" in said
    home.build(tmp_path / "store", 4, **options)
    assert ready(reading).facts["view_epochs"] == 3


def test_an_old_store_is_read_in_the_order_that_it_was_made_in(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"augment.repeats": 3, "train.epochs": 1}
    with monkeypatch.context() as patch:
        patch.setattr(recording, "VIEWS_VERSION", 1)
        store = home.build(tmp_path / "store", 1, **options)
    assert store.views_version == 1
    config, _ = parse_config(
        home.arguments(output=tmp_path / "run", **options, **{"teacher.store": tmp_path / "store"})
    )
    assert check(config, str(tmp_path / "store"), 100)["argmax"] == 0
    run = prepare(config, ONE_PROCESS)
    stored_teacher(run)
    order = epoch_order(150, 3, 0, 0, version=1)
    assert [key.photo for key in run.loader.views_of_step(0)] == order[:16].tolist()


def test_another_form_of_record_is_refused_on_resume(
    home: Home, hard: Path, soft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home.train(tmp_path / "run", **{"teacher.store": hard, "train.epochs": 1})
    arguments = home.arguments(output=tmp_path / "run", resume="auto", **{"teacher.store": soft, "train.epochs": 1})
    assert "was started with another label store" in refused(["train", *arguments], capsys)


def ready(arguments: list[str]) -> Any:
    config, _ = parse_config(arguments)
    return stored_teacher(prepare(config, ONE_PROCESS))


@pytest.mark.parametrize(
    "options",
    [
        {"distill.alpha": 0.9},
        {"distill.temperature": 1.0},
        {"optim.lr": 0.1},
        {"train.batch_size": 10},
        {"train.epochs": 7},
        {"data.workers": 1},
        {"augment.label_smoothing": 0.0},
        {"student.args": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}},
        {"teacher.channels_last": False},
        {"teacher.image_size": 16},
        {"teacher.name": None, "teacher.checkpoint": None},
        {"evaluate.batch_size": 3},
    ],
)
def test_what_changes_no_view_and_no_answer_is_free(home: Home, hard: Path, tmp_path: Path, options: Any) -> None:
    assert ready(home.arguments(output=tmp_path / "run", **{"teacher.store": hard, **options})).facts["name"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, "seed: 0 in the store, 1 here"),
        ({"data.image_size": 24}, "data.image_size: 16 in the store, 24 here"),
        ({"data.cache_size": 6}, "data.cache_size: None in the store, 6 here"),
        ({"data.crop_fraction": 0.5}, "data.crop_fraction: 1.0 in the store, 0.5 here"),
        ({"data.interpolation": "bilinear"}, "data.interpolation: 'bicubic' in the store, 'bilinear' here"),
        ({"data.mean": [0.5, 0.456, 0.406]}, "data.mean: item 0 is 0.485 in the store, 0.5 here"),
        ({"augment.auto_augment": "rand-m9-mstd0.5-inc1"}, "augment.auto_augment: None in the store, 'rand"),
        ({"augment.color_jitter": 0.1}, "augment.color_jitter: 0.3 in the store, 0.1 here"),
        ({"augment.horizontal_flip": 0.5}, "augment.horizontal_flip: 0.0 in the store, 0.5 here"),
        ({"augment.scale": [0.5, 1.0]}, "augment.scale: item 0 is 0.6 in the store, 0.5 here"),
        ({"augment.ratio": [0.9, 1.0]}, "augment.ratio: "),
        ({"augment.erasing": 0.0}, "augment.erasing: 0.25 in the store, 0.0 here"),
        ({"augment.repeats": 3}, "augment.repeats: 1 in the store, 3 here"),
        ({"augment.mixup": 0.0}, "augment.mixup: 0.8 in the store, 0.0 here"),
        ({"augment.cutmix": 0.0}, "augment.cutmix: 1.0 in the store, 0.0 here"),
        ({"augment.mix_probability": 0.5}, "augment.mix_probability: 1.0 in the store, 0.5 here"),
        ({"augment.mix_switch_probability": 0.1}, "augment.mix_switch_probability: 0.5 in the store, 0.1 here"),
        ({"teacher.name": "resnet18"}, "teacher.name: 'test_resnet' in the store, 'resnet18' here"),
        ({"teacher.image_size": 32}, "teacher.image_size: 16 in the store, 32 here"),
        ({"teacher.precision": "bf16"}, "teacher.precision: 'off' in the store, 'bf16' here"),
        ({"train.precision": "bf16"}, "teacher.precision: 'off' in the store, 'bf16' here"),
        ({"teacher.args": {"drop_rate": 0.5}}, "teacher.args: {} in the store"),
        ({"teacher.mean": [0.5, 0.5, 0.5]}, "teacher.mean: None in the store"),
        ({"teacher.checkpoint": None, "teacher.pretrained": True}, "teacher.source: 'file' in the store, 'timm' here"),
        ({"teacher.checkpoint": None, "teacher.fit.epochs": 3}, "teacher.source: 'file' in the store, 'test_resnet-"),
        ({"distill.kind": "soft"}, "distill.kind: 'soft' needs logits"),
    ],
)
def test_what_changes_a_view_or_an_answer_is_refused_with_both_values(
    home: Home, hard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: Any, said: str
) -> None:
    arguments = home.arguments(output=tmp_path / "run", **{"teacher.store": hard, **options})
    assert said in refused(["train", *arguments], capsys)
    assert not (tmp_path / "run").exists()


def rename_class(top: Path) -> None:
    for split in PHOTOS_PER_CLASS:
        (top / split / "digit3").rename(top / split / "digit3b")


def add_photo(top: Path) -> None:
    shutil.copy(next((top / "train" / "digit3").iterdir()), top / "train" / "digit3" / "0000.png")


def rename_photo(top: Path) -> None:
    photo = next((top / "train" / "digit3").iterdir())
    photo.rename(photo.with_name("other.png"))


def grow_photo(top: Path) -> None:
    with open(next((top / "validation" / "digit3").iterdir()), "ab") as file:
        file.write(b" ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename_class, "classes: item 3 is 'digit3' in the store, 'digit3b' here"),
        (add_photo, "train.images: 150 in the store, 151 here"),
        (rename_photo, "train.photos: "),
        (grow_photo, "validation.photos: "),
    ],
)
def test_other_photos_are_refused(home: Home, hard: Path, tmp_path: Path, change: Any, said: str) -> None:
    shutil.copytree(home.photos, tmp_path / "photos")
    same = home.arguments(output=tmp_path / "run", **{"teacher.store": hard, "data.root": tmp_path / "photos"})
    assert ready(same).facts
    change(tmp_path / "photos")
    with pytest.raises(InputError, match=said):
        ready(same)


def test_other_weights_of_the_same_teacher_are_refused(home: Home, hard: Path, tmp_path: Path) -> None:
    shutil.copytree(home.teacher, tmp_path / "teacher")
    file = tmp_path / "teacher" / "student" / "model.safetensors"
    arguments = home.arguments(**{"teacher.store": hard, "teacher.checkpoint": tmp_path / "teacher"})
    assert ready(arguments).facts
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"teacher\.weights: "):
        ready(arguments)


def test_a_fitted_teacher_that_is_elsewhere_is_neither_fitted_nor_missed(home: Home, tmp_path: Path) -> None:
    fit = {**FIT, "teacher.fit.folder": home.teachers}
    home.build(tmp_path / "store", 1, **fit)
    elsewhere = {**FIT, "teacher.fit.folder": tmp_path / "none", "teacher.store": tmp_path / "store"}
    assert ready(home.arguments(**elsewhere)).facts
    with pytest.raises(InputError, match=r"teacher\.source: 'test_resnet-\w+' in the store, 'test_resnet-\w+' here"):
        ready(home.arguments(**{**elsewhere, "teacher.fit.epochs": 3}))


def flip_a_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def cut(content: bytes) -> bytes:
    return content[:-1]


@pytest.mark.parametrize(("file", "damage"), [("epoch-00001", cut), ("validation", flip_a_bit)])
def test_a_damaged_store_is_found_before_training(
    home: Home,
    hard: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    damage: Callable[[bytes], bytes],
) -> None:
    part = shutil.copytree(hard, tmp_path / "store") / f"{file}.safetensors"
    part.write_bytes(damage(part.read_bytes()))
    arguments = home.arguments(output=tmp_path / "run", **{"teacher.store": tmp_path / "store"})
    assert f"{part} is truncated or altered" in refused(["train", *arguments], capsys)
    assert not (tmp_path / "run").exists()


def test_a_checksum_is_compared_when_an_epoch_is_first_read(
    home: Home, hard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = shutil.copytree(hard, tmp_path / "store") / "epoch-00001.safetensors"
    good = part.read_bytes()
    part.write_bytes(flip_a_bit(good))
    arguments = home.arguments(output=tmp_path / "run", **{"teacher.store": tmp_path / "store"})
    assert f"{part} is truncated or altered (its checksum differs)" in refused(["train", *arguments], capsys)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines if '"kind": "epoch"' in line] == [0]
    part.write_bytes(good)
    assert main(["train", *arguments, "--resume", "auto"]) == 0


def of_other_libraries(store: Path, place: Path) -> Path:
    """Copy a store to `place` as one that other versions of the libraries made."""
    shutil.copytree(store, place)
    manifest = json.loads((place / "store.json").read_text())
    manifest["libraries"] = [{**manifest["libraries"][0], "pillow": "99.0"}]
    (place / "store.json").write_text(json.dumps(manifest))
    return place


def test_other_libraries_are_refused_until_a_check_passes(home: Home, soft: Path, tmp_path: Path) -> None:
    store = of_other_libraries(soft, tmp_path / "store")
    arguments = home.arguments(**{"teacher.store": store})
    with pytest.raises(InputError, match=r"pillow: '99\.0' in the store, '[\d.]+' here.*run deit-kd store check"):
        ready(arguments)
    with console.capture() as capture:
        assert main(["store", "check", str(store), *home.arguments(), "--samples", "20"]) == 0
    assert f"pillow {PIL.__version__}" in capture.get()
    assert ready(arguments).facts


def test_a_store_of_the_devices_views_teaches_as_its_teacher_does_and_no_views_but_those(
    home: Home, soft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = {"data.executor": "device", "data.cache": "memory", "train.epochs": 1}
    store = home.build(tmp_path / "store", epochs=1, **device)
    online = home.train(tmp_path / "online", **device)
    assert home.train(tmp_path / "stored", **device, **{"teacher.store": store.folder}) == online
    arguments = home.arguments(**device, **{"teacher.store": store.folder})
    with pytest.raises(InputError, match=r"data\.executor: 'device 1' in the store, 'pillow' here"):
        ready([*arguments, "--data.executor", "pillow"])
    check_soft = ["store", "check", str(soft), *home.arguments(**device, **{"distill.kind": "soft"})]
    assert "disagrees with this teacher's answers" in refused([*check_soft, "--samples", "20"], capsys)
    monkeypatch.setattr("deit_kd.runs.viewing.EXECUTOR_VERSION", 2)
    with pytest.raises(InputError, match=r"data\.executor: 'device 1' in the store, 'device 2' here"):
        ready(arguments)
    assert main(["store", "check", str(store.folder), *arguments, "--samples", "20"]) == 0
    assert ready(arguments).facts


@pytest.mark.parametrize(("kind", "changed"), [("hard", 0.01), ("soft", 0.01), ("soft", 1.0)])
def test_a_check_finds_views_that_are_made_otherwise(
    home: Home,
    hard: Path,
    soft: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    changed: float,
) -> None:
    monkeypatch.setitem(ACCEPTED, "argmax", changed)
    place = of_other_libraries(hard if kind == "hard" else soft, tmp_path / "store")
    for epoch in range(EPOCHS):  # the answers to each epoch's views are those to another's
        (place / f"{epoch_part(epoch)}.safetensors").unlink()
        store = LabelStore(place)
        others = LabelStore(hard if kind == "hard" else soft).columns(epoch_part(EPOCHS - 1 - epoch))
        store.write_piece(epoch_part(epoch), torch.arange(store.manifest["views"]), others)
        store.finish(epoch_part(epoch))
    before = (place / "store.json").read_bytes()
    arguments = ["store", "check", str(place), *home.arguments(), "--samples", "60"]
    assert "disagrees with this teacher's answers to these views" in refused(arguments, capsys)
    assert (place / "store.json").read_bytes() == before


def test_a_check_reports_how_far_the_answers_are(home: Home, soft: Path) -> None:
    config, _ = parse_config(home.arguments())
    result = check(config, str(soft), 40)
    assert result.keys() == {"argmax", "logits"}
    assert result["argmax"] == 0
    assert 0 < result["logits"] < 1e-3


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_evaluating_a_stored_run_reads_the_teacher_from_the_store(
    home: Home, hard: Path, soft: Path, tmp_path: Path, no_teacher: None, kind: str
) -> None:
    run = tmp_path / "run"
    store = hard if kind == "hard" else soft
    home.train(run, **{"teacher.store": store, "train.epochs": 1, "distill.kind": kind})
    assert main(["eval", str(run), "--diagnose", "true"]) == 0
    evaluation, trained = evaluated(run), heads_in(run)
    assert_same_scores(evaluation, trained)
    assert evaluation["teacher"]["top1"] == trained["teacher"]["top1"]
    assert "teacher" in evaluation["disagreement"]["names"]
    assert ("teacher" in evaluation["reliability"]) == (kind == "soft")  # hard labels have no confidence
    with console.capture() as capture:
        assert main(["eval", str(run), "--split", "train"]) == 0
    assert "without the teacher: teacher.store" in capture.get()


def test_a_teacher_that_is_named_is_asked_instead_of_the_runs_store(home: Home, hard: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    home.train(run, **{"teacher.store": hard, "train.epochs": 1})
    other = shutil.copytree(home.teacher, tmp_path / "teacher")
    assert main(["eval", str(run), "--teacher.checkpoint", str(other), "--to", str(tmp_path / "to")]) == 0
    heads = heads_in(tmp_path / "to")
    assert "teacher" in heads["reliability"]  # which a store of hard labels cannot tell


def test_a_stored_run_is_reported_with_its_teacher(home: Home, hard: Path, tmp_path: Path, no_teacher: None) -> None:
    home.train(tmp_path / "run", **{"teacher.store": hard, "train.epochs": 1, "evaluate.report": True})
    assert 'data-head="teacher"' in (tmp_path / "run/report/report.html").read_text()


def test_a_student_without_a_run_is_compared_with_a_stored_teacher(home: Home, hard: Path, tmp_path: Path) -> None:
    home.train(tmp_path / "run", **{"teacher.store": hard, "train.epochs": 1})
    options = {"--data.root": home.photos, "--data.workers": 0, "--teacher.store": hard, "--to": tmp_path / "to"}
    arguments = [str(part) for pair in options.items() for part in pair]
    assert main(["eval", str(tmp_path / "run" / "student"), *arguments]) == 0
    teacher = heads_in(tmp_path / "to")["teacher"]
    assert teacher["nll"] == LabelStore(hard).score()["nll"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build"], "--store: is not set"),
        (["build", "--store", "S", "--distill.kind", "none"], "'none' needs no answers of a teacher"),
        (["build", "--store", "S", "--epochs", "0"], "must be above 0"),
        (["build", "--teacher.store_mode", "record"], "teacher.store_mode: record needs a folder to fill"),
        (["check", "S"], "S is not there"),
        (["check", ".", "--samples", "0"], "--samples: 0 is not above 0"),
        (["info"], "name the folder of one store"),
        (["info", "S"], "S is not there"),
        (["biuld"], "nearest: build"),
    ],
)
def test_bad_input_gets_one_clear_line(
    home: Home, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    recipe = home.arguments() if arguments[0] in ("build", "check") else []
    assert said in refused(["store", arguments[0], *recipe, *arguments[1:]], capsys)


def test_a_store_goes_on_in_the_form_it_was_begun(
    home: Home, soft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(soft, tmp_path / "store")
    assert home.build(tmp_path / "store", 3).epochs == 3  # a hard recipe may add to logits
    build = ["store", "build", *home.arguments(), "--store", str(tmp_path / "store"), "--teacher.store_top", "4"]
    assert "teacher.store_top: " in refused(build, capsys)


def test_info_says_what_is_in_a_store_and_what_may_use_it(home: Home, hard: Path) -> None:
    with console.capture() as capture:
        assert main(["store", "info", str(hard)]) == 0
    out = capture.get()
    for fact in (
        "2 epochs of 150 views, 60 validation images",
        "only the hard label of 10 classes, 2 bytes",
        "augment.scale: [0.6, 1.0]",
        "teacher.name: test_resnet",
        "may be used with distill.kind hard, and with any student",
    ):
        assert fact in out


@pytest.mark.parametrize(
    ("top", "temperature", "bound"),
    [
        (10, 1.0, 1e-5),
        (10, 2.0, 1e-5),
        (10, 4.0, 1e-5),
        (5, 1.0, 0.01),
        (5, 2.0, 0.01),
        (5, 4.0, 0.01),
        (3, 1.0, 0.05),
        (3, 2.0, 0.05),
        (3, 4.0, 0.05),
        (1, 1.0, 0.5),
    ],
)
def test_the_divergence_from_a_trained_teacher_is_small(
    home: Home, soft: Path, top: int, temperature: float, bound: float
) -> None:
    store = LabelStore(soft)
    teacher = store.record.decode(store.columns(epoch_part(0)))
    record = Record(classes=10, top=top)
    replayed = record.decode(record.encode(teacher))
    divergence = soft_distillation(replayed, teacher, temperature) / temperature**2
    assert float(divergence.mean()) < bound
    assert float(divergence.mean()) >= -1e-7
