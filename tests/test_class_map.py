"""A teacher's columns are found by name, or the run stops; nothing is ever guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.data import ImageNetInfo
from torch.overrides import TorchFunctionMode

from deit_kd import Batch, FrozenTeacher, InputError, soft_distillation
from deit_kd.teachers import ClassMap, build_class_map, check_score, least_top1
from tests.tiny_parts import seen_at, tiny_teacher

IMAGENETTE = (
    "n01440764",
    "n02102040",
    "n02979186",
    "n03000684",
    "n03028079",
    "n03394916",
    "n03417042",
    "n03425413",
    "n03445777",
    "n03888257",
)
IMAGENETTE_COLUMNS = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def mapped(classes, columns=1000, label_names=None, timm_tag=False, label_set="imagenet-1k", file=None):
    return build_class_map(
        classes=tuple(classes),
        columns=columns,
        label_names=label_names,
        timm_tag=timm_tag,
        label_set=label_set,
        file=None if file is None else str(file),
    )


def teacher(**options):
    own = {"random_weights": False, "image_size": 32, "channels_last": False, "classes": IMAGENETTE}
    return tiny_teacher(**{**own, "student": seen_at(32), **options})


def batch(images):
    zeros = torch.zeros(len(images), dtype=torch.long)
    return Batch(images, torch.zeros(len(images), 1), zeros)


@pytest.fixture
def published(monkeypatch):
    """Stand in for the hub: give timm this state dict as the weights of any tag."""

    def publish(state):
        monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))

    return publish


def test_imagenette_takes_its_ten_columns_of_a_thousand():
    frozen = teacher(random_weights=True, label_set="imagenet-1k")
    columns = [group[0][0] for group in frozen.facts["class_map"].values()]
    assert columns == IMAGENETTE_COLUMNS
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(frozen(batch(images)).logits, frozen.network(images)[:, IMAGENETTE_COLUMNS])


def test_timm_tag_needs_no_label_set(published):
    published(timm.create_model("test_resnet").state_dict())
    frozen = teacher(name="test_resnet.r160_in1k", pretrained=True, image_size=None)
    assert [group[0][0] for group in frozen.facts["class_map"].values()] == IMAGENETTE_COLUMNS


def test_order_of_the_dataset_is_kept():
    assert mapped(IMAGENETTE[::-1]).columns == [[column] for column in IMAGENETTE_COLUMNS[::-1]]


def test_subset_is_the_renormalised_distribution():
    logits = torch.randn(4, 6)
    chosen = ClassMap([[4], [1], [2]])(logits)
    probabilities = logits.softmax(-1)[:, [4, 1, 2]]
    torch.testing.assert_close(chosen.softmax(-1), probabilities / probabilities.sum(-1, keepdim=True))


def test_merged_columns_add_their_probabilities_at_temperature_one():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    probabilities = logits.softmax(-1)[0]
    merged = ClassMap([[0, 3], [1], [2]])(logits)
    expected = torch.stack([probabilities[0] + probabilities[3], probabilities[1], probabilities[2]])
    torch.testing.assert_close(merged.softmax(-1)[0], expected)
    student = torch.randn(1, 3)
    softened = (expected.log() / 4).softmax(-1)
    by_hand = 16 * (softened * (softened.log() - (student / 4).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(soft_distillation(student, merged, 4.0), by_hand)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.json", json.dumps({"fish": [0, "n01443537"], "van": "ambulance", "rest": "maillot, tank suit"})),
        ("map.csv", 'class,teacher\nfish,0\nfish,n01443537\nvan,Ambulance\nrest,"maillot, tank suit"\n'),
    ],
)
def test_mapping_file_takes_columns_ids_and_labels(tmp_path: Path, name, text):
    file = tmp_path / name
    file.write_text(text)
    assert mapped(("fish", "van", "rest"), file=file).columns == [[0, 1], [407], [639]]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"a": "crane", "b": 1}, "columns 134 and 517"),
        ({"a": 1000, "b": 1}, "column 1000 of 'a'"),
        ({"a": "tenhc", "b": 1}, "nearest: tench"),
        ({"a": 1, "b": "n01443537"}, "cannot tell these classes apart"),
        ({"a": 1}, "1 of 2 classes have no column of the teacher: b"),
        ({"a": 1, "b": []}, "1 of 2 classes have no column of the teacher: b"),
        ({"a": 1.5, "b": 1}, "not a column, a WordNet id or a label"),
        ({"a": True, "b": 1}, "not a column, a WordNet id or a label"),
        ([1, 2], "is not a mapping"),
    ],
)
def test_mapping_file_that_cannot_be_right_is_refused(tmp_path: Path, entry, reason):
    file = tmp_path / "map.json"
    file.write_text(json.dumps(entry))
    with pytest.raises(InputError, match=reason):
        mapped(("a", "b"), file=file)


@pytest.mark.parametrize(("name", "text"), [("none.json", None), ("bad.json", "{"), ("bad.csv", "x,y\n1,2\n")])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"^teacher\.class_map: "):
        mapped(("a", "b"), file=tmp_path / name)


def test_a_row_with_two_columns_is_refused_rather_than_cut(tmp_path: Path):
    file = tmp_path / "map.csv"
    file.write_text("class,teacher\ncat,281,282\ndog,1\n")
    with pytest.raises(InputError, match="'cat' has several columns in one row"):
        mapped(("cat", "dog"), file=file)


@pytest.mark.parametrize(
    ("name", "text"), [("map.csv", "class,teacher\ncat,281\ndog,1\n"), ("map.json", '{"cat": 281, "dog": 1}')]
)
def test_a_mapping_from_excel_is_read(tmp_path: Path, name, text):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8-sig")
    assert mapped(("cat", "dog"), file=file).columns == [[281], [1]]


NUMERALS = tuple(sorted(map(str, range(1, 13)), key=str))  # "1", "10", "11", "12", "2", …: what a tree of folders gives


def numbered(tmp_path: Path, entry, labels=NUMERALS):
    """Return the columns of a class that a file gives `entry`, of a teacher whose labels are numbers."""
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"a": entry}))
    fields = {"classes": ("a",), "columns": len(labels), "label_names": labels, "timm_tag": False, "label_set": None}
    return build_class_map(**fields, file=str(file)).columns[0]


@pytest.mark.parametrize("entry", [5, "5", ["12", 5]])
def test_a_number_that_is_another_columns_label_is_refused(tmp_path: Path, entry):
    reason = "5 of 'a' in .* is the label of column 7 and the number of another; write label:5 or column:5"
    with pytest.raises(InputError, match=reason):
        numbered(tmp_path, entry)


@pytest.mark.parametrize(
    ("entry", "column"),
    [("label:5", 7), ("column:5", 5), ("12", 3), ("0", 0), (0, 0)],
)
def test_a_label_comes_before_a_number(tmp_path: Path, entry, column):
    """There is no column 12, and no label 0."""
    assert numbered(tmp_path, entry) == [column]


def test_a_number_may_be_its_own_columns_label(tmp_path: Path):
    assert numbered(tmp_path, 3, labels=tuple(map(str, range(5)))) == [3]


def test_numbers_with_zeros_are_labels_too(tmp_path: Path):
    with pytest.raises(InputError, match="label of column 0"):
        numbered(tmp_path, 1, labels=("001", "002", "003"))


def test_a_class_that_stands_twice_in_json_is_refused(tmp_path: Path):
    file = tmp_path / "map.json"
    file.write_text('{"a": 1, "b": 2, "a": 3}')
    with pytest.raises(InputError, match="'a' appears twice"):
        mapped(("a", "b"), file=file)


@pytest.mark.parametrize(
    ("name", "text"),
    [("map.json", '{"cat": 1, "dog": 2, "dgo": 3}'), ("map.csv", "class,teacher\ncat,1\ndog,2\ndgo,3\n")],
)
def test_a_row_for_a_class_that_is_not_there_is_refused(tmp_path: Path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"maps 'dgo', which is not a class of the dataset \(nearest: dog\)"):
        mapped(("cat", "dog"), file=tmp_path / name)


def test_the_printed_map_says_what_a_wordnet_id_stands_for(tmp_path: Path):
    """Whoever means the animal sees that column 673 is a computer's mouse."""
    file = tmp_path / "map.json"
    file.write_text('{"mouse": 673}')
    frozen = teacher(random_weights=True, label_set="imagenet-1k", classes=("mouse",), class_map=str(file))
    assert "teacher: mouse <- 673 n03793489 (mouse, computer mouse)" in frozen.lines()


def test_columns_without_names_are_told(tmp_path: Path):
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "t.pth")
    frozen = teacher(checkpoint=str(tmp_path / "t.pth"), classes=("a", "b", "c"))
    assert any("have no names and are taken in the order of the classes" in line for line in frozen.lines())


def test_numbers_out_of_order_do_not_name_columns_without_names():
    with pytest.raises(InputError, match="the dataset's classes are numbers in another order \\(class 1 is '10'\\)"):
        mapped(NUMERALS, columns=12, label_set=None)
    assert mapped(("1", "2", "3"), columns=3, label_set=None) is None


@pytest.mark.parametrize("rest", [None, "7"])
def test_columns_that_are_made_for_the_classes_have_their_names(rest: str | None) -> None:
    classes = tuple(sorted(NUMERALS))
    assert list(classes) != sorted(classes, key=int)
    frozen = teacher(random_weights=True, classes=classes, rest=rest)
    assert frozen(batch(torch.zeros(2, 3, 32, 32))).logits.shape == (2, len(classes))
    assert not any("no names" in line or "<-" in line for line in frozen.lines())


def test_own_labels_that_are_the_same_twice_are_refused(tmp_path: Path):
    fields = {"columns": 4, "label_names": ("crane", "dog", "cat", "crane"), "timm_tag": False, "label_set": None}
    with pytest.raises(InputError, match="columns 0 and 3; write the number"):
        build_class_map(classes=("crane", "dog"), file=None, **fields)
    file = tmp_path / "map.json"
    file.write_text('{"bird": "crane", "dog": "dog"}')
    with pytest.raises(InputError, match="columns 0 and 3; write the number"):
        build_class_map(classes=("bird", "dog"), file=str(file), **fields)


def test_own_labels_are_found_by_one_of_their_names(tmp_path: Path):
    file = tmp_path / "map.json"
    file.write_text('{"fish": "tench", "dog": "Hound"}')
    labels = ("hound, dog", "tench, Tinca tinca")
    found = build_class_map(
        classes=("fish", "dog"), columns=2, label_names=labels, timm_tag=False, label_set=None, file=str(file)
    )
    assert found.columns == [[1], [0]]


def test_unmapped_classes_stop_with_the_nearest_names():
    with pytest.raises(InputError, match=r"1 of 2 classes .* n01440765 \(nearest: n01440764"):
        mapped(("n01443537", "n01440765"))


def test_everyday_words_are_not_guessed():
    """ImageNet's mouse is a computer's: a folder of that name needs a mapping file."""
    with pytest.raises(InputError, match=r"mouse \(nearest: .*mouse"):
        mapped(("n01440764", "mouse"))


def test_own_label_names_come_before_what_timm_knows():
    own = ImageNetInfo().label_names()[::-1]
    found = mapped(("n01440764", "n01443537"), label_names=tuple(own), timm_tag=True)
    assert found.columns == [[999], [998]]


def test_same_names_in_another_order_are_put_in_order():
    assert mapped(("a", "b", "c"), columns=3, label_names=("c", "a", "b"), label_set=None).columns == [[1], [2], [0]]


def test_same_names_in_the_same_order_need_no_map():
    assert mapped(("a", "b"), columns=2, label_names=("a", "b"), label_set=None) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"label_set": None}, "columns have no names"),  # a person's 1000-class teacher is not ImageNet
        ({"label_set": "imagenet-12k"}, "11821 classes, the teacher's head 1000"),
        ({"label_set": "imagenet"}, "use one of imagenet-1k"),
        ({"label_names": ("a", "b"), "label_set": None}, "2 class names, but the weights have 1000 columns"),
    ],
)
def test_columns_without_the_right_names_are_refused(fields, reason):
    with pytest.raises(InputError, match=reason):
        mapped(IMAGENETTE, **fields)


def test_head_that_timm_did_not_load_is_refused(published):
    """timm drops the published head for another class count, or lacks it, and says so in one INFO line at most."""
    full = timm.create_model("test_resnet").state_dict()
    headless = {name: tensor for name, tensor in full.items() if not name.startswith("fc.")}
    published(headless)
    with pytest.raises(InputError, match="fc"):
        teacher(name="test_resnet.r160_in1k", pretrained=True)


def test_head_that_equals_its_random_start_counts_as_not_loaded(published):
    torch.manual_seed(0)
    published(timm.create_model("test_resnet.r160_in1k").state_dict())
    with pytest.raises(InputError, match="has no head"):
        teacher(name="test_resnet.r160_in1k", pretrained=True)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "nothing to take its weights from"),
        ({"pretrained": True, "random_weights": True}, "teacher.pretrained and teacher.random_weights"),
        ({"name": None, "pretrained": True}, r"teacher\.name: is not set"),
        ({"random_weights": True, "args": {"num_classes": 10}}, "num_classes cannot be given"),
        ({"pretrained": True, "args": {"num_classes": 10}}, "num_classes cannot be given"),
        ({"random_weights": True, "args": {"checkpoint_path": "x.pth"}}, "checkpoint_path cannot be given"),
        ({"random_weights": True, "args": {"pretrained_cfg_overlay": {}}}, "pretrained_cfg_overlay cannot be given"),
        ({"random_weights": True, "args": {"features_only": True}}, "features_only cannot be given"),
        ({"random_weights": True, "args": {"global_pool": ""}}, "test_resnet"),
        ({"name": "test_resnett", "random_weights": True}, "nearest: test_resnet"),
    ],
)
def test_every_other_way_to_a_head_that_was_not_loaded_is_refused(fields, reason):
    with pytest.raises(InputError, match=reason):
        teacher(**fields)


def without_head(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_head, "has no head"),
        (lambda state: {**state, "fc.weight": state["fc.weight"][:9]}, "columns have no names|fc.bias"),
        (lambda state: {**state, "extra": torch.zeros(1)}, "extra is unknown"),
        (lambda state: {name: t for name, t in state.items() if name != "fc.bias"}, "fc.bias is missing"),
    ],
)
def test_checkpoint_that_does_not_hold_the_whole_teacher_is_refused(tmp_path: Path, change, reason):
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    torch.save(change(state), tmp_path / "teacher.pth")
    with pytest.raises(InputError, match=reason):
        teacher(checkpoint=str(tmp_path / "teacher.pth"))


def test_pth_that_would_be_unpickled_is_refused(tmp_path: Path):
    torch.save({"model": Path("code")}, tmp_path / "teacher.pth")
    with pytest.raises(InputError, match="not unpickled"):
        teacher(checkpoint=str(tmp_path / "teacher.pth"))


def test_teacher_has_its_own_eyes():
    """The student sees 16 px in its own normalisation; the teacher gets 32 px in its own, of the whole view."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", img_size=32, num_classes=3)
    frozen = FrozenTeacher(network, student_mean=(0.1,) * 3, student_std=(0.5,) * 3, mean=MEAN, std=STD, image_size=32)
    pixels = torch.rand(2, 3, 16, 16)
    theirs = torch.nn.functional.interpolate(pixels, 32, mode="bicubic", antialias=True)
    expected = network((theirs - 0.5) / 0.25)
    torch.testing.assert_close(frozen(batch((pixels - 0.1) / 0.5)).logits, expected, rtol=1e-4, atol=1e-5)


def test_pretrained_config_says_what_the_teacher_sees(published):
    published(timm.create_model("test_vit").state_dict())
    frozen = teacher(name="test_vit.r160_in1k", pretrained=True, image_size=None)
    assert frozen.facts["image_size"] == timm.get_pretrained_cfg("test_vit.r160_in1k").input_size[-1] == 160
    assert tuple(frozen.facts["mean"]) == tuple(timm.get_pretrained_cfg("test_vit.r160_in1k").mean)
    assert frozen(batch(torch.randn(1, 3, 32, 32))).logits.shape == (1, 10)


def test_fixed_size_teacher_can_be_given_another_size(published):
    published(timm.create_model("test_vit").state_dict())
    frozen = teacher(name="test_vit.r160_in1k", pretrained=True, image_size=64)
    assert frozen.network.patch_embed.img_size == (64, 64)


@pytest.mark.parametrize(
    ("labels", "least"),
    [([0] * 50 + [1] * 50, 65.0), ([0] * 90 + [1] * 10, 99.0), ([0, 0, 0], 100.0)],
)
def test_least_score_is_the_largest_class_and_three_standard_errors(labels, least):
    assert least_top1(labels) == pytest.approx(least)


@pytest.mark.parametrize(
    ("top1", "nll", "min_top1", "reason"),
    [(64.9, 1.0, None, "below 65.00 %"), (40.0, 1.0, 50.0, "below 50.00 %"), (99.0, float("nan"), None, "not finite")],
)
def test_teacher_below_the_gate_is_refused(top1, nll, min_top1, reason):
    with pytest.raises(InputError, match=reason):
        check_score("it", top1, nll, [0] * 50 + [1] * 50, min_top1)


def test_teacher_above_the_gate_may_teach():
    check_score("it", 65.0, 1.0, [0] * 50 + [1] * 50, None)
    check_score("it", 10.0, 1.0, [0] * 50 + [1] * 50, 0.0)


def test_a_fitted_teacher_that_cannot_teach_is_to_be_fitted_longer() -> None:
    with pytest.raises(InputError, match=r"below 65\.00 %; it was fitted on too few steps: raise teacher\.fit\.epochs"):
        check_score("it", 64.0, 1.0, [0] * 50 + [1] * 50, None, fitted=True)


def test_a_minimum_of_100_that_the_recipe_sets_is_no_sign_of_too_few_photos() -> None:
    with pytest.raises(InputError, match=r"below 100\.00 %; it was fitted on too few steps"):
        check_score("it", 80.0, 1.0, [0] * 50 + [1] * 50, 100.0, fitted=True)


@pytest.mark.parametrize("fitted", [True, False])
def test_too_few_photos_to_tell_a_teacher_from_guessing_are_the_reason_that_is_given(fitted: bool) -> None:
    with pytest.raises(InputError, match=r"on 5 .* below 100\.00 %; so few cannot .*: validate on more"):
        check_score("it", 80.0, 1.0, [0, 0, 0, 1, 1], None, fitted=fitted)


def test_a_class_of_many_columns_is_merged_without_padding_all_others():
    columns = [[7], [3], *([column] for column in range(10, 20)), [*range(20, 900)], [901, 902]]
    merging, logits = ClassMap(columns), torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0))
    found = merging(logits)
    for label, group in enumerate(columns):
        merged = logits[..., group].logsumexp(-1) if len(group) > 1 else logits[..., group[0]]
        assert torch.equal(found[..., label], merged), label
    largest = 0

    class Largest(TorchFunctionMode):
        def __torch_function__(self, act, types, args=(), kwargs=None):
            nonlocal largest
            result = act(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Largest():
        merging(logits)
    assert largest <= logits.numel()
