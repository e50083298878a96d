"""Specialists (Hinton et al. 2015, section 5): a rest class, clusters of confusable classes, who answers for what."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from deit_kd import FrozenTeacher, InputError
from deit_kd.cli import main
from deit_kd.data import Splits
from deit_kd.interfaces import Rest
from deit_kd.metrics.confusions import clusters, correlation, counts, most_confused, share_within
from deit_kd.origins import open_origin
from deit_kd.run_folder import read_facts
from deit_kd.teachers import EnsembleTeacher, build_class_map
from deit_kd.teachers.specialists import Panel, Specialty, specialty_of
from tests.helpers import FIVE_CLASSES, Finished, heads_in, refused, tiny, write_photos
from tests.tiny_parts import folder_splits, make_batch, tiny_teacher


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes of six training and two validation photos."""
    return write_photos(tmp_path_factory.mktemp("tree"), {"train": 6, "validation": 2}, FIVE_CLASSES)


# A rest class


def special(root: Path, *named: str, **options: Any) -> Splits:
    return folder_splits(root, classes=list(named), rest="rest", **options)


def test_all_classes_but_the_named_become_one_the_last(tree: Path) -> None:
    for photos in special(tree, "d", "b"):
        assert photos.classes == ("b", "d", "rest")
        own = ["rest" if name[0] in "ace" else name[0] for name in (path.split("/")[0] for path in photos.names)]
        assert [photos.classes[label] for label in photos.labels] == own
        assert photos.rest == Rest("rest", ("a", "c", "e"))
        assert len(photos) in (5 * 6, 5 * 2)


def test_one_named_class_is_enough(tree: Path) -> None:
    assert special(tree, "c").train.classes == ("c", "rest")


@pytest.mark.parametrize(("share", "of_rest"), [(0.5, 12), (0.25, 4), (0.6, 18), (0.01, 1), (1.0, 18)])
def test_the_rest_is_at_most_its_share_of_the_training_photos_alone(tree: Path, share: float, of_rest: int) -> None:
    train, validation = special(tree, "b", "d", rest_share=share)
    assert (train.labels == 2).sum() == of_rest
    assert (train.labels != 2).sum() == 12
    assert train.rest is not None
    assert train.rest.kept == pytest.approx(of_rest / 18)
    assert len(validation) == 10


def test_a_smaller_share_of_the_rest_lies_within_a_larger(tree: Path) -> None:
    few, more = ({*special(tree, "b", "d", rest_share=share).train.names} for share in (0.3, 0.5))
    assert few < more


def test_a_fold_of_a_specialist_holds_out_what_that_of_all_classes_does(tree: Path) -> None:
    both = [folder_splits(tree, folds=3, fold=1), special(tree, "a", "b", folds=3, fold=1)]
    assert list(both[0].validation.names) == list(both[1].validation.names)


def test_a_number_for_each_class_is_taken_before_they_are_joined(tree: Path) -> None:
    assert torch.bincount(torch.from_numpy(special(tree, "a", "b", per_class=2).train.labels)).tolist() == [2, 2, 6]


@pytest.mark.parametrize(
    ("named", "rest", "reason"),
    [
        (["a", "b"], "e", r"data\.rest: 'e' is a class of .*; choose another name"),
        (FIVE_CLASSES, "rest", r"data\.rest: data\.classes names all 5 classes, so none is left"),
        (["a", "x"], "rest", r"'x' is not among the 5 classes"),
        (["a", "a"], "rest", r"names class 'a' twice"),
        ([], "rest", r"names no class"),
    ],
)
def test_rest_that_cannot_be_is_refused(tree: Path, named: list[str], rest: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        folder_splits(tree, classes=list(named), rest=rest)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["data", "check", "TREE", "--data.rest", "rest"], "data.rest: rest stands for all classes but data.classes"),
        (["data", "check", "TREE", "--data.classes", "[a, b]", "--data.rest", ""], "data.rest"),
        (["data", "check", "TREE", "--data.classes", "[a, b]", "--data.rest_share", "0"], "data.rest_share"),
        (
            ["data", "pack", "TREE", "OUT", "--data.classes", "[a, b]", "--data.rest", "rest"],
            "data.rest: rest, but shards keep the classes of the tree",
        ),
    ],
)
def test_rest_in_a_wrong_place_is_refused(
    tree: Path, tmp_path: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"TREE": str(tree), "OUT": str(tmp_path / "out")}
    assert reason in refused([named.get(argument, argument) for argument in arguments], capsys)
    assert not list(tmp_path.iterdir())


def test_data_check_says_what_the_rest_is(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "check", str(tree), "--data.classes", "[b, d]", "--data.rest", "others"])
    assert "taken: 2, and as others the 3 others, of 5 classes, 24 of 30 training" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "classes", "columns"),
    [
        (("a", "b", "c", "d"), ("b", "rest"), [[1], [0, 2, 3]]),
        (("a", "b", "c", "d"), ("d", "a", "rest"), [[3], [0], [1, 2]]),
        (("a", "b", "rest"), ("a", "rest"), [[0], [1, 2]]),  # a specialist of two teaches one of one
        (("a", "b", "rest"), ("a", "b", "rest"), None),
    ],
)
def test_a_rest_takes_the_columns_of_all_other_names(names: Any, classes: Any, columns: Any) -> None:
    found = build_class_map(
        classes=classes,
        columns=len(names),
        label_names=names,
        timm_tag=False,
        label_set=None,
        file=None,
        rest="rest",
    )
    assert (None if found is None else found.columns) == columns


def test_a_teacher_of_another_rest_never_teaches_a_class_that_it_lacks() -> None:
    with pytest.raises(InputError, match=r"1 of 2 classes have no column of the teacher: b"):
        build_class_map(
            classes=("b", "rest"),
            columns=2,
            label_names=("a", "rest"),
            timm_tag=False,
            label_set=None,
            file=None,
            rest="rest",
        )


# Who answers for what


def answers(*probabilities: list[float]) -> Tensor:
    return torch.tensor(probabilities).log()


def random_panel(seed: int = 0) -> tuple[Panel, Tensor, list[Tensor]]:
    """Return a panel of six classes, of which two specialists know two and three, and answers to 40 images."""
    chance = torch.Generator().manual_seed(seed)
    panel = Panel([Specialty(6, (1, 3), 0.0), Specialty(6, (0, 4, 5), 0.7)], [1.0, 2.0], 1.5)
    general = 3 * torch.randn(40, 6, generator=chance)
    return panel, general.log_softmax(-1), [3 * torch.randn(40, size, generator=chance) for size in (3, 4)]


def test_what_a_specialist_gives_to_its_rest_is_spread_as_the_others_say() -> None:
    panel = Panel([Specialty(3, (0,), 0.0)], [1.0], 1.0)
    found = panel(answers([0.5, 0.3, 0.2]), [answers([0.8, 0.2])])
    torch.testing.assert_close(found.exp(), torch.tensor([[0.65, 0.21, 0.14]]))


def test_a_panel_answers_with_probabilities() -> None:
    panel, general, special = random_panel()
    torch.testing.assert_close(panel(general, special).exp().sum(-1), torch.ones(40))


def test_places_are_answered_like_images() -> None:
    panel, general, special = random_panel()
    of_places = panel(general.view(10, 2, 2, 6), [logits.view(10, 2, 2, -1) for logits in special])
    torch.testing.assert_close(of_places, panel(general, special).view(10, 2, 2, 6))


def test_no_value_is_read_from_the_device() -> None:
    panel, general, special = random_panel()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert panel(mode.from_tensor(general), [mode.from_tensor(logits) for logits in special]).shape == (40, 6)


def test_specialists_that_agree_change_nothing() -> None:
    panel = Panel([Specialty(4, (0, 1), 0.0), Specialty(4, (2, 3), 0.0)], [1.0, 3.0], 1.0)
    general = answers([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4])
    summed = [answers([0.4, 0.3, 0.3], [0.1, 0.2, 0.7]), answers([0.2, 0.1, 0.7], [0.3, 0.4, 0.3])]
    torch.testing.assert_close(panel(general, summed), general)


def test_only_specialists_that_know_the_most_probable_class_count() -> None:
    panel, general, special = random_panel()
    other = general.argmax(-1) == 2  # which nobody else knows
    assert other.any()
    torch.testing.assert_close(panel(general, special)[other], general[other])
    assert not torch.isclose(panel(general, special)[~other], general[~other], atol=0.01).all(-1).any()


def test_the_order_of_the_classes_does_not_matter() -> None:
    _, general, special = random_panel()
    order = torch.tensor([4, 0, 2, 5, 1, 3])  # the place of each class's column
    places = order.argsort()
    specialties = [(1, 3), (0, 4, 5)]
    moved = [sorted(int(places[label]) for label in known) for known in specialties]
    columns = [[known.index(int(order[label])) for label in labels] for known, labels in zip(specialties, moved)]  # noqa: B905 - two of each
    there = Panel([Specialty(6, tuple(moved[0]), 0.0), Specialty(6, tuple(moved[1]), 0.7)], [1.0, 2.0], 1.5)
    found = there(general[:, order], [logits[:, [*own, -1]] for logits, own in zip(special, columns)])  # noqa: B905
    torch.testing.assert_close(found, random_panel()[0](general, special)[:, order])


def test_with_one_that_counts_the_answer_is_nearest_to_both_by_kl() -> None:
    """Hinton et al. 2015, equation 5: no small change of the answer lowers the sum of both divergences."""
    panel, general, special = random_panel()
    chance = torch.Generator().manual_seed(1)
    weights, known = (1.5, 1.0, 2.0), ((1, 3), (0, 4, 5))
    corrected = [special[0].log_softmax(-1), (special[1] + torch.tensor([0, 0, 0, 0.7])).log_softmax(-1)]

    def divergence(row: int, answer: Tensor) -> Tensor:
        total = -weights[0] * (general[row].exp() * answer).sum()
        for number, labels in enumerate(known):
            if int(general[row].argmax()) in labels:
                others = [label for label in range(6) if label not in labels]
                seen = torch.cat([answer[list(labels)], answer[others].logsumexp(0)[None]])
                total -= weights[1 + number] * (corrected[number][row].exp() * seen).sum()
        return total

    found = panel(general, special)
    for row in range(40):
        least = divergence(row, found[row])
        for _ in range(20):
            changed = (found[row] + 0.05 * torch.randn(6, generator=chance)).log_softmax(-1)
            assert divergence(row, changed) > least - 1e-6


def test_a_rest_of_which_a_third_was_seen_counts_three_times() -> None:
    specialty = specialty_of("it", ("a", "rest"), Rest("rest", ("b", "c"), kept=1 / 3), ("a", "b", "c"))
    assert specialty is not None
    found = Panel([specialty], [1.0], 1e-9)(answers([0.5, 0.3, 0.2]), [answers([0.5, 0.5])])
    torch.testing.assert_close(found.exp(), torch.tensor([[0.25, 0.45, 0.3]]))


@pytest.mark.parametrize(
    ("own", "classes", "reason"),
    [
        (("a", "rest"), ("a", "b", "x"), "has not seen 'x', neither as a class of its own nor as part of its 'rest'"),
        (("a", "rest"), ("a", "rest"), "has not seen 'rest'"),
        (("x", "rest"), ("b", "c"), "knows none of the 2 classes"),
    ],
)
def test_specialist_of_other_classes_is_refused(own: Any, classes: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        specialty_of("it", own, Rest("rest", ("b", "c")), classes)


def test_specialist_that_knows_every_class_is_none() -> None:
    assert specialty_of("it", ("a", "b", "rest"), Rest("rest", ("c",)), ("b", "a")) is None


# From photos to a student


def network(root: Path, output: Path, **options: Any) -> list[str]:
    return tiny(
        root,
        output,
        **{
            "student__name": "test_resnet",
            "student__args": None,
            "distill__kind": "none",
            "teacher__name": None,
            "teacher__random_weights": None,
            **options,
        },
    )


@pytest.fixture(scope="module")
def family(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A generalist of five classes, and two specialists that start from it."""
    top = tmp_path_factory.mktemp("family")
    assert main(["train", *network(tree, top / "generalist")]) == 0
    for name, classes in (("first", ["a", "b"]), ("second", ["c", "e"])):
        options = {"data__classes": classes, "data__rest": "rest", "student__checkpoint": top / "generalist"}
        assert main(["train", *network(tree, top / name, **options)]) == 0
    return {name: top / name for name in ("generalist", "first", "second")}


def taught_by(tree: Path, output: Path, members: list[dict[str, Any]], **options: Any) -> list[str]:
    teacher = {"teacher__name": None, "teacher__random_weights": None, "teacher__min_top1": 0}
    return tiny(tree, output, **{**teacher, "teacher__members": members, "distill__kind": "soft", **options})


def test_a_run_records_what_its_rest_stands_for(family: dict[str, Path]) -> None:
    facts = read_facts(family["first"])
    assert facts["classes"] == ["a", "b", "rest"]
    assert facts["rest"] == {"name": "rest", "classes": ["c", "d", "e"], "kept": pytest.approx(12 / 18)}
    assert read_facts(family["generalist"])["rest"] is None


def test_a_student_learns_from_a_generalist_and_specialists(
    tree: Path, tmp_path: Path, family: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    named: list[dict[str, Any]] = [{"checkpoint": str(one)} for one in family.values()]
    assert main(["train", *taught_by(tree, tmp_path / "run", named)]) == 0
    members = read_facts(tmp_path / "run")["teacher"]["members"]
    assert [member.get("specialist_of") for member in members] == [None, ["a", "b"], ["c", "e"]]
    assert "is a specialist of a, b; its 'rest' stands for the 3 others" in capsys.readouterr().out


def built(family: dict[str, Path], name: str, classes: tuple[str, ...] = FIVE_CLASSES) -> FrozenTeacher:
    return tiny_teacher(name=None, checkpoint=str(family[name]), classes=classes, is_member=True)


def test_an_ensemble_answers_as_its_panel_does(family: dict[str, Path]) -> None:
    members = [built(family, name) for name in family]
    batch = make_batch(12)
    logits = [member(batch).logits for member in members]
    assert [tuple(one.shape) for one in logits if one is not None] == [(12, 5), (12, 3), (12, 3)]
    specialties = [member.specialty for member in members if member.specialty is not None]
    assert [specialty.labels for specialty in specialties] == [(0, 1), (2, 4)]
    panel = Panel(specialties, [1.0, 3.0], 2.0)
    expected = panel(logits[0].log_softmax(-1), logits[1:])
    torch.testing.assert_close(EnsembleTeacher(members, [2, 1, 3])(batch).logits, expected)


def test_what_specialists_know_is_part_of_what_identifies_a_store(family: dict[str, Path]) -> None:
    pairs = [[built(family, "generalist"), built(family, name)] for name in ("first", "second")]
    known = [EnsembleTeacher(pair, [1, 1]).state_dict()["_panel._knows"].tolist() for pair in pairs]
    assert known == [[[True, True, False, False, False]], [[False, False, True, False, True]]]


@pytest.mark.parametrize(
    ("members", "options", "reason"),
    [
        (["first", "second"], {}, "teacher.members: all are specialists; add a teacher that knows every class"),
        (["generalist", "first"], {"teacher__combine": "draw"}, "teacher.combine: draw lets a specialist answer alone"),
        (["generalist", "first"], {"map": True}, "is a specialist, whose classes are found by name; unset it"),
    ],
)
def test_specialists_that_cannot_teach_are_refused(
    tree: Path,
    tmp_path: Path,
    family: dict[str, Path],
    members: list[str],
    options: dict[str, Any],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named: list[dict[str, Any]] = [{"checkpoint": str(family[name])} for name in members]
    if options.pop("map", False):
        (tmp_path / "map.json").write_text("{}")
        named[-1]["class_map"] = str(tmp_path / "map.json")
    assert reason in refused(["train", *taught_by(tree, tmp_path / "run", named, **options)], capsys)
    assert not (tmp_path / "run").exists()


def test_a_specialist_alone_is_refused(
    tree: Path, tmp_path: Path, family: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    alone = taught_by(tree, tmp_path / "run", [], teacher__checkpoint=str(family["first"]))
    line = refused(["train", *alone], capsys)
    assert "is a specialist, which knows 2 of the 5 classes; name it in teacher.members" in line


def test_a_specialist_is_not_scored_on_another_rest(
    family: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["eval", str(family["first"]), "--data.classes", "[a]"], capsys)
    assert "data.rest: 'rest' stands for other classes here than in the head of first, which knows a, b, rest" in line


def test_a_specialist_and_a_generalist_are_compared_on_the_named_classes(
    family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(family["first"]), "--against", str(family["generalist"])]
    assert "generalist knows no class 'rest'; compare on data.classes alone with --data.rest null" in refused(
        arguments, capsys
    )
    assert main([*arguments, "--data.rest", "null", "--to", str(tmp_path / "both")]) == 0
    assert heads_in(tmp_path / "both")["classes"] == ["a", "b"]


# Confusions


def two_pairs(photos: int = 400) -> tuple[Tensor, Tensor]:
    """Return answers [n, 5] and labels [n]: classes 0 and 3 are confused, so are 1 and 4, and 2 is not."""
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(photos) % 5
    logits = 0.3 * torch.randn(photos, 5, generator=chance)
    twin = torch.tensor([3, 4, 2, 0, 1])
    logits[torch.arange(photos), labels] += 4
    logits[torch.arange(photos), twin[labels]] += 4 + torch.randn(photos, generator=chance)
    return logits.softmax(-1), labels


def test_clusters_are_of_classes_that_are_likely_together() -> None:
    probabilities, _ = two_pairs()
    assert clusters(correlation(probabilities), 3) == [[0, 3], [1, 4], [2]]


def test_clusters_follow_the_classes_wherever_they_stand() -> None:
    probabilities, _ = two_pairs()
    order = torch.tensor([4, 2, 0, 1, 3])
    assert clusters(correlation(probabilities[:, order]), 3) == [[0, 3], [2, 4], [1]]


def test_correlations_are_numpys() -> None:
    probabilities, _ = two_pairs()
    expected = torch.corrcoef(probabilities.double().T)
    torch.testing.assert_close(correlation(probabilities), expected)


def test_a_class_that_is_never_answered_correlates_with_none() -> None:
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    found = correlation(probabilities)
    assert found.isfinite().all()
    assert found[2].tolist() == [0, 0, 1]


def test_pairs_are_counted_in_both_directions() -> None:
    labels, predictions = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 1, 0, 0, 1, 0])
    confusion = counts(labels, predictions, 3)
    pairs = most_confused(confusion, torch.eye(3), 5)
    assert [(pair.classes, pair.photos) for pair in pairs] == [((0, 1), (2, 1)), ((0, 2), (0, 1))]
    assert share_within(confusion, [[0, 1], [2]]) == pytest.approx(3 / 4)
    assert share_within(torch.eye(3, dtype=torch.long), [[0, 1], [2]]) is None


def test_confusions_of_a_run_are_told_written_and_drawn(
    family: dict[str, Path], tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "confusions", str(family["generalist"]), "--split", "train", "--clusters", "2"]
    assert main([*arguments, "--to", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "confusions.json").read_text())
    assert sorted(name for group in found["clusters"] for name in group) == list(FIVE_CLASSES)
    assert sum(map(sum, found["counts"])) == found["n"] == 30
    sizes = [len(group) for group in found["clusters"]]
    assert found["pairs_within"] == pytest.approx(sum(size * (size - 1) for size in sizes) / 20)
    with Image.open(tmp_path / "confusions.png") as picture:
        assert picture.size[0] > 300
    recipes = [line.split(": ", 1)[1] for line in said.splitlines() if line.startswith("specialist ")]
    groups = [group for group in found["clusters"] if len(group) > 1]
    assert [yaml.safe_load(recipe) for recipe in recipes] == [{"data": {"classes": g, "rest": "rest"}} for g in groups]
    assert special(tree, *groups[0]).train.classes == (*sorted(groups[0]), "rest")


def test_confusions_of_a_specialist_name_no_specialist_of_its_rest(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"data__classes": ["a", "b", "c"], "data__rest": "others"}
    assert main(["train", *network(tree, tmp_path / "run", **options)]) == 0
    capsys.readouterr()
    arguments = ["data", "confusions", str(tmp_path / "run"), "--split", "train", "--clusters", "2"]
    assert main([*arguments, "--to", str(tmp_path)]) == 0
    recipes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("specialist ")]
    clusters = json.loads((tmp_path / "confusions.json").read_text())["clusters"]
    assert ["others"] not in clusters
    assert not [recipe for recipe in recipes if "others" in recipe]


def test_confusions_of_another_split_leave_those_of_the_validation_alone(
    family: dict[str, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(family["generalist"], tmp_path / "run")
    for split in ("validation", "train"):
        assert main(["data", "confusions", str(run), "--split", split]) == 0
    places = {"validation": run / "confusions", "train": run / "confusions/train"}
    for split, place in places.items():
        assert json.loads((place / "confusions.json").read_text())["split"] == split
        assert (place / "confusions.png").is_file()


def test_the_teacher_of_a_run_has_confusions_too(finished: Finished, tmp_path: Path) -> None:
    arguments = ["data", "confusions", f"{finished.folder}:teacher", "--data.workers", "0"]
    assert main([*arguments, "--train.device", "cpu", "--to", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "confusions.json").read_text())["head"] == "cls"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["RUN", "--clusters", "6"], "--clusters: 6 clusters of 5 classes; use 2 to 5"),
        (["RUN", "--clusters", "1"], "--clusters: 1 clusters of 5 classes; use 2 to 5"),
        (["RUN", "--clusters", "0"], "clusters"),
        (["RUN", "--split", "test"], "test"),
        (["RUN", "--clustres", "2"], "clustres"),
        (["somewhere/else"], "somewhere/else: is not there"),
        ([], "the first argument names a run"),
        (["--clusters", "2"], "the first argument names a run"),
    ],
)
def test_confusions_that_cannot_be_found_are_refused(
    family: dict[str, Path], tmp_path: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(family["generalist"], tmp_path / "run")
    line = refused(["data", "confusions", *(str(run) if name == "RUN" else name for name in arguments)], capsys)
    assert reason in line
    assert not (run / "confusions").exists()


def test_specialists_of_a_fold_start_from_and_teach_with_the_generalist_of_that_fold(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fold: dict[str, Any] = {"data__folds": 3, "data__fold": 0}
    generalist, specialist = tmp_path / "generalist", tmp_path / "specialist"
    own = {"data__classes": ["a", "b"], "data__rest": "rest", "student__checkpoint": generalist}
    assert main(["train", *network(tree, generalist, **fold)]) == 0
    assert main(["train", *network(tree, specialist, **fold, **own)]) == 0
    members = [{"checkpoint": str(generalist)}, {"checkpoint": str(specialist)}]
    assert main(["train", *taught_by(tree, tmp_path / "run", members, **fold)]) == 0
    other = network(tree, tmp_path / "other", **{**fold, "data__fold": 1}, **own)
    assert "held out fold 0 of 3 of these photos, but this recipe holds out fold 1" in refused(
        ["train", *other], capsys
    )


def test_the_rest_of_a_runs_teacher_is_what_the_teacher_saw_not_what_the_student_did(
    tree: Path, tmp_path: Path, family: dict[str, Path]
) -> None:
    taught = {"teacher__name": None, "teacher__random_weights": None, "teacher__checkpoint": family["generalist"]}
    rest = {"data__classes": ["a", "b"], "data__rest": "rest", "teacher__min_top1": 0}
    assert main(["train", *tiny(tree, tmp_path / "run", **taught, **rest)]) == 0
    student, teacher = (open_origin("key", f"{tmp_path / 'run'}{whose}").rest for whose in ("", ":teacher"))
    assert student is not None
    assert teacher is not None
    assert student.kept < teacher.kept == 1
