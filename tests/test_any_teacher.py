"""Whatever a teacher is called, it answers in the dataset's classes or it does not teach."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from deit_kd import Batch, FrozenTeacher, InputError
from deit_kd.cli import main
from deit_kd.interfaces import Preprocessing
from deit_kd.models.layouts import to_transformers
from tests.helpers import STUDENT, STUDENT_ARGS, tiny, write_photos
from tests.tiny_parts import tiny_teacher, write_transformers_folder

NAMES = ("ant", "bee", "cat", "dog")
COLUMNS = {"ant": (2,), "bee": (0,), "cat": (3, 4), "dog": (1,)}  # of the first teacher, as only its map knows
FIRST_EYES = (24, (0.4, 0.4, 0.4), (0.3, 0.3, 0.3))
RUNS_EYES = (16, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BATCHES_EYES = (16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Form(NamedTuple):
    """A way to name a teacher, and what is true of it, known from elsewhere."""

    checkpoint: str
    columns: dict[str, tuple[int, ...]] | None  # of the head, by class; None where nobody wrote the names down
    eyes: tuple[Any, ...]
    answer: Callable[[Tensor], Tensor]  # what the network says about images that it sees, [B, M]
    name: str | None = None
    width: int = 4  # M
    args: Any = {}  # noqa: RUF012 - never changed


def seen(eyes: tuple[Any, ...]) -> Tensor:
    size, mean, std = eyes
    images = F.interpolate(normalised(BATCHES_EYES), size=size, mode="bicubic", antialias=True)
    own_mean, own_std = (torch.tensor(values).view(1, 3, 1, 1) for values in BATCHES_EYES[1:])
    raw = images * own_std + own_mean
    return (raw - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def normalised(eyes: tuple[Any, ...]) -> Tensor:
    return (IMAGES - torch.tensor(eyes[1]).view(1, 3, 1, 1)) / torch.tensor(eyes[2]).view(1, 3, 1, 1)


def fused(state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the log of the mean of both heads' softmaxes, by timm alone."""
    model = timm.create_model(STUDENT, img_size=16, num_classes=len(NAMES), **STUDENT_ARGS).eval()
    model.load_state_dict(state)

    def answer(images: Tensor) -> Tensor:
        features = model.forward_features(images)
        heads = torch.stack([model.head(features[:, 0]), model.head_dist(features[:, 1])])
        return heads.log_softmax(-1).logsumexp(0) - math.log(2)

    return answer


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Form]:
    """Two runs, of which the second learned from the first, and their weights under every name that there is."""
    home = tmp_path_factory.mktemp("forms")
    root = write_photos(home / "photos", {"train": 3, "validation": 2}, NAMES)
    torch.manual_seed(1)
    network = timm.create_model("test_resnet", num_classes=5).eval()
    save_file(network.state_dict(), home / "first.safetensors")
    (home / "map.json").write_text(json.dumps(COLUMNS))
    eyes = {"teacher__image_size": 24, "teacher__mean": FIRST_EYES[1], "teacher__std": FIRST_EYES[2]}
    learned = {"teacher__random_weights": None, "teacher__min_top1": 0, "train__batch_size": 12}
    bare = {"teacher__checkpoint": str(home / "first.safetensors"), "teacher__class_map": str(home / "map.json")}
    first, second = home / "first", home / "second"
    assert main(["train", *tiny(root, first, **learned, **bare, **eyes)]) == 0
    named = {"teacher__name": None, "teacher__checkpoint": str(first)}
    assert main(["train", *tiny(root, second, **learned, **named)]) == 0

    state = load_file(second / "student/model.safetensors")
    shutil.copytree(second / "student", home / "local-dir")
    save_file(state, home / "bare.safetensors")
    torch.save({"model": state}, home / "bare.pth")
    processor = {"image_mean": RUNS_EYES[1], "image_std": RUNS_EYES[2], "do_center_crop": False}
    write_transformers_folder(home / "transformers", to_transformers(state), NAMES, processor)

    in_order = {name: (column,) for column, name in enumerate(NAMES)}
    places = {
        "run": second,
        "checkpoint of a run": second / "checkpoints/best.safetensors",
        "student of a run": second / "student",
        "its file": second / "student/model.safetensors",
        "local-dir": f"local-dir:{home / 'local-dir'}",
        "file of a local-dir": home / "local-dir/model.safetensors",
        "transformers": home / "transformers",
    }
    found = {kind: Form(str(place), in_order, RUNS_EYES, fused(state)) for kind, place in places.items()}
    for kind in ("bare.safetensors", "bare.pth"):
        found[kind] = Form(str(home / kind), None, BATCHES_EYES, fused(state), STUDENT, args=STUDENT_ARGS)
    first_state = load_file(first / "student/model.safetensors")
    found["teacher of a run"] = Form(f"{second}:teacher", in_order, RUNS_EYES, fused(first_state))
    for kind, name in {"its teacher": f"{second}:teacher:teacher", "mapped": f"{first}:teacher"}.items():
        found[kind] = Form(name, COLUMNS, FIRST_EYES, network, width=5)
    return found


KINDS = (
    *("run", "checkpoint of a run", "student of a run", "its file", "local-dir", "file of a local-dir"),
    *("transformers", "bare.safetensors", "bare.pth", "teacher of a run", "its teacher", "mapped"),
)
ENTRIES = st.one_of(st.sampled_from(NAMES), st.integers(0, 5), st.sampled_from(("column:1", "label:cat")))


@st.composite
def questions(draw: Any) -> tuple[tuple[str, ...], Any]:
    """Draw a dataset's classes and a mapping, or none: any one, or one that is whole."""
    known = draw(st.sampled_from((NAMES, NAMES, (*NAMES, "eel"))))
    classes = tuple(draw(st.permutations(known))[: draw(st.integers(2, len(known)))])
    mapping = st.dictionaries(st.sampled_from((*NAMES, "eel")), st.lists(ENTRIES, max_size=2), min_size=1)
    places = draw(st.permutations(draw(st.sampled_from((NAMES, range(4), ("column:1", 0, "dog", "label:cat"))))))
    whole = {name: [place] for name, place in zip(classes, places, strict=False)}
    return classes, draw(st.none() | st.just(whole) | mapping)


def columns_meant(entry: int | str, form: Form) -> tuple[int, ...]:
    """Return the columns that a person means; nothing where there are none."""
    if isinstance(entry, int) or entry.startswith("column:"):
        number = int(str(entry).removeprefix("column:"))
        return (number,) if number < form.width else ()
    return (form.columns or {}).get(entry.removeprefix("label:"), ())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(KINDS), question=questions())
def test_a_teacher_answers_in_the_datasets_classes_or_is_refused(
    forms: dict[str, Form], tmp_path_factory: pytest.TempPathFactory, kind: str, question: tuple[tuple[str, ...], Any]
) -> None:
    classes, mapping = question
    form, file = forms[kind], tmp_path_factory.getbasetemp() / "map.json"
    file.write_text(json.dumps(mapping))
    teacher, reason = built_or_refused(form, classes, None if mapping is None else str(file))
    if teacher is None:
        assert "\n" not in reason
        assert not is_plain(form, classes, mapping), reason
        return
    zeros = torch.zeros(len(IMAGES), dtype=torch.long)
    found = teacher(Batch(normalised(BATCHES_EYES), torch.zeros(len(IMAGES), 1), zeros)).logits
    with torch.no_grad():
        columns = form.answer(seen(form.eyes)).split(1, dim=1)
    if mapping is None and form.columns is None:  # nobody knows: it is told, and the gate decides
        assert any("have no names" in line for line in teacher.lines())
        torch.testing.assert_close(found, torch.cat(columns, dim=1), rtol=1e-3, atol=1e-4)
        return
    for label, name in enumerate(classes):
        meant = [columns_meant(entry, form) for entry in ([name] if mapping is None else mapping[name])]
        assert all(meant)
        expected = torch.cat([columns[column] for column in set().union(*meant)], dim=1).logsumexp(1)
        torch.testing.assert_close(found[:, label], expected, rtol=1e-3, atol=1e-4)


def built_or_refused(form: Form, classes: tuple[str, ...], file: str | None) -> tuple[FrozenTeacher | None, str]:
    try:
        teacher = tiny_teacher(
            name=form.name,
            checkpoint=form.checkpoint,
            class_map=file,
            args=form.args,
            channels_last=False,
            classes=classes,
            student=Preprocessing(*BATCHES_EYES, "bicubic", 1.0),
        )
    except InputError as error:
        return None, str(error)
    return teacher, ""


def is_plain(form: Form, classes: tuple[str, ...], mapping: Any) -> bool:
    """Return whether nothing stands against such a teacher."""
    if mapping is None:
        return len(classes) == len(NAMES) if form.columns is None else set(classes) <= set(form.columns)
    if mapping.keys() != set(classes):
        return False
    meant = [[columns_meant(entry, form) for entry in mapping[name]] for name in classes]
    columns = [set().union(*groups) for groups in meant]
    return all(groups and all(groups) for groups in meant) and sum(map(len, columns)) == len(set().union(*columns))
