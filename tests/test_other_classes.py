"""A student is scored on photos of fewer classes, in another order or by other names, and by labels from a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from timm.data import RealLabelsImagenet

from deit_kd.cli import main
from deit_kd.evaluation.classes import match_classes
from deit_kd.evaluation.right_answers import read_right_answers
from deit_kd.evaluation.sources import check_classes, open_source
from deit_kd.interfaces import InputError, StudentOutput
from deit_kd.metrics import judge
from tests.helpers import SEVEN_CLASSES, heads_in, refused, write_photos

SYNSETS = tuple(timm.data.ImageNetInfo().label_names())
# Of ImageNet, the folders of a small tree; the last is there for the top five.
FOLDERS = ("n01440764", "n01443537", "n02102040", "n03000684", "n03888257", "n04557648")
SEVEN_CLASSES_SORTED = sorted(SEVEN_CLASSES)
INPUT = ["--data.image_size", "32", "--data.workers", "0", "--train.device", "cpu", "--train.precision", "off"]


def photos_of(runs: Path, root: Path, classes: tuple[str, ...]) -> Path:
    """Copy the validation photos of some classes of the runs, without a folder for the split."""
    for name in classes:
        shutil.copytree(runs / "photos" / "validation" / name, root / name)
    return root


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in parquet.read_table(folder / "predictions.parquet").to_pylist()}


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of untrained weights with 1000 columns."""
    file = tmp_path_factory.mktemp("weights") / "thousand.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), file)
    return str(file)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six folders of ImageNet, two photos each, named like its validation images; without a folder for the split."""
    root = write_photos(tmp_path_factory.mktemp("tree"), {"": 2}, FOLDERS)
    for number, file in enumerate(sorted(root.glob("*/*.png")), start=1):
        file.rename(file.with_name(f"ILSVRC2012_val_{number:08d}.JPEG"))
    return root


# Which columns


@pytest.mark.parametrize(
    ("theirs", "ours", "columns", "by_word"),
    [
        (("a", "b", "c"), ("a", "b", "c"), (0, 1, 2), ()),
        (("a", "b", "c"), ("c", "a"), (2, 0), ()),
        (("0", "1", "2", "10"), ("00", "10", "02"), (0, 3, 2), ()),
        (SYNSETS, ("n01443537", "n01440764"), (1, 0), ()),
        (SYNSETS, ("tench", "Golf_Ball"), (0, 574), (0, 1)),
        (("hat", "tench", "golf ball"), ("n01440764", "n03445777"), (1, 2), (0, 1)),
        (("Hat", "shoe"), ("hat", "shoe"), (0, 1), (0,)),
    ],
)
def test_classes_are_found_by_name_number_or_word(theirs: Any, ours: Any, columns: Any, by_word: Any) -> None:
    assert match_classes("it", theirs, ours)[1:] == (columns, by_word)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (("apple", "bread", "cup"), ("apple", "braed"), "it does not know 1 of them: 'braed' (nearest: bread); rename"),
        (SYNSETS, ("tench", "crane"), "'crane' describes the classes n02012849 and n03126707 of it; rename its folder"),
        (SYNSETS, ("n01440764", "tench"), "'n01440764' and 'tench' are the same class of it, 'n01440764'; join"),
        (SYNSETS, ("n01440764", "n99999999"), "it has 1000 classes, the data have 2, and it does not know 1 of them"),
        (SYNSETS, tuple("0123456789"), "it does not know 10 of them: '0', '1', '2', '3', '4' …; rename"),
        (SYNSETS, ("n01440764",), "the data have one class, 'n01440764', so every answer is right; add another"),
    ],
)
def test_classes_that_are_not_the_students_are_refused(theirs: Any, ours: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        match_classes("it", theirs, ours)
    assert said in str(caught.value)


def test_the_numbered_folders_of_imagenet_v2_are_columns(thousand: str) -> None:
    numbers = tuple(sorted(map(str, range(1000))))
    matched = check_classes(open_source(thousand), numbers)
    assert matched.columns == tuple(map(int, numbers))
    assert matched.names[2] == SYNSETS[10]


# Whole evaluations


@pytest.fixture(scope="module")
def fewer(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation of a run of seven classes on four of them."""
    home = tmp_path_factory.mktemp("fewer")
    root = photos_of(runs, home / "photos", ("apple", "egg", "fork", "gate"))
    arguments = ["eval", str(runs / "distilled"), "--data.root", str(root), "--split", ".", "--to", str(home / "to")]
    assert main([*arguments, "--diagnose", "true", "--against", str(runs / "plain")]) == 0
    return home / "to"


def test_logits_are_restricted_to_the_classes_of_the_photos(runs: Path, fewer: Path) -> None:
    assert main(["eval", str(runs / "distilled")]) == 0
    whole, part = rows_of(runs / "distilled" / "eval" / "validation"), rows_of(fewer)
    assert len(part) == 20
    for name, row in part.items():
        for head in ("cls", "dist", "teacher"):
            best = [one for one in whole[name].get(f"{head}_top5", []) if one in ("apple", "egg", "fork", "gate")]
            assert row.get(f"{head}_top5", [])[: len(best)] == best
        sure = dict(zip(whole[name]["cls_top5"], whole[name]["cls_top5_probability"], strict=True))
        first, second = row["cls_top5"][:2]
        if {first, second} <= sure.keys():  # renormalised, so the ratio stays
            ratio = row["cls_top5_probability"][0] / row["cls_top5_probability"][1]
            assert ratio == pytest.approx(sure[first] / sure[second], rel=1e-4)
        assert sum(row["cls_top5_probability"]) == pytest.approx(1)


def test_every_head_the_teacher_and_another_student_are_scored_on_fewer_classes(fewer: Path) -> None:
    heads = heads_in(fewer)
    assert (heads["n"], heads["classes"]) == (20, ["apple", "egg", "fork", "gate"])
    assert heads["columns"] == {
        name: [[SEVEN_CLASSES_SORTED.index(name), name]] for name in ("apple", "egg", "fork", "gate")
    }
    assert all(heads["heads"][head]["intervals"]["top1"] for head in ("cls", "dist", "fused"))
    assert heads["teacher"]["nll"] is not None
    assert {row["second"] for row in heads["comparisons"]} > {"plain"}
    assert heads["heads"]["cls"]["top5"] is None
    assert (fewer / "diagnosis.json").is_file()


def test_one_line_says_that_logits_are_restricted(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photos_of(runs, tmp_path / "photos", ("apple", "egg", "fork"))
    (root / "egg").rename(root / "Egg")
    capsys.readouterr()
    arguments = ["eval", str(runs / "plain"), "--data.root", str(root), "--split", ".", "--to", str(tmp_path / "to")]
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "plain: its logits are restricted to the photos' 3 of 7 classes, found by words: Egg is egg" in said, said


def test_the_teacher_knows_the_classes_by_the_students_names(runs: Path, tmp_path: Path) -> None:
    root = photos_of(runs, tmp_path / "photos", ("apple", "egg", "fork"))
    arguments = ["eval", str(runs / "distilled"), "--data.root", str(root), "--split", "."]
    arguments += ["--teacher.checkpoint", str(runs / "plain")]
    assert main([*arguments, "--to", str(tmp_path / "before")]) == 0
    for name in ("apple", "egg", "fork"):  # all, so that the order stays
        (root / name).rename(root / name.upper())
    assert main([*arguments, "--to", str(tmp_path / "after")]) == 0
    assert heads_in(tmp_path / "after")["teacher"] == heads_in(tmp_path / "before")["teacher"] is not None


def test_the_probe_learns_from_the_same_classes(runs: Path, tmp_path: Path) -> None:
    root = photos_of(runs, tmp_path / "photos" / "few", ("apple", "egg", "fork")).parent
    shutil.copytree(runs / "photos" / "train", root / "train")
    arguments = ["eval", str(runs / "plain"), "--data.root", str(root), "--split", "few", "--probe", "true"]
    assert main([*arguments, "--to", str(tmp_path / "to")]) == 0
    assert heads_in(tmp_path / "to")["probe"]["images"] == 9  # a fifth is held out


def by_hand(thousand: str, tree: Path, numbers: list[int]) -> torch.Tensor:
    """Return the logits of all thousand classes for photos of the tree."""
    from PIL import Image
    from timm.data import create_transform

    model = timm.create_model("test_vit", img_size=32).eval()
    model.load_state_dict(timm.models.load_state_dict(thousand))
    transform = create_transform((3, 32, 32), interpolation="bicubic", crop_pct=0.9)
    files = sorted(tree.glob("*/*.JPEG"))
    with torch.inference_mode():
        return model(torch.stack([transform(Image.open(files[number]).convert("RGB")) for number in numbers]))


def evaluated_thousand(thousand: str, tree: Path, to: Path, *more: str) -> Any:
    arguments = ["eval", thousand, "--student.name", "test_vit", "--data.root", str(tree), "--split", ".", *INPUT]
    assert main([*arguments, "--to", str(to), *more]) == 0
    return heads_in(to)


def test_a_thousand_classes_are_scored_on_a_tree_of_six(thousand: str, tree: Path, tmp_path: Path) -> None:
    heads = evaluated_thousand(thousand, tree, tmp_path)
    logits = by_hand(thousand, tree, list(range(12)))[:, [SYNSETS.index(name) for name in FOLDERS]]
    labels = torch.arange(12) // 2
    assert heads["heads"]["cls"]["top1"] == pytest.approx(100 * float((logits.argmax(-1) == labels).double().mean()))
    assert heads["heads"]["cls"]["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), 1e-4)


# Several right answers


REAL = [[0], [0, 1], [], [217], [1], [], [491, 701], [491], [701], [0, 217, 701], [898], [898, 1]]


def labels_file(tmp_path: Path, entries: Any) -> str:
    file = tmp_path / "real.json"
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return str(file)


def test_real_labels_score_as_timm_does(thousand: str, tree: Path, tmp_path: Path) -> None:
    file = labels_file(tmp_path, REAL)
    heads = evaluated_thousand(thousand, tree, tmp_path / "to", "--labels", file)
    judge_of_timm = RealLabelsImagenet([f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 13)], file)
    logits = by_hand(thousand, tree, list(range(12)))
    others = torch.ones(1000, dtype=torch.bool)
    others[[SYNSETS.index(name) for name in FOLDERS]] = False
    judge_of_timm.add_result(logits.masked_fill(others, float("-inf")))
    assert (heads["n"], heads["labels"]) == (10, {"file": file, "left_out": 2})
    score = heads["heads"]["cls"]
    assert (score["top1"], score["top5"]) == pytest.approx(
        (judge_of_timm.get_accuracy(1), judge_of_timm.get_accuracy(5))
    )
    rows = rows_of(tmp_path / "to")
    assert rows["n01440764/ILSVRC2012_val_00000002.JPEG"]["right"] == ["n01440764", "n01443537"]
    assert "n01443537/ILSVRC2012_val_00000003.JPEG" not in rows


def random_output(images: int, classes: int) -> tuple[StudentOutput, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    cls, dist = torch.randn(2, images, classes, generator=generator)
    return StudentOutput(cls, dist), torch.randint(classes, (images,), generator=generator)


def test_every_head_scores_as_timm_does(tmp_path: Path) -> None:
    output, labels = random_output(60, 12)
    right = torch.rand(60, 12, generator=torch.Generator().manual_seed(1)) < 0.2
    right[:, 3] |= ~right.any(-1)
    file = labels_file(tmp_path, [row.nonzero()[:, 0].tolist() for row in right])
    found = judge(output, labels, teacher_logits=output.cls_logits, others={}, fusion="softmax", seed=0, right=right)
    fused = output.cls_logits.softmax(-1) + output.dist_logits.softmax(-1)
    scored = {"cls": output.cls_logits, "dist": output.dist_logits, "fused": fused}
    for head, logits in scored.items():
        judge_of_timm = RealLabelsImagenet([f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 61)], file)
        judge_of_timm.add_result(logits)
        assert found["heads"][head]["top1"] == pytest.approx(judge_of_timm.get_accuracy(1))
        assert found["heads"][head]["top5"] == pytest.approx(judge_of_timm.get_accuracy(5))
        wrong = found["disagreement"]["matrix"][0][found["disagreement"]["names"].index(head)]
        assert wrong == pytest.approx(1 - judge_of_timm.get_accuracy(1) / 100)
    (row,) = (row for row in found["comparisons"] if (row["first"], row["second"]) == ("cls", "dist"))
    difference = found["heads"]["cls"]["top1"] - found["heads"]["dist"]["top1"]
    assert row["difference"] == pytest.approx(difference)
    assert sum(n * hits for n, hits in zip(found["by_class"]["support"], found["by_class"]["cls"], strict=True)) == (
        pytest.approx(60 * found["heads"]["cls"]["top1"])
    )


def test_one_right_answer_each_is_a_label() -> None:
    output, labels = random_output(40, 7)
    options: dict[str, Any] = {"teacher_logits": output.dist_logits, "others": {}, "fusion": "logits", "seed": 0}
    right = torch.nn.functional.one_hot(labels, 7).bool()
    assert judge(output, labels, **options, right=right) == judge(output, labels, **options)


@pytest.mark.parametrize("form", [["apple", "egg"], [0, 2]])
def test_a_file_may_name_classes_by_photo(tmp_path: Path, form: list[Any]) -> None:
    file = labels_file(tmp_path, {"a.jpg": form, "egg/b.jpg": [], "c.jpg": "door"})
    read = read_right_answers(file, ["apple/a.jpg", "egg/b.jpg", "egg/c.jpg"], ("apple", "door", "egg"))
    assert read.right.tolist() == [[True, False, True], [False] * 3, [False, True, False]]


def test_timms_own_list_is_called_real() -> None:
    names = [f"n01440764/ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 7, 50_000)]
    read = read_right_answers("real", names, SYNSETS)
    judge_of_timm = RealLabelsImagenet([""] * 50_000)
    expected = [judge_of_timm.real_labels[name.split("/")[1]] for name in names]
    assert [row.nonzero()[:, 0].tolist() for row in read.right] == [sorted(row) for row in expected]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("nonsense", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "is neither a list nor an object"),
        ([[0]], "has 1 entries, none for n01440764/ILSVRC2012_val_00000002.JPEG"),
        ([[0], [1000]], "the class 1000, which is not one of 1000"),
        ([[0], ["tench"]], "the class 'tench', which is not one of 1000"),
        ([[0], [True]], "the class True"),
        ([[0], [[1]]], "the class [1]"),
        ([[], []], "has no right answer to any of the 2 photos"),
        ([[2], [3]], "has no right answer to any of the 2 photos"),
        ({"ILSVRC2012_val_00000001.JPEG": []}, "has no entry for n01440764/ILSVRC2012_val_00000002.JPEG"),
        ({"ILSVRC2012_val_00000001.JPEG": ["n01440765"]}, "'n01440765', which is not one of 2 (nearest: n01440764"),
    ],
)
def test_files_of_labels_that_cannot_be_used_are_refused(tmp_path: Path, entries: Any, said: str) -> None:
    names = [f"n01440764/ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2)]
    if isinstance(entries, dict) and "n01440765" in str(entries):
        names = names[:1]
    with pytest.raises(InputError) as caught:
        read_right_answers(labels_file(tmp_path, entries), names, FOLDERS[:2])
    assert str(caught.value).startswith(f"--labels: {tmp_path / 'real.json'} ")
    assert said in str(caught.value)


def test_a_list_needs_the_names_of_imagenets_validation_images(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"other\.jpg is not named like one \(ILSVRC2012_val_00000001\.JPEG\); write an"
    ):
        read_right_answers(labels_file(tmp_path, [[0]]), ["n01440764/other.jpg"], FOLDERS[:2])


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (None, "--labels: nowhere.json is not there; name a file like real.json, or real"),
        ([[0]], "is a list of ImageNet's columns, and not all classes of the photos are ImageNet's; write an object"),
        ({"000.png": [1]}, "has no entry for"),
    ],
)
def test_labels_that_do_not_belong_to_the_photos_are_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: Any, said: str
) -> None:
    labels = "nowhere.json" if file is None else labels_file(tmp_path, file)
    arguments = ["eval", str(runs / "plain"), "--labels", labels, "--to", str(tmp_path / "to")]
    assert said in refused(arguments, capsys)
    assert not (tmp_path / "to").exists()


def test_other_labels_get_a_folder_of_their_own(runs: Path, tmp_path: Path) -> None:
    names = sorted((runs / "photos" / "validation").glob("*/*.png"))
    file = labels_file(tmp_path, {f"{path.parent.name}/{path.name}": ["apple", "egg"] for path in names})
    assert main(["eval", str(runs / "plain"), "--labels", file]) == 0
    (folder,) = (runs / "plain" / "eval").glob("validation-photos-*")
    assert heads_in(folder)["labels"] == {"file": file, "left_out": 0}
    shutil.rmtree(folder)
