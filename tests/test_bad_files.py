"""No file of another maker runs code, leaves its folder, or speaks to the terminal or the browser."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.torch_version import TorchVersion

from deit_kd.checkpoint import newest_checkpoint
from deit_kd.cli import main
from deit_kd.data.downloads import cifar10
from deit_kd.evaluation.sources import open_source
from deit_kd.interfaces import InputError, printable
from deit_kd.origins import open_model, open_origin
from deit_kd.run_folder import read_facts
from deit_kd.store import LabelStore, epoch_part
from tests.helpers import CLASSES, Finished, refused, snapshot, tiny, write_photos
from tests.tiny_parts import begin_store, fill_store


class Payload:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def malicious(path: Path, ran: Path, kind: str) -> Path:
    """Write a payload as a bare pickle, as torch's zip, or as torch's zip with a state dict around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(ran)))
    else:
        held = {"model": {"head.weight": torch.ones(2, 2)}, "args": Payload(ran)} if kind == "state dict" else None
        torch.save(held or Payload(ran), path)
    return path


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The folder that a payload would make; the payload works."""
    folder = tmp_path / "ran"
    torch.load(malicious(tmp_path / "works.pth", folder, "state dict"), weights_only=False)
    folder.rmdir()
    return folder


PLACES = ["weights.pth", "weights.pt", "weights.bin", "weights.safetensors", "run/student/model.safetensors"]


@pytest.mark.parametrize("kind", ["pickle", "torch", "state dict"])
@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_given_as_weights_does_not_run(tmp_path: Path, ran: Path, place: str, kind: str) -> None:
    file = malicious(tmp_path / place, ran, kind)
    for given in {file, file.parents[1]} if place.startswith("run/") else {file}:
        with pytest.raises(InputError):
            assert open_origin("key", given).state
    assert not ran.exists()


@pytest.mark.parametrize("key", ["student.checkpoint", "teacher.checkpoint"])
def test_a_pickle_in_a_recipe_does_not_run(
    key: str, photos_root: Path, tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {key.replace(".", "__"): str(malicious(tmp_path / "weights.pth", ran, "state dict"))}
    line = refused(["train", *tiny(photos_root, tmp_path / "run", teacher__random_weights=None, **given)], capsys)
    assert f"{key}: {tmp_path}/weights.pth holds more than tensors and is not unpickled" in line
    assert not ran.exists()
    assert not (tmp_path / "run").exists()


def test_a_pickle_to_be_scored_does_not_run(
    photos_root: Path, tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = malicious(tmp_path / "weights.pth", ran, "state dict")
    assert "is not unpickled" in refused(["eval", str(file), "--data.root", str(photos_root)], capsys)
    assert not ran.exists()


def test_a_pickle_among_checkpoints_is_passed_over(tmp_path: Path, ran: Path) -> None:
    malicious(tmp_path / "checkpoints" / "step-000000009.safetensors", ran, "state dict")
    found, skipped = newest_checkpoint(tmp_path / "checkpoints")
    assert found is None
    assert len(skipped) == 1
    assert not ran.exists()


def test_a_pickle_in_a_store_does_not_run(tmp_path: Path, ran: Path) -> None:
    store = begin_store(tmp_path / "store")
    malicious(store.folder / f"{epoch_part(0)}.safetensors", ran, "state dict")
    with pytest.raises(InputError, match="truncated or altered"):
        store.verify([epoch_part(0)])
    assert not ran.exists()


@pytest.mark.parametrize("file", ["data_batch_1", "batches.meta"])
def test_a_pickle_among_cifars_own_does_not_run(tmp_path: Path, ran: Path, file: str) -> None:
    malicious(tmp_path / "cifar-10-batches-py" / file, ran, "pickle")
    with pytest.raises(InputError, match=r"data\.root: .*: Dataset not found or corrupted; set --data"):
        cifar10(root=str(tmp_path), download=False)
    assert not ran.exists()


@pytest.mark.parametrize("torch_version", ["2.6.0", "2.9.1+cu128"])
def test_an_old_torch_opens_no_pth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_version: str) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "weights.pth")
    save_file({"x": torch.ones(1)}, tmp_path / "weights.safetensors")
    monkeypatch.setattr(torch, "__version__", TorchVersion(torch_version))
    with pytest.raises(InputError, match=r"CVE-2026-24747\); save it as \.safetensors, or upgrade to torch 2\.10"):
        assert open_origin("key", tmp_path / "weights.pth").state
    assert open_origin("key", tmp_path / "weights.safetensors").state


@pytest.mark.parametrize("torch_version", ["2.10.0", "2.15.0+cu132", "3.0"])
def test_a_newer_torch_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_version: str) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "weights.pth")
    monkeypatch.setattr(torch, "__version__", TorchVersion(torch_version))
    assert open_origin("key", tmp_path / "weights.pth").state


def test_one_number_that_poses_as_a_terabyte_is_refused(tmp_path: Path) -> None:
    torch.save({"head.weight": torch.ones(1).expand(2**38)}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="holds no state dict"):
        assert open_origin("key", tmp_path / "weights.pth").state


HEADERS = [
    b"",
    b"\xff" * 8,
    (2**60).to_bytes(8, "little") + b"{}",
    (2**40).to_bytes(8, "little") + b"{" * 99,
    (10**5).to_bytes(8, "little") + b"[" * 10**5,
    (99).to_bytes(8, "little")
    + b'{"x":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}'.ljust(99)
    + b"1234",
]


@pytest.mark.parametrize("content", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_claims_too_much_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as weights"):
        assert open_origin("key", tmp_path / "weights.safetensors").state


def test_the_folder_of_weights_does_not_choose_other_weights(finished: Finished, tmp_path: Path, ran: Path) -> None:
    shutil.copytree(finished.folder / "student", tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text())
    malicious(tmp_path / "other.pth", ran, "state dict")
    config["model_args"] |= {"checkpoint_path": str(tmp_path / "other.pth"), "pretrained": True}
    config["model_args"] |= {
        "pretrained_cfg": {"file": str(tmp_path / "other.pth")},
        "cache_dir": str(tmp_path / "cache"),
    }
    (tmp_path / "student/config.json").write_text(json.dumps(config))
    state = open_model("key", tmp_path / "student").state_dict()
    assert torch.equal(state["head.bias"], load_file(tmp_path / "student/model.safetensors")["head.bias"])
    assert "other.pth" not in str(open_source(str(tmp_path / "student")).recipe)
    assert not ran.exists()
    assert not (tmp_path / "cache").exists()


def test_an_index_of_shards_leads_nowhere(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "vit"}')
    index = {"weight_map": {"x": "../secret.safetensors", "y": str(tmp_path / "secret.safetensors")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="holds no weights"):
        open_source(str(folder))


def test_names_in_a_store_lead_nowhere(tmp_path: Path) -> None:
    manifest = json.loads((begin_store(tmp_path / "store").folder / "store.json").read_text())
    manifest["classes"] = ["../../secret"] * len(manifest["classes"])
    manifest["parts"] = ["../../secret.safetensors"]
    (tmp_path / "store/store.json").write_text(json.dumps(manifest))
    fill_store(LabelStore(tmp_path / "store"), 0)
    assert {path.name for path in tmp_path.iterdir()} == {"store"}
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"store.json", f"{epoch_part(0)}.safetensors"}


def test_a_link_in_a_store_deletes_nothing_elsewhere(tmp_path: Path) -> None:
    store = begin_store(tmp_path / "store")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/model.safetensors").write_bytes(b"years of work")
    (store.folder / f"{epoch_part(0)}.pieces").symlink_to(tmp_path / "precious")
    for act in (lambda: store.missing(epoch_part(0)), lambda: fill_store(store, 0)):
        with pytest.raises(InputError, match="is a link"):
            act()
    assert snapshot(tmp_path / "precious") == {"model.safetensors": b"years of work"}


def test_a_link_where_a_file_is_being_written_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "store").mkdir()
    (tmp_path / "store/.store.json.partial").symlink_to(tmp_path / "precious")
    begin_store(tmp_path / "store")
    assert (tmp_path / "precious").read_text() == "years of work"


def test_a_run_that_learned_from_itself_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "distilled", tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    facts["teacher"]["source"] = f"{run}:teacher"
    (run / "run.json").write_text(json.dumps(facts))
    recipe = (run / "config.yaml").read_text().replace("random_weights: true", "random_weights: false")
    (run / "config.yaml").write_text(recipe)
    given = {"teacher__checkpoint": f"{run}:teacher", "teacher__random_weights": None, "teacher__name": None}
    assert "learned from itself" in refused(["train", *tiny(runs / "photos", tmp_path / "new", **given)], capsys)


def test_a_run_of_a_recipe_that_is_now_refused_says_which_key(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs / "distilled", tmp_path / "run")
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    for section, keys, expected in (
        ("teacher", {"kind": "average"}, "config.yaml: teacher.kind: average, but with train.ema_decay 0"),
        ("train", {"epochs": -1}, "config.yaml: train.epochs: -1"),
    ):
        (run / "config.yaml").write_text(yaml.safe_dump({**recipe, section: {**recipe[section], **keys}}))
        line = refused(["eval", str(run)], capsys)
        assert expected in line
        assert "Value error" not in line


SPOKEN = [
    ("plain · ünïcode …", True),
    ("two\nlines", False),
    ("\x1b[31mred", False),
    ("\udcff", False),
    ("\u202egnp", False),
]


@pytest.mark.parametrize(("text", "stays"), SPOKEN)
def test_what_a_terminal_would_obey_is_shown(text: str, stays: bool) -> None:
    assert (printable(text) == text) is stays
    assert printable(text).isprintable()


def test_an_error_about_a_name_of_two_lines_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["plot", str(tmp_path / "\x1b[2Jtwo\nlines")], capsys)
    assert "\\x1b[2Jtwo\\nlines is not there" in line


HOSTILE = ("<script>alert(1)", "[red]$x^$[bold]", "\x1b[31mred\nline", "`ls` ](javascript:1)", "'\"&amp;<svg>")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a report, whose classes and folder have the names that a joker would give them."""
    home = tmp_path_factory.mktemp("hostile")
    write_photos(home / "photos", {"train": 4, "validation": 3}, HOSTILE)
    first = next((home / "photos/validation" / HOSTILE[0]).iterdir())
    first.rename(first.with_name("<img src=x onerror=alert(2)>\x1b]0;owned\x07.png"))
    run = home / "[red]<script>alert(3)"
    assert main(["train", *tiny(home / "photos", run, evaluate__report=True)]) == 0
    return run


def test_no_name_becomes_a_tag_of_the_report(hostile: Path) -> None:
    page = (hostile / "report/report.html").read_text()
    assert "<script" not in page
    assert "onerror=alert" not in page.replace("&lt;img src=x onerror=alert", "")
    assert page.count("</svg>") == page.count("<svg")
    assert "&lt;script&gt;alert(1)" in page


def test_no_name_reaches_the_terminal_as_it_is(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, out = hostile.parent / "photos", str(hostile.parent / "out")
    photo = str(photos / "train" / HOSTILE[2] / "000.png")
    for arguments in (
        ["eval", str(hostile), "--diagnose", "true"],
        ["plot", str(hostile)],
        ["predict", str(hostile), photo],
        ["data", "check", str(photos)],
        ["export", str(hostile), "--format", "local-dir", "--to", out],
    ):
        assert main(arguments) in (0, 1), arguments
        said = capsys.readouterr()
        assert not {"\x1b", "\x07"} & set(said.out + said.err), arguments


def test_no_name_becomes_markup_of_the_model_card(hostile: Path) -> None:
    main(["export", str(hostile), "--format", "timm", "--to", str(hostile.parent / "timm")])
    card, _, recipe = (hostile.parent / "timm/README.md").read_text().partition("## Recipe")
    assert "<script>" not in card
    assert "](javascript" not in card.replace("\\]", "")
    assert [line for line in card.splitlines() if line.startswith("line")] == []
    assert recipe.count("```") == 2


def test_a_name_that_no_encoding_holds_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_photos(tmp_path / "photos", {"train": 2, "validation": 2})
    folder = os.fsencode(root / "train" / CLASSES[0])
    os.rename(folder + b"/000.png", folder + b"/caf\xe9.png")
    assert "caf\\udce9.png is not valid UTF-8; rename it" in refused(["train", *tiny(root, tmp_path / "run")], capsys)


def test_class_names_of_a_table_can_be_read_again(hostile: Path) -> None:
    with open(hostile / "report/classes.csv", newline="") as file:
        assert {row["class"] for row in csv.DictReader(file)} == set(HOSTILE)


def test_what_a_later_version_records_of_a_run_is_kept(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"classes": ["a"], "data": {}, "teacher": None, "of a later version": 1}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert read_facts(tmp_path) == facts
