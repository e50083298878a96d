"""Weights by any name: what is known about them is known once, and always together."""

from __future__ import annotations

import json
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from deit_kd import Batch, FrozenTeacher, InputError
from deit_kd.cli import main
from deit_kd.evaluation.sources import check_classes, open_source
from deit_kd.interfaces import Preprocessing
from deit_kd.models.layouts import to_transformers
from deit_kd.origins import open_origin
from tests.helpers import CLASSES, STUDENT, STUDENT_ARGS, Finished, heads_in, refused, tiny, write_photos
from tests.tiny_parts import tiny_student, tiny_teacher, write_transformers_folder

SEEN = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 1.0)
ORDER = {"bars": 2, "dots": 0, "rings": 1}  # the columns of a head whose names nobody wrote down
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def teacher(**options: Any) -> FrozenTeacher:
    """Return a teacher of images that are normalised to [-1, 1]; its weights bring its name."""
    return tiny_teacher(**{"name": None, "channels_last": False, "student": SEEN, **options})


def answers(frozen: FrozenTeacher) -> torch.Tensor:
    zeros = torch.zeros(len(IMAGES), dtype=torch.long)
    return frozen(Batch((IMAGES - 0.5) / 0.5, torch.zeros(len(IMAGES), 1), zeros)).logits


def seen(size: int, mean: Any, std: Any, mode: str = "bicubic") -> torch.Tensor:
    """Return the images as a network of these eyes is to see them."""
    resized = F.interpolate((IMAGES - 0.5) / 0.5, size=size, mode=mode, antialias=True) * 0.5 + 0.5
    return (resized - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def network(seed: int = 5) -> Any:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=3).eval()


@pytest.fixture(scope="module")
def mapped(photos_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned from weights without names, through a class map and with eyes of their own."""
    home = tmp_path_factory.mktemp("mapped")
    save_file(network().state_dict(), home / "unnamed.safetensors")
    (home / "map.json").write_text(json.dumps(ORDER))
    options = {
        "teacher__random_weights": None,
        "teacher__checkpoint": str(home / "unnamed.safetensors"),
        "teacher__class_map": str(home / "map.json"),
        "teacher__image_size": 24,
        "teacher__mean": [0.4, 0.4, 0.4],
        "teacher__std": [0.3, 0.3, 0.3],
        "teacher__min_top1": 0,
    }
    assert main(["train", *tiny(photos_root, home / "run", **options)]) == 0
    return home / "run"


def test_a_runs_teacher_keeps_its_columns_and_its_eyes(mapped: Path) -> None:
    frozen = teacher(checkpoint=f"{mapped}:teacher")
    with torch.no_grad():
        expected = network()(seen(24, (0.4,) * 3, (0.3,) * 3))[:, list(ORDER.values())]
    torch.testing.assert_close(answers(frozen), expected, rtol=1e-4, atol=1e-5)
    assert frozen.facts["class_map"] == {name: [[column, name]] for name, column in ORDER.items()}


def test_a_runs_teacher_is_asked_by_the_names_of_that_run(mapped: Path) -> None:
    turned = CLASSES[::-1]
    frozen = teacher(checkpoint=f"{mapped}:teacher", classes=turned)
    assert [frozen.facts["class_map"][name][0][0] for name in turned] == [ORDER[name] for name in turned]
    with pytest.raises(InputError, match="1 of 3 classes have no column of the teacher: stars"):
        teacher(checkpoint=f"{mapped}:teacher", classes=("bars", "dots", "stars"))


def test_a_runs_teacher_bequeaths_its_record(mapped: Path, photos_root: Path, tmp_path: Path) -> None:
    """The next run's record is as good as the first one's, though neither its recipe nor its weights name a class."""
    options = {"teacher__random_weights": None, "teacher__name": None, "teacher__min_top1": 0}
    second = tmp_path / "second"
    assert main(["train", *tiny(photos_root, second, **options, teacher__checkpoint=f"{mapped}:teacher")]) == 0
    first_answers = answers(teacher(checkpoint=f"{mapped}:teacher"))
    for name in (f"{second}:teacher", f"{second}/student:teacher"):
        assert torch.equal(answers(teacher(checkpoint=name)), first_answers)


def test_a_teacher_whose_weights_were_exchanged_is_refused(mapped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(mapped, tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    save_file(network(seed=6).state_dict(), tmp_path / "other.safetensors")
    facts["teacher"]["source"] = str(tmp_path / "other.safetensors")
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="have changed since"):
        teacher(checkpoint=f"{run}:teacher")


def test_the_teachers_teacher_is_followed(finished: Finished, mapped: Path, photos_root: Path, tmp_path: Path) -> None:
    options = {"teacher__random_weights": None, "teacher__name": None, "teacher__min_top1": 0}
    second = tmp_path / "second"
    assert main(["train", *tiny(photos_root, second, **options, teacher__checkpoint=str(mapped))]) == 0
    followed = teacher(checkpoint=f"{second}:teacher:teacher")
    assert torch.equal(answers(followed), answers(teacher(checkpoint=f"{mapped}:teacher")))
    with pytest.raises(InputError, match="learned from no teacher"):
        teacher(checkpoint=f"{finished.folder}:teacher:teacher")


@pytest.mark.parametrize("inside", ["checkpoints/best.safetensors", "student", "student/model.safetensors"])
def test_a_file_inside_a_run_is_that_runs(mapped: Path, inside: str) -> None:
    origin, run = open_origin("key", mapped / inside), open_origin("key", mapped)
    assert origin.classes == run.classes == CLASSES
    assert origin.preprocessing == run.preprocessing
    assert (origin.architecture, origin.model_args) == (STUDENT, STUDENT_ARGS)
    frozen = teacher(checkpoint=str(mapped / inside), classes=("rings", "bars"))
    assert frozen.facts["class_map"] == {"rings": [[2, "rings"]], "bars": [[0, "bars"]]}
    assert frozen.facts["mean"] == [0.485, 0.456, 0.406]
    with pytest.raises(InputError, match="classes have no column of the teacher: stars"):
        teacher(checkpoint=str(mapped / inside), classes=("bars", "dots", "stars"))


@pytest.mark.parametrize("inside", ["", "checkpoints/best.safetensors", "student/model.safetensors"])
def test_a_student_keeps_the_heads_of_its_own_classes_alone(mapped: Path, inside: str) -> None:
    kept = tiny_student(checkpoint=str(mapped / inside)).account
    other = tiny_student(checkpoint=str(mapped / inside), classes=("bars", "dots", "stars")).account
    assert kept is not None
    assert other is not None
    assert kept.initialised == []
    assert other.initialised == ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]


OTHERWISE = [
    ({**STUDENT_ARGS, "num_heads": 4}, STUDENT, "num_heads is 2 there and 4 here"),
    ({**STUDENT_ARGS, "act_layer": "relu"}, STUDENT, "mlp.act is 'GELU' there and 'ReLU' here"),
]


@pytest.mark.parametrize(("args", "name", "reason"), OTHERWISE)
def test_weights_of_a_network_that_answers_otherwise_are_refused(
    mapped: Path, args: Any, name: str, reason: str
) -> None:
    with pytest.raises(InputError, match=f"student.checkpoint: .* would answer differently .*{reason}"):
        tiny_student(checkpoint=str(mapped), args=args, name=name)
    with pytest.raises(InputError, match=f"teacher.args: .* would answer differently .*{reason}"):
        teacher(checkpoint=str(mapped), name=name, args=args)


@pytest.mark.parametrize("inside", ["", "checkpoints/best.safetensors", "student", "student/model.safetensors"])
def test_weights_that_do_not_fit_say_which_options_name_their_model(mapped: Path, inside: str) -> None:
    wider = {**STUDENT_ARGS, "embed_dim": 2 * STUDENT_ARGS["embed_dim"]}
    with pytest.raises(InputError, match=r"name its own model: --student\.name") as refused:
        tiny_student(checkpoint=str(mapped / inside), args=wider)
    _, name, _, args = shlex.split(str(refused.value).partition("own model: ")[2])
    account = tiny_student(checkpoint=str(mapped / inside), name=name, args=json.loads(args)).account
    assert account is not None
    assert not account.initialised


@pytest.mark.parametrize(
    "change",
    [{"image_size": 32}, {"args": {**STUDENT_ARGS, "patch_size": 4}}, {"drop_path": 0.3}, {"distilled": False}],
)
def test_weights_that_are_fitted_to_a_student_are_not(mapped: Path, change: dict[str, Any]) -> None:
    assert tiny_student(checkpoint=str(mapped), **change).account is not None


def test_published_weights_with_other_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = timm.create_model("test_vit").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    options = {"name": "test_vit.r160_in1k", "pretrained": True, "image_size": 32}
    tiny_student(**options, args={})
    with pytest.raises(InputError, match=r"student\.pretrained: .*num_heads is 2 there and 4 here"):
        tiny_student(**options, args={"num_heads": 4})


def transformers_folder(folder: Path, **config: Any) -> Path:
    """Write a distilled student of our CLASSES as transformers does."""
    torch.manual_seed(3)
    model = timm.create_model(STUDENT, img_size=16, num_classes=3, **STUDENT_ARGS)
    return write_transformers_folder(folder, to_transformers(model.state_dict()), **config)


def test_a_folder_of_transformers_says_what_it_is(tmp_path: Path) -> None:
    """A teacher needs no name; classes, activation and epsilon are the folder's own."""
    plain = answers(teacher(checkpoint=str(transformers_folder(tmp_path / "plain"))))
    same = teacher(checkpoint=str(tmp_path / "plain"), classes=("rings", "dots"))
    assert torch.equal(answers(same), plain[:, [2, 1]])
    relu = answers(teacher(checkpoint=str(transformers_folder(tmp_path / "relu", hidden_act="relu"))))
    wide = answers(teacher(checkpoint=str(transformers_folder(tmp_path / "wide", layer_norm_eps=0.1))))
    assert not torch.allclose(plain, relu, atol=1e-4)
    assert not torch.allclose(plain, wide, atol=1e-4)


def test_a_folder_of_transformers_answers_as_it_does_there(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = transformers_folder(tmp_path / "folder", hidden_act="quick_gelu", layer_norm_eps=0.01)
    theirs = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(folder).eval()
    with torch.no_grad():
        output = theirs((IMAGES - 0.5) / 0.5)
    expected = ((output.cls_logits.softmax(-1) + output.distillation_logits.softmax(-1)) / 2).log()
    torch.testing.assert_close(answers(teacher(checkpoint=str(folder))), expected, rtol=1e-4, atol=1e-5)
    scored = tiny_student(checkpoint=str(folder), args={**STUDENT_ARGS, "act_layer": "quick_gelu"}, strict=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(scored((IMAGES - 0.5) / 0.5).cls_logits, output.cls_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hidden_act": "relu"}, "mlp.act is 'ReLU' there and 'GELU' here"),
        ({"layer_norm_eps": 0.1}, r"eps is 0\.1 there and 1e-06 here"),
        ({"num_attention_heads": 4}, "num_heads is 4 there and 2 here"),
        ({"hidden_act": "mish"}, r"timm has no activation 'mish' \(hidden_act\)"),
    ],
)
def test_a_student_does_not_start_from_another_network_of_transformers(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        tiny_student(checkpoint=str(transformers_folder(tmp_path / "folder", **config)))


def test_an_epsilon_that_cannot_be_seen_is_no_other_network(tmp_path: Path) -> None:
    """transformers writes 1e-12 where timm has 1e-6."""
    assert tiny_student(checkpoint=str(transformers_folder(tmp_path / "folder", layer_norm_eps=1e-12))).account


def test_names_of_some_columns_are_read_with_their_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(network().state_dict(), folder / "model.safetensors")
    said = {"architecture": "test_resnet", "label_names": {"2": "bars", "0": "dots"}}
    (folder / "config.json").write_text(json.dumps(said))
    frozen = teacher(checkpoint=str(folder), classes=("bars", "dots"))
    assert frozen.facts["class_map"] == {"bars": [[2, "bars"]], "dots": [[0, "dots"]]}


# What a run writes about its student.


def test_a_saved_student_says_nothing_of_the_weights_that_it_is_not(photos_root: Path, tmp_path: Path) -> None:
    """eva02's published weights are squashed, deit's are tagged; views may be resized at random, photos are not."""
    options = {
        "student__name": "eva02_tiny_patch14_336",
        "student__args": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8},
        "data__interpolation": "random",
        "distill__kind": "none",
    }
    assert main(["train", *tiny(photos_root, tmp_path / "run", **options)]) == 0
    saved = json.loads((tmp_path / "run/student/config.json").read_text())["pretrained_cfg"]
    assert (saved["interpolation"], saved["crop_mode"]) == ("bicubic", "center")
    assert not {"tag", "license", "origin_url", "hf_hub_id", "paper_ids", "notes"} & saved.keys()
    opened = timm.create_model(f"local-dir:{tmp_path / 'run/student'}", pretrained=True)
    assert timm.data.resolve_data_config(model=opened)["interpolation"] == "bicubic"


# A checkpoint of a run that is not finished.


@pytest.fixture(scope="module")
def unfinished(mapped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = shutil.copytree(mapped, tmp_path_factory.mktemp("unfinished") / "run")
    (run / "heads.json").unlink()
    shutil.rmtree(run / "student")
    return run


def test_a_checkpoint_of_an_unfinished_run_is_scored(unfinished: Path, mapped: Path, tmp_path: Path) -> None:
    best = str(unfinished / "checkpoints/best.safetensors")
    assert main(["eval", best, "--to", str(tmp_path)]) == 0
    found, ended = (heads_in(folder) for folder in (tmp_path, mapped))
    assert found["weights"] == ended["weights"]
    for head in ("cls", "dist", "fused"):
        assert found["heads"][head]["nll"] == pytest.approx(ended["heads"][head]["nll"])
    assert found["teacher"]["nll"] == pytest.approx(ended["teacher"]["nll"])


def test_a_checkpoint_of_an_unfinished_run_is_exported(unfinished: Path, mapped: Path, tmp_path: Path) -> None:
    best = str(unfinished / "checkpoints/best.safetensors")
    assert main(["export", best, "--format", "timm", "--to", str(tmp_path / "out")]) == 0
    saved, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "out", mapped / "student"))
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    heads = heads_in(mapped)["heads"]
    assert f"| cls | {heads['cls']['top1']:.2f} |" in (tmp_path / "out/README.md").read_text()


def test_an_unfinished_run_itself_names_its_checkpoints(unfinished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["eval"], ["export", "--format", "timm"]):
        assert "name one of its checkpoints" in refused([verb[0], str(unfinished), *verb[1:]], capsys)
    with pytest.raises(InputError, match="name one of its checkpoints"):
        tiny_student(checkpoint=str(unfinished))


# Another teacher than a run's own.


def test_a_run_may_be_named_as_a_teacher_after_another(
    finished: Finished, mapped: Path, photos_root: Path, tmp_path: Path
) -> None:
    """Nothing of the first run's teacher, its name, its args, its eyes, is taken for the second's."""
    assert main(["eval", str(mapped), "--teacher.checkpoint", str(finished.folder), "--to", str(tmp_path / "a")]) == 0
    found = heads_in(tmp_path / "a")["teacher"]
    assert found["nll"] == pytest.approx(finished.heads["heads"]["fused"]["nll"], rel=1e-5)
    assert main(["eval", str(finished.folder), "--teacher.checkpoint", str(mapped), "--to", str(tmp_path / "b")]) == 0
    found = heads_in(tmp_path / "b")["teacher"]
    assert found["nll"] == pytest.approx(heads_in(mapped)["heads"]["fused"]["nll"])


def test_what_a_run_is_wins_over_a_name(mapped: Path) -> None:
    frozen = teacher(checkpoint=str(mapped), name="resnet18", args={"stem_width": 3})
    assert frozen.facts["name"] == STUDENT
    assert any("resnet18 is ignored" in line for line in frozen.lines())


@pytest.fixture(scope="module")
def exported(mapped: Path) -> Path:
    """The run, exported to the formats that are read again and can be written here."""
    for name in ("timm", *(["transformers"] if find_spec("transformers") else [])):
        assert main(["export", str(mapped), "--format", name, "--to", str(mapped / name)]) == 0
    return mapped


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "{}/student",
        "{}/student/model.safetensors",
        "{}/timm",
        "{}/timm/model.safetensors",
        "local-dir:{}/timm",
        "{}/transformers",
        "local-dir:{}/transformers",
    ],
)
def test_what_describes_itself_wins_over_a_name_in_every_form(exported: Path, form: str) -> None:
    if form.endswith("transformers"):
        pytest.importorskip("transformers")
    frozen = teacher(checkpoint=form.format(exported), name="resnet18", args={"stem_width": 3})
    torch.testing.assert_close(answers(frozen), answers(teacher(checkpoint=str(exported))), rtol=1e-4, atol=1e-5)
    assert any("teacher.name: resnet18 is ignored" in line for line in frozen.lines())


def test_a_teacher_that_was_moved_away_is_said_to_be_missing(mapped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(mapped, tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    facts["teacher"]["source"] = "gone/resnet10t-1"
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=f"{run} learned from gone/resnet10t-1, which is not there; put it back"):
        open_origin("teacher.checkpoint", f"{run}:teacher")


# Whose classes a student answers with.

THOUSAND = "deit_tiny_distilled_patch16_224"
SYNSETS = tuple(timm.data.ImageNetInfo().label_names())
WORDS = tuple(f"thing {number:04d}" for number in range(1000))
NUMBERS = tuple(f"{number:04d}" for number in range(1000))


def of_ten(folder: Path) -> str:
    """Return a local-dir of ten WordNet ids."""
    folder.mkdir()
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), folder / "model.safetensors")
    said = {"architecture": "test_resnet", "num_classes": 10, "label_names": SYNSETS[:10]}
    (folder / "config.json").write_text(json.dumps(said))
    return str(folder)


def bare(folder: Path) -> str:
    folder.mkdir()
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), folder / "bare.safetensors")
    return str(folder / "bare.safetensors")


@pytest.mark.parametrize(
    ("source", "classes", "warns"),
    [
        (lambda _: THOUSAND, SYNSETS, False),
        (lambda _: THOUSAND, WORDS, True),
        (lambda _: THOUSAND, NUMBERS, False),
        (lambda _: THOUSAND, SYNSETS[:200], False),
        (of_ten, SYNSETS[:10], False),
    ],
)
def test_photos_of_a_students_classes_may_be_scored(
    tmp_path: Path, source: Any, classes: tuple[str, ...], warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    check_classes(open_source(source(tmp_path / "folder")), classes)
    assert ("warning: " in capsys.readouterr().out) is warns


@pytest.mark.parametrize(
    ("source", "classes", "reason"),
    [
        (lambda _: THOUSAND, tuple(f"{number:04d}" for number in range(1, 1001)), "does not know 1 of them: '1000'"),
        (lambda _: THOUSAND, NUMBERS[:10], "does not know 10 of them: '0000'"),
        (lambda _: THOUSAND, WORDS[:10], "has 1000 classes, the data have 10"),
        (of_ten, WORDS[:10], "does not know 10 of them: 'thing 0000'"),
        (of_ten, NUMBERS[:10], "does not know 10 of them: '0000'"),
        (bare, WORDS[:10], "nothing says which classes its head stands for, and their number does not identify them"),
        (bare, WORDS[:9], "has 10 classes, the data have 9"),
    ],
)
def test_photos_of_other_classes_are_refused(tmp_path: Path, source: Any, classes: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_classes(open_source(source(tmp_path / "folder")), classes)


def test_numbers_are_the_same_with_and_without_zeros(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", {"train": 2, "validation": 2}, ("0", "1", "2"))
    assert main(["train", *tiny(root, tmp_path / "run", train__batch_size=6)]) == 0
    assert check_classes(open_source(str(tmp_path / "run")), ("00", "01", "02")).class_map is None
    assert check_classes(open_source(str(tmp_path / "run")), ("0", "02", "1")).columns == (0, 2, 1)


def test_a_runs_names_are_compared_whatever_they_are(mapped: Path) -> None:
    assert check_classes(open_source(str(mapped)), ("dots", "bars", "rings")).columns == (1, 0, 2)
