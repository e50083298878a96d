"""Teachers without a head, photos without labels, and what a student's features are worth without its heads."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deit_kd import InputError
from deit_kd.cli import main
from deit_kd.config import parse_config
from deit_kd.console import console
from deit_kd.data.mixing import Example, Mixing
from deit_kd.data.photos import UNLABELLED
from deit_kd.metrics import neighbour_classes
from deit_kd.metrics.linear import linear_classes
from deit_kd.metrics.neighbours import neighbours_among
from deit_kd.runs import vectors
from deit_kd.runs.held_out import was_trained_on
from deit_kd.teachers import check_features, least_top1
from deit_kd.teaching.fit import teacher_folder
from tests.forked import run_on_two
from tests.helpers import CLASSES, heads_in, refused, tiny
from tests.tiny_parts import folder_splits, make_batch, save_student, save_teacher, seen_at, tiny_student, tiny_teacher

# What neighbours and probes say


@pytest.mark.parametrize(("images", "neighbours"), [(1, 1), (2, 1), (21, 5), (341, 18), (400, 20), (50_000, 20)])
def test_twenty_neighbours_are_asked_or_the_root_of_few_images(images: int, neighbours: int) -> None:
    assert neighbours_among(images) == neighbours


def test_one_near_neighbour_outvotes_two_that_are_farther() -> None:
    # exp(.9 / .07) = 383,700 is more than 2 exp(.8 / .07) = 183,900; a plain majority of the three says 1.
    cosines = torch.tensor([0.9, 0.8, 0.8, *[-1.0] * 6])
    known = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1) * torch.arange(1, 10)[:, None]
    asked = torch.tensor([[5.0, 0.0]])
    assert neighbour_classes(known, torch.tensor([0, 1, 1, *[1] * 6]), asked).tolist() == [0]
    assert neighbour_classes(known, torch.tensor([1, 0, 0, *[0] * 6]), asked).tolist() == [1]


def test_a_linear_probe_finds_a_small_feature_among_large_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 2
    features = torch.randn(120, 6, generator=draw) * 100
    features[:, 3] = labels * 1e-3
    found, strength = linear_classes(features[:80], labels[:80], features[80:], seed=0)
    assert (found == labels[80:]).all()
    assert strength > 1e-4
    assert (neighbour_classes(features[:80], labels[:80], features[80:]) == labels[80:]).float().mean() < 0.8


def test_a_class_of_one_image_does_not_stop_the_probe() -> None:
    features = torch.eye(4).repeat(3, 1)[:10]
    found, _ = linear_classes(features, torch.tensor([0, 1, 2, 2, 0, 1, 2, 2, 0, 3]), features, seed=0)
    assert found.tolist()[:3] == [0, 1, 2]


# A network without its head


def test_a_teacher_without_its_head_answers_with_the_features_under_it(tmp_path: Path) -> None:
    file = save_teacher(tmp_path / "teacher", ("other", "classes"))
    headless = tiny_teacher(checkpoint=str(file), head=False)
    headless.ask_for(("pooled", "layer2"))
    answer = headless(make_batch(4))
    network = tiny_teacher(seed=7, classes=("other", "classes")).network
    expected = network.forward_head(network.forward_features(make_batch(4).images), pre_logits=True)
    assert answer.logits is None
    assert answer.features is not None
    assert torch.allclose(answer.features["pooled"], expected, atol=1e-5)
    assert answer.features["layer2"].ndim == 4
    assert [line for line in headless.lines() if "its head of 2 columns is left out" in line]


def test_weights_that_never_had_a_head_are_a_teacher_without_one(tmp_path: Path) -> None:
    state = tiny_teacher(seed=7).network.state_dict()
    file = tmp_path / "backbone.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items() if not name.startswith("fc.")}, file)
    headless = tiny_teacher(checkpoint=str(file), head=False)
    assert "its weights have no head" in headless.lines()[1]
    with pytest.raises(InputError, match=r"has no head .*or set its head to false"):
        tiny_teacher(checkpoint=str(file))


def test_a_backbone_that_is_not_whole_is_refused_without_its_head_too(tmp_path: Path) -> None:
    state = tiny_teacher(seed=7).network.state_dict()
    file = tmp_path / "part.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items() if "layer3" not in name}, file)
    with pytest.raises(InputError, match=r"layer3.*is missing"):
        tiny_teacher(checkpoint=str(file), head=False)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "deit_tiny_distilled_patch16_224"])
def test_any_network_can_go_without_its_head(name: str) -> None:
    args = {"embed_dim": 24, "depth": 1, "num_heads": 2} if name.startswith("deit") else {}
    headless = tiny_teacher(name=name, args=args, head=False, student=seen_at(32))
    headless.ask_for(("pooled",))
    features = headless(make_batch(4, side=32)).features
    assert features is not None
    assert features["pooled"].shape[0] == 4
    assert features["pooled"].ndim == 2


@pytest.mark.parametrize("name", ["convnext_tiny.dinov3_lvd1689m", "convnext_tiny.eupe_lvd1689m"])
def test_a_tag_that_was_published_without_a_head_says_so_before_it_is_downloaded(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} was published without a head.*set teacher.head .*false"):
        tiny_teacher(name=name, pretrained=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distill__kind": "soft"}, "teacher.head: false gives no logits for soft labels"),
        ({"distill__kind": "hard"}, "teacher.head: false gives no logits for hard labels"),
        ({"distill__kind": "standardised"}, "teacher.head: false gives no logits for standardised labels"),
        ({"distill__terms": [{"kind": "soft"}]}, "teacher.head: false gives no logits for soft labels"),
        ({"teacher__store": "labels", "teacher__store_mode": "record"}, "teacher.store: keeps logits"),
        ({"teacher__class_map": "map.json"}, "teacher.class_map: names columns"),
        ({"guide__head": False, "guide__label_set": "imagenet-1k"}, "guide.label_set: names columns"),
        ({"teacher__members": [{"name": "resnet18", "head": False}]}, "head"),
    ],
)
def test_a_teacher_without_a_head_is_refused_where_logits_are_wanted(
    photos_root: Path, tmp_path: Path, options: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"teacher__head": False, "distill__kind": "none", **options}
    assert words in refused(["train", *tiny(photos_root, tmp_path / "run", **own)], capsys)
    assert not (tmp_path / "run").exists()


# Its gate


def test_features_must_score_above_guessing() -> None:
    labels = [0] * 60 + [1] * 40
    least = least_top1(labels)
    check_features("net", {"knn": least, "images": 9}, labels, None)
    check_features("net", {"knn": 10, "images": 9}, labels, 10)
    said = r"features of net score .* by k-NN, from 9 training images to 100 of validation, below"
    for score, own in ((least - 0.1, None), (60, 70)):
        with pytest.raises(InputError, match=said):
            check_features("net", {"knn": score, "images": 9}, labels, own)


PRETRAINING: dict[str, Any] = {
    "data__image_size": 32,
    "distill__kind": "none",
    "distill__alpha": 1,
    "distill__terms": [{"kind": "pooled"}],
    "teacher__head": False,
    "train__batch_size": 16,
}


@pytest.mark.parametrize("unread", [0, 1])
def test_a_teacher_whose_features_say_nothing_is_refused(
    unread: int, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(photos_root, tmp_path / "photos")
    for photo in sorted((root / "validation").rglob("*.png"))[:unread]:
        photo.write_bytes(b"no photo")
    file = save_teacher(tmp_path / "teacher") / "model.safetensors"
    state = load_file(file)
    save_file({name: tensor * 0 if tensor.is_floating_point() else tensor for name, tensor in state.items()}, file)
    own = {"data__on_error": "skip", "teacher__random_weights": None, "teacher__checkpoint": str(file.parent)}
    said = refused(["train", *tiny(root, tmp_path / "run", **{**PRETRAINING, **own})], capsys)
    assert f"by k-NN, from 48 training images to {21 - unread} of validation, below" in said
    assert not (tmp_path / "run/run.json").exists()


@pytest.mark.parametrize("unlabelled", [False, True])
def test_a_good_teacher_passes_with_one_validation_photo_of_each_class(
    unlabelled: bool, photos_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No photo has another one of its class beside it, so only training photos can be its neighbours."""
    monkeypatch.setattr(vectors, "MOST_KNOWN", 25)
    root = shutil.copytree(photos_root, tmp_path / "photos")
    for photo in (root / "validation").glob("*/*.png"):
        if photo.name != "000.png":
            photo.unlink()
    file = save_teacher(tmp_path / "teacher")  # its weights are random, and classes differ in colour
    options: dict[str, Any] = {
        "teacher__random_weights": None,
        "teacher__checkpoint": str(file),
        "train__batch_size": 4,
    }
    if unlabelled:  # the share is of these, and leaves all photos with labels
        options |= {"data__unlabelled": str(root / "train"), "data__fraction": 0.1}
    assert main(["train", *tiny(root, tmp_path / "run", **{**PRETRAINING, **options})]) == 0
    score = json.loads((tmp_path / "run/run.json").read_text())["teacher"]["score"]
    assert (score["knn"], score["images"], score["neighbours"]) == (100, 3 * 8, 5)


# Photos without labels


@dataclass(frozen=True)
class Pretrained:
    """A run that learned from photos without labels, and what it printed."""

    folder: Path
    arguments: list[str]
    printed: str

    def read(self, file: str) -> Any:
        return json.loads((self.folder / file).read_text())

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "student/model.safetensors")


@pytest.fixture(scope="module")
def pretrained(photos_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    home = tmp_path_factory.mktemp("pretrained")
    own = {"data__unlabelled": str(photos_root / "train"), "evaluate__report": True}
    arguments = tiny(photos_root, home / "run", **PRETRAINING, **own)
    with console.capture() as capture:
        assert main(["train", *arguments]) == 0
    return Pretrained(home / "run", arguments, capture.get())


def test_labels_that_are_off_and_labels_that_are_not_there_are_the_same(
    pretrained: Pretrained, photos_root: Path, tmp_path: Path
) -> None:
    assert main(["train", *tiny(photos_root, tmp_path / "run", **PRETRAINING)]) == 0
    labelled = load_file(tmp_path / "run/student/model.safetensors")
    assert labelled.keys() == pretrained.weights().keys()
    assert all(torch.equal(labelled[name], tensor) for name, tensor in pretrained.weights().items())
    before = tiny_student(distilled=False, image_size=32).backbone.state_dict()
    assert not torch.equal(before["blocks.0.mlp.fc1.weight"], labelled["blocks.0.mlp.fc1.weight"])


def test_a_teacher_without_a_head_is_known_by_its_neighbours(pretrained: Pretrained) -> None:
    score = pretrained.read("run.json")["teacher"]["score"]
    assert (score["neighbours"], score["temperature"]) == (7, 0.07)
    assert f"k-NN {score['knn']:.2f} % on 21 images, from 48 of training" in pretrained.printed
    assert f"teacher k-NN {score['knn']:.1f}" in pretrained.printed
    assert "its head" not in pretrained.printed  # random weights have none
    assert pretrained.read("heads.json")["teacher"] is None
    assert "does not learn from labels" in pretrained.printed
    assert f"k-NN {score['knn']:.2f} %" in (pretrained.folder / "report/report.html").read_text()


def test_the_newest_epoch_is_the_best_without_labels(pretrained: Pretrained, tmp_path: Path) -> None:
    arguments = [*pretrained.arguments, "--output", str(tmp_path / "run"), "--evaluate.report", "false"]
    assert main(["train", *arguments, "--train.epochs", "2", "--optim.lr", "1e-9"]) == 0  # no head's top-1 rises
    *_, newest = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    assert (tmp_path / "run/checkpoints/best.safetensors").read_bytes() == newest.read_bytes()


def test_two_processes_see_the_same_neighbours_as_one(pretrained: Pretrained, tmp_path: Path) -> None:
    arguments = [*pretrained.arguments, "--output", str(tmp_path / "run"), "--evaluate.report", "false"]
    run_on_two(["train", *arguments], tmp_path / "said.txt")
    together = json.loads((tmp_path / "run/run.json").read_text())
    assert together["teacher"]["score"] == pretrained.read("run.json")["teacher"]["score"]


def test_other_photos_without_labels_are_another_run(
    pretrained: Pretrained, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(photos_root / "train", tmp_path / "photos")
    (other / "bars/000.png").unlink()
    resumed = [*pretrained.arguments, "--resume", "auto", "--data.unlabelled"]
    assert "data (train): other photos" in refused(["train", *resumed, str(other)], capsys)


def test_photos_lie_as_deep_as_they_like_and_those_of_validation_are_left_out(
    photos_root: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(photos_root, tmp_path / "photos")
    deep = root / "train/more/and more"
    deep.mkdir(parents=True)
    shutil.copy(root / "train/bars/000.png", root / "train/loose.PNG")
    shutil.copy(root / "train/bars/000.png", deep / "deep.png")
    (deep / "notes.txt").write_text("no photo")
    labelled = folder_splits(photos_root)
    splits = folder_splits(photos_root, unlabelled=str(root))
    assert len(splits.train) == 48 + 21 + 2  # a copy elsewhere is another photo
    assert splits.validation.digest() == labelled.validation.digest()
    assert splits.train.classes == CLASSES
    assert set(splits.train.labels) == {UNLABELLED}
    assert list(splits.train.names) == sorted(splits.train.names)
    within = folder_splits(photos_root, unlabelled=str(photos_root))
    assert len(within.train) == 48
    assert not any(name.startswith("validation") for name in within.train.names)


def test_links_to_photos_of_validation_are_left_out_as_well(photos_root: Path, tmp_path: Path) -> None:
    for number, photo in enumerate(sorted(photos_root.rglob("*.png"))):
        (tmp_path / f"{number:03d}.png").symlink_to(photo)
    train = folder_splits(photos_root, unlabelled=str(tmp_path)).train
    assert {(tmp_path / name).resolve() for name in train.names} == set((photos_root / "train").rglob("*.png"))


def test_a_run_without_labels_belongs_to_the_validation_photos_that_it_left_out(
    pretrained: Pretrained, photos_root: Path
) -> None:
    splits = folder_splits(photos_root)
    assert was_trained_on(pretrained.folder, splits)
    assert not was_trained_on(pretrained.folder, splits._replace(validation=splits.train))


def test_a_view_without_a_label_has_no_target() -> None:
    examples = [Example(torch.rand(3, 4, 4), label, 0, place, place, None) for place, label in enumerate((-1, 2))]
    made = Mixing(classes=3, seed=0, mixup=0.0, cutmix=0.0, label_smoothing=0.1)(examples)
    assert made.targets[0].tolist() == [0, 0, 0]
    assert made.targets[1].sum() == pytest.approx(1)


def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.mark.parametrize(
    ("folder", "options", "words"),
    [
        (lambda root, tmp: tmp / "nowhere", {}, ["data.unlabelled", "nowhere is not there"]),
        (lambda root, tmp: empty(tmp), {}, ["data.unlabelled", "has no images"]),
        (lambda root, tmp: root / "validation", {}, ["data.unlabelled", "besides those of the validation split"]),
        (lambda root, tmp: root, {"distill__alpha": 0.5}, ["data.unlabelled", "set distill.kind none and distill.al"]),
        (lambda root, tmp: root, {"distill__kind": "soft", "teacher__head": True}, ["data.unlabelled", "no labels"]),
        (lambda root, tmp: root, {"distill__terms": []}, ["distill.alpha", "nothing else teaches"]),
    ],
)
def test_photos_without_labels_that_cannot_teach_are_refused(
    photos_root: Path,
    tmp_path: Path,
    folder: Any,
    options: dict[str, Any],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = {**PRETRAINING, "data__unlabelled": str(folder(photos_root, tmp_path)), **options}
    line = refused(["train", *tiny(photos_root, tmp_path / "run", **own)], capsys)
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_fitted_on_the_labelled_photos_and_found_with_and_without_its_head(photos_root: Path) -> None:
    own = {"teacher__random_weights": None, "teacher__fit__epochs": 2}
    folders = set()
    for unlabelled, head in ((None, True), (None, False), (str(photos_root / "train/bars"), False)):
        options = {**PRETRAINING, **own, "data__unlabelled": unlabelled, "teacher__head": head}
        config, _ = parse_config(tiny(photos_root, Path("run"), **options))
        splits = folder_splits(photos_root, unlabelled=unlabelled)
        folders.add(teacher_folder(config, splits))
    assert len(folders) == 1


# What the features are worth


def probed(folder: Path, *arguments: str) -> Any:
    assert main(["eval", *arguments, "--probe", "true", "--to", str(folder)]) == 0
    return heads_in(folder)["probe"]


def test_features_are_scored_beside_those_of_random_weights(
    pretrained: Pretrained, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_run = probed(tmp_path / "run", str(pretrained.folder))
    assert "features, from 48 training images to 21" in capsys.readouterr().out
    assert of_run["images"] == 48
    for whose in ("student", "random"):
        for kind in ("knn", "linear"):
            low, high = of_run[whose][kind]["intervals"]["top1"]
            assert low <= of_run[whose][kind]["top1"] <= high
    own = ("--data.root", str(photos_root), "--train.precision", "off", "--train.device", "cpu", "--data.workers", "0")
    of_folder = probed(tmp_path / "folder", str(pretrained.folder / "student"), *own)
    assert of_folder["student"]["knn"] == of_run["student"]["knn"]


def test_the_floor_of_a_student_that_has_learned_nothing_is_its_own_score(photos_root: Path, tmp_path: Path) -> None:
    """A student whose weights are those that its seed draws, so that both rows must be the same."""
    student = tiny_student(distilled=False, image_size=32)
    save_student(student, tmp_path / "student", CLASSES, seen_at(32))
    own = ("--data.root", str(photos_root), "--train.device", "cpu", "--data.workers", "0")
    found = probed(tmp_path / "eval", str(tmp_path / "student"), *own)
    assert found["student"] == found["random"]


@pytest.mark.parametrize("options", [("--split", "train"), ("--data.validation_split", "train")])
def test_photos_are_not_scored_by_themselves(
    pretrained: Pretrained, tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(pretrained.folder), *options, "--probe", "true", "--to", str(tmp_path / "eval")]
    assert "holds 48 of the training photos" in refused(arguments, capsys)
    assert not (tmp_path / "eval").exists()


def test_the_labelled_training_photos_of_such_a_run_can_be_scored(pretrained: Pretrained, tmp_path: Path) -> None:
    assert main(["eval", str(pretrained.folder), "--split", "train", "--to", str(tmp_path)]) == 0
    assert heads_in(tmp_path)["by_class"]["support"] == [16, 16, 16]
