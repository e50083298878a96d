"""Students that train together and teach one another."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deit_kd import Batch, Distiller, Objective
from deit_kd.checkpoint import newest_checkpoint
from deit_kd.cli import main
from deit_kd.config import Config, build_parser, names_of_peers, parse_config, recipe_of_peer
from deit_kd.engine import Trainer
from deit_kd.evaluation.sources import open_source
from deit_kd.interfaces import InputError, Missing, Student, StudentOutput, head_log_probabilities
from deit_kd.jobs.quantize import training_options
from deit_kd.losses import LogitTerm, soft_distillation
from deit_kd.mutual import MutualDistiller, mean_of_others, spoken
from deit_kd.origins import open_origin
from deit_kd.rehearsal import Rehearsal
from deit_kd.runs.lesson import connect
from deit_kd.runs.outcome import print_heads
from deit_kd.runs.run import build_trainer, prepare
from deit_kd.schedules import Schedule, always
from deit_kd.students import TimmStudent
from deit_kd.teaching.ready import ready_lesson
from tests.forked import run_on_two
from tests.helpers import (
    ONE_PROCESS,
    STUDENT,
    STUDENT_ARGS,
    heads_in,
    records,
    refused,
    signal_in_step,
    snapshot,
    tiny,
)
from tests.tiny_parts import make_batch, pixel_teacher, tiny_learner, tiny_student, tiny_trainer

VIT = {"name": STUDENT, "args": STUDENT_ARGS, "drop_path": 0.0}
CNN = {"name": "test_resnet", "drop_path": 0.0}
NO_TEACHER: dict[str, Any] = {"teacher__name": None, "teacher__random_weights": None, "distill__kind": "none"}
# Everything random, and everything that one student could do to another.
EVERYTHING: dict[str, Any] = {
    "augment__auto_augment": "rand-m9-mstd0.5-inc1",
    "student__drop_path": 0.3,
    "distill__kind": "soft",
    "optim__clip_grad_norm": 0.5,
    "train__epochs": 2,
    "train__accumulation_steps": 2,
    "train__ema_decay": 0.5,
}


def one_head(seed: int = 0) -> TimmStudent:
    return tiny_student(name="test_resnet", args={}, distilled=False, seed=seed)


def objective(weight: float | Schedule = 1.0, kind: str = "soft") -> Objective:
    weight = weight if isinstance(weight, Schedule) else always(weight)
    return Objective(kind, terms=[LogitTerm("peers", weight, always(1.0))])


def mutual(*students: Student, kind: str = "soft", weight: float | Schedule = 1.0) -> MutualDistiller:
    teacher = None if kind == "none" else pixel_teacher
    peers = [Distiller(student, None, objective(weight, kind)) for student in students[1:]]
    return MutualDistiller(Distiller(students[0], teacher, objective(weight, kind)), peers)


def together(*peers: TimmStudent, **options: Any) -> Trainer:
    """Return the trainer of a tiny student and its peers."""
    others = [tiny_learner(peer, 0.5, further_terms=("peers",), name="peer") for peer in peers]
    made = tiny_trainer(ema=0.5, further_terms=("peers",), peers=others, **options)
    made.distiller = mutual(made.student.model, *peers)
    return made


def weights_of(made: Trainer) -> list[Tensor]:
    return [tensor.clone() for own in made.learners for tensor in own.model.state_dict().values()]


def assert_same(here: list[Tensor], there: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


# What is learned.


def test_the_term_is_per_example_and_0_where_peers_agree() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    term = LogitTerm("peers", always(1.0), always(1.0))
    others = logits.log_softmax(-1)
    assert torch.allclose(term.per_example(logits, others, 0.0), torch.zeros(2), atol=1e-7)
    changed = torch.stack([others[0], torch.tensor([0.7, 0.2, 0.1]).log()])
    first, second = term.per_example(logits, changed, 0.0)
    own = logits[1].softmax(-1)
    assert first == pytest.approx(0.0, abs=1e-7)
    assert second == pytest.approx(sum(p * math.log(p / q) for p, q in zip((0.7, 0.2, 0.1), own.tolist(), strict=True)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_term_is_finite_for_extreme_logits_of_two_bytes(dtype: torch.dtype) -> None:
    largest = torch.tensor([[6e4, -6e4, 0.0], [-6e4, -6e4, 6e4]], dtype=dtype, requires_grad=True)
    opposite = spoken(StudentOutput(-largest, -largest), "softmax")
    output, targets = StudentOutput(largest, largest), torch.eye(3)[:2]
    checked = objective(kind="none").checked(output, None, targets, peers=mean_of_others([opposite, opposite], 0))
    checked.terms.loss.backward()
    assert checked.terms.others["peers"] > 0
    assert checked.terms.others["peers"].dtype == torch.float32
    assert checked.is_finite.all()
    assert largest.grad is not None
    assert largest.grad.isfinite().all()


def test_others_speak_with_the_mean_of_their_fused_probabilities() -> None:
    outputs = [StudentOutput(torch.randn(4, 3), torch.randn(4, 3)), StudentOutput(torch.randn(4, 3))]
    said = [spoken(output, "softmax").exp() for output in outputs]
    torch.testing.assert_close(said[0], (outputs[0].cls_logits.softmax(-1) + outputs[0].dist_logits.softmax(-1)) / 2)
    torch.testing.assert_close(said[1], outputs[1].cls_logits.softmax(-1))
    three = [one.log() for one in (*said, said[0])]
    torch.testing.assert_close(mean_of_others(three, 2).exp(), (said[0] + said[1]) / 2)
    assert mean_of_others(three[:2], 0) is three[1]  # of one other there is nothing to average


def test_each_learns_from_the_labels_the_teacher_and_the_others() -> None:
    vit, cnn = tiny_student().eval(), one_head().eval()
    batch = make_batch(6)
    first, second = mutual(vit, cnn).everyone(batch)
    of_vit, of_cnn = vit(batch.images), cnn(batch.images)
    said = {"vit": head_log_probabilities(of_vit)["fused"], "cnn": of_cnn.cls_logits.log_softmax(-1)}
    alone = Objective("soft")
    taught = pixel_teacher(batch)
    for checked, output, others in (
        (first, of_vit, said["cnn"]),
        (second, StudentOutput(of_cnn.cls_logits, of_cnn.cls_logits), said["vit"]),  # its only head learns it all
    ):
        own = alone(output, taught, batch.targets)
        divergence = (others.exp() * (others - output.dist_logits.log_softmax(-1))).sum(-1).mean()
        torch.testing.assert_close(checked.terms.others["peers"], divergence)
        torch.testing.assert_close(checked.terms.loss, own.loss + divergence)


def test_no_gradient_reaches_the_others() -> None:
    vit, cnn = tiny_student(), one_head()
    for which, other in ((0, cnn), (1, vit)):
        mutual(vit, cnn).everyone(make_batch(6))[which].terms.loss.backward()
        assert all(parameter.grad is None for parameter in other.parameters())
        vit.zero_grad()
        cnn.zero_grad()


def test_a_weight_that_has_ended_leaves_a_gradient_for_every_parameter() -> None:
    ended = Schedule(1.0, 0.0, 0.0, 0.5).at(0.9)
    vit, cnn = tiny_student(), one_head()
    made = mutual(vit, cnn, kind="none", weight=Schedule(1.0, 0.0, 0.0, 0.5))
    own, peer = made.objective.remaining(0.9), objective(kind="none")
    rest = MutualDistiller(Distiller(vit, None, own), [Distiller(cnn, None, peer)])
    loss = rest.everyone(make_batch(6), place=0.9)[0].terms
    loss.loss.backward()
    assert ended == 0
    assert loss.loss == loss.classification
    assert all(parameter.grad is not None for parameter in vit.parameters())  # DDP waits for each


# The step.


def test_the_student_draws_as_it_does_alone_and_each_peer_apart() -> None:
    alone = tiny_trainer(drop_path=0.5, ema=0.5)
    students = [tiny_student(drop_path=0.5) for _ in range(2)]
    made = tiny_trainer(drop_path=0.5, ema=0.5, peers=[tiny_learner(student, 0.5, name="peer") for student in students])
    peers = [Distiller(student, None, objective(0.0)) for student in students]
    made.distiller = MutualDistiller(made.distiller, peers)
    for step in range(3):
        alone.step(iter([make_batch(8, seed=step)]), step)
        made.step(iter([make_batch(8, seed=step)]), step)
    assert_same(weights_of(alone), [tensor.clone() for tensor in made.student.model.state_dict().values()])
    one, other = (student.backbone.head.weight for student in students)
    assert not torch.equal(one, other)  # they began alike


def test_a_step_that_is_not_finite_for_one_is_left_out_for_all() -> None:
    made = together(one_head(), tiny_student(seed=1))
    made.step(iter([make_batch(8)]), 0)
    spoiled = made.learners[2].model.get_parameter("backbone.head.bias")
    hook = spoiled.register_hook(lambda gradient: gradient * math.inf)
    before = weights_of(made)
    averages = [tensor.clone() for network in made.weights().values() for tensor in network.state_dict().values()]
    assert made.step(iter([make_batch(8, seed=1)]), 1).terms[3] == 1
    assert_same(weights_of(made), before)  # the statistics of the CNN's BatchNorm, too
    assert_same([tensor for network in made.weights().values() for tensor in network.state_dict().values()], averages)
    hook.remove()
    assert made.step(iter([make_batch(8, seed=1)]), 1).terms[3] == 0
    with torch.no_grad():
        spoiled[0] = math.inf
    assert not made.step(iter([make_batch(8, seed=2)]), 2).is_finite.any()


def test_a_step_is_the_mean_over_the_views_that_are_there_for_each() -> None:
    whole, missing = make_batch(6), Missing(row=1, photo=0, epoch=0, position=0, reason="")
    parts = [Batch(*(tensor[rows] for tensor in whole[:3])) for rows in (slice(0, 4), slice(4, 6))]
    gaps = parts[1]._replace(missing=[missing, missing._replace(row=2)])
    peers = [tiny_student(seed=1), tiny_student(seed=1)]
    at_once, apart = together(peers[0]), together(peers[1], accumulation_steps=2, skip=True)
    at_once.step(iter([whole]), 0)
    apart.step(iter([parts[0], gaps]), 0)
    for here, there in zip(weights_of(at_once), weights_of(apart), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)


def test_each_is_clipped_by_itself() -> None:
    big, small = (tiny_student(seed=1) for _ in range(2))
    made, calm = together(big, clip_grad_norm=0.01), together(small)
    for one in (made, calm):
        one.step(iter([make_batch(8)]), 0)
    assert_same([*big.state_dict().values()], [*small.state_dict().values()])
    start = tiny_student().state_dict()
    moved = [now - start[name] for name, now in made.student.model.state_dict().items()]
    # The learning rate, the norm, and Nesterov's momentum of a first step.
    assert nn.utils.get_total_norm(moved).item() == pytest.approx(0.1 * 0.01 * 1.9, rel=1e-3)


def test_no_step_reads_a_value_from_the_device_and_each_begins_with_weights_of_its_own(
    photos_root: Path, tmp_path: Path
) -> None:
    options = {**EVERYTHING, "peers": [CNN, VIT], "data__on_error": "skip", "train__precision": "bf16"}
    run = prepare(parse_config(tiny(photos_root, tmp_path / "run", **options))[0], ONE_PROCESS)
    lesson = ready_lesson(run)
    made = build_trainer(connect(run, lesson), lesson)
    for own in made.learners:
        own.optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    rehearsal = Rehearsal(made)
    for step in range(2):
        rehearsal.step((rehearsal.batch(4, 16, 3) for _ in range(2)), step)
    rehearsal.evaluate(rehearsal.batch(4, 16, 3))
    assert not torch.equal(run.student.backbone.head.weight, run.peers[1].student.backbone.head.weight)
    assert rehearsal.state().keys() == made.state().keys()


def test_two_heads_teach_fused_as_the_recipe_scores_them(photos_root: Path, tmp_path: Path) -> None:
    options = {**NO_TEACHER, "peers": [VIT], "evaluate__fusion": "logits"}
    run = prepare(parse_config(tiny(photos_root, tmp_path / "run", **options))[0], ONE_PROCESS)
    lesson, batch = ready_lesson(run), make_batch(4)
    distiller = build_trainer(connect(run, lesson), lesson).distiller
    for student in (run.student.eval(), run.peers[0].student.eval()):
        for head in (student.backbone.head, student.backbone.head_dist):
            nn.init.normal_(head.weight)  # or the two fusions are nearly the same
    outputs = [member.answer(batch) for member in distiller.members]
    for checked, own, other in zip(distiller.everyone(batch), outputs, outputs[::-1], strict=True):
        said = (other.cls_logits + other.dist_logits) / 2
        expected = soft_distillation(own.dist_logits, said, 1.0).mean()
        torch.testing.assert_close(checked.terms.others["peers"], expected)


# Whole runs.


@pytest.fixture(scope="module")
def finished(photos_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a teacher and two peers, a ViT and a CNN."""
    folder = tmp_path_factory.mktemp("peers") / "run"
    options = {**EVERYTHING, "peers": [{**VIT, "drop_path": 0.3}, CNN], "evaluate__report": True}
    assert main(["train", *tiny(photos_root, folder, **options)]) == 0
    return folder


def test_with_weight_0_the_student_trains_bit_for_bit_as_alone(photos_root: Path, tmp_path: Path) -> None:
    peers = {"peers": [{**VIT, "drop_path": 0.3}, CNN], "distill__peer_weight": 0}
    assert main(["train", *tiny(photos_root, tmp_path / "alone", **EVERYTHING)]) == 0
    assert main(["train", *tiny(photos_root, tmp_path / "peers", **EVERYTHING, **peers)]) == 0
    for file in ("student/model.safetensors", "student/config.json", "heads.json"):
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "peers" / file).read_bytes(), file
    without = [{key: value for key, value in one.items() if key != "peers"} for one in records(tmp_path / "peers")]
    assert without == records(tmp_path / "alone")
    assert all("peers" in one for one in records(tmp_path / "peers"))


def test_a_run_that_was_stopped_ends_bit_for_bit(finished: Path, photos_root: Path, tmp_path: Path) -> None:
    options = {**EVERYTHING, "peers": [{**VIT, "drop_path": 0.3}, CNN]}
    arguments = tiny(photos_root, tmp_path / "run", **options)
    with signal_in_step(signal.SIGTERM, 3 * 4 + 2):  # within the fifth step, of three optimisers
        assert main(["train", *arguments]) == 128 + signal.SIGTERM
    found, _ = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.parts["progress"]["step"] == 5
    assert main(["train", *arguments, "--resume", "auto"]) == 0
    assert records(tmp_path / "run") == records(finished)
    for place in (".", *(f"peers/{name}" for name in (STUDENT, "test_resnet"))):
        for file in ("student/model.safetensors", "student/config.json", "heads.json"):
            assert (tmp_path / "run" / place / file).read_bytes() == (finished / place / file).read_bytes()


def test_two_processes_give_the_losses_of_one(photos_root: Path, tmp_path: Path) -> None:
    options = {**NO_TEACHER, "peers": [VIT, {**VIT, "weight": {"start": 1, "until": 0.5}}], "train__epochs": 2}
    assert main(["train", *tiny(photos_root, tmp_path / "one", **options)]) == 0
    run_on_two(["train", *tiny(photos_root, tmp_path / "two", **options)], tmp_path / "said.txt")
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        if one["kind"] == "step":
            here, there = ([run, *run["peers"].values()] for run in (one, two))
            for own, other in zip(here, there, strict=True):
                assert own["loss"] == pytest.approx(other["loss"], rel=1e-4)
                assert own["terms"]["peers"]["loss"] == pytest.approx(
                    other["terms"]["peers"]["loss"], rel=1e-3, abs=1e-6
                )


def test_integers_are_learned_from_the_run_itself_without_peers(photos_root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *tiny(photos_root, run, **NO_TEACHER, peers=[CNN])]) == 0
    source = open_source(str(run))
    options = training_options(source, source.own_config(), 4, tmp_path / "integers", epochs=1, as_before=False)
    learning = parse_config([*source.recipe, *options], build_parser("deit-kd quantize"))[0]
    assert (learning.peers, learning.distill.kind) == ([], "soft")
    with pytest.raises(InputError, match="the recipe has peers and no teacher"):
        training_options(source, source.own_config(), 4, tmp_path / "integers", epochs=1, as_before=True)


def test_records_hold_the_heads_and_terms_of_each(finished: Path) -> None:
    for record in records(finished):
        assert list(record["peers"]) == [STUDENT, "test_resnet"]
        for name, own in record["peers"].items():
            if record["kind"] == "step":
                soft = 0.5 * own["classification"] + 0.5 * own["distillation"]
                assert own["terms"]["peers"]["weight"] == 1.0
                assert own["loss"] == pytest.approx(soft + own["terms"]["peers"]["loss"])
            else:
                assert (own["ema"]["heads"]["dist"] is None) == (name == "test_resnet")
    last = records(finished)[-1]
    assert heads_in(finished)["heads"] == last["ema"]["heads"]
    for name in (STUDENT, "test_resnet"):
        assert heads_in(finished / "peers" / name)["heads"] == last["peers"][name]["ema"]["heads"]
        assert records(finished / "peers" / name)[-1]["ema"] == last["peers"][name]["ema"]


def test_the_report_shows_the_curves_of_each(finished: Path) -> None:
    curves = (finished / "report" / "heads.csv").read_text()
    terms = (finished / "report" / "terms.csv").read_text()
    for name in ("run", f"run-{STUDENT}", "run-test_resnet"):
        assert f"{name}: cls" in curves
        assert f"{name}: peers" in terms
        assert (finished / "report" / name / "heads.json").is_file()
    assert main(["plot", str(finished)]) == 0


@pytest.mark.parametrize("form", ["peers/{}", "peers/{}/student", "peers/{}/student/model.safetensors"])
@pytest.mark.parametrize("name", [STUDENT, "test_resnet"])
def test_a_peers_weights_open_by_any_name(finished: Path, form: str, name: str) -> None:
    origin = open_origin("teacher.checkpoint", finished / form.format(name))
    assert origin.architecture == name
    assert origin.classes == ("bars", "dots", "rings")
    assert origin.is_distilled == (name == STUDENT)


def test_each_is_evaluated_asked_and_exported_on_its_own(
    finished: Path, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = next(photos_root.rglob("*.png"))
    for name, heads in ((STUDENT, ["cls", "dist", "fused"]), ("test_resnet", ["cls"])):
        peer = finished / "peers" / name
        assert main(["eval", str(peer), "--against", str(finished)]) == 0
        found = heads_in(peer / "eval" / "validation")
        assert found["student"] == f"run-{name}"
        for head in heads:
            assert found["heads"][head]["nll"] == pytest.approx(heads_in(peer)["heads"][head]["nll"], rel=1e-5)
        capsys.readouterr()
        assert main(["predict", str(peer), str(photo), "--head", "all"]) == 0
        assert [line.split(",")[1] for line in capsys.readouterr().out.splitlines()[1:]] == heads
        assert main(["export", str(peer), "--format", "local-dir", "--to", str(tmp_path / name)]) == 0
        assert json.loads((tmp_path / name / "config.json").read_text())["heads"] == [h for h in heads if h != "fused"]


def test_a_peer_teaches_the_next_run_and_its_own_teacher_is_known(
    finished: Path, photos_root: Path, tmp_path: Path
) -> None:
    peer = finished / "peers" / "test_resnet"
    taught = {"teacher__name": None, "teacher__random_weights": None, "teacher__checkpoint": peer}
    run = tiny(photos_root, tmp_path / "run", **taught, teacher__min_top1=0, train__batch_size=16)
    assert main(["train", *run]) == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["teacher"]["name"] == "test_resnet"


def test_a_store_teaches_peers_as_its_network_does(photos_root: Path, tmp_path: Path) -> None:
    options = {"distill__kind": "hard", "peers": [CNN], "teacher__store": tmp_path / "store"}
    assert main(["train", *tiny(photos_root, tmp_path / "online", **options, teacher__store_mode="record")]) == 0
    assert main(["train", *tiny(photos_root, tmp_path / "stored", **options)]) == 0
    assert records(tmp_path / "online")[:-1] == records(tmp_path / "stored")[:-1]
    for place in (".", "peers/test_resnet"):
        weights = [tmp_path / run / place / "student" / "model.safetensors" for run in ("online", "stored")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_dry_run_counts_all_and_a_student_may_have_one_head(
    photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"student__name": "test_resnet", "student__args": {}, "distill__kind": "soft", "train__device": "cuda"}
    estimates = []
    for peers in ([CNN], [CNN, CNN]):
        capsys.readouterr()
        run = tiny(photos_root, tmp_path / "run", **options, peers=peers)
        assert main(["train", "--dry-run", *run]) == 0
        words = capsys.readouterr().out
        estimates.append(float(words.split("memory: about ")[1].split()[0]))
    assert estimates[1] > 1.2 * estimates[0]
    assert not (tmp_path / "run").exists()


def test_peers_of_one_name_are_numbered_and_each_sees_a_recipe_of_its_own() -> None:
    peers = [{"name": "resnet18"}, {"name": STUDENT}, {"name": "resnet18", "weight": 0.5}]
    terms = [{"kind": "guide"}, {"kind": "dense"}, {"kind": "hard", "weight": 0.1}]
    config = Config.model_validate(
        {
            "student": {"name": STUDENT, "drop_path": 0.2},
            "teacher": {"name": "resnet10t", "random_weights": True},
            "distill": {"kind": "soft", "terms": terms, "peer_weight": 0.25},
            "guide": {"name": "resnet18", "random_weights": True},
            "peers": peers,
        }
    )
    assert names_of_peers(config.peers) == ["resnet18", STUDENT, "resnet18-2"]
    own = recipe_of_peer(config, 2)
    assert Config.model_validate(own.model_dump()) == own
    assert (own.student.name, own.distill.peer_weight) == ("resnet18", 0.5)
    assert [(peer.name, peer.weight) for peer in own.peers] == [(STUDENT, 0.25), ("resnet18", 1.0), (STUDENT, 1.0)]
    assert [term.kind for term in own.distill.terms] == ["hard"]  # the others look into the student alone


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"peers": [{"weight": 1}]}, "peers.0.name"),
        ({"peers": [{**CNN, "weight": -1}]}, "peers.0.weight: -1 must not be below 0"),
        ({"peers": [{**CNN, "wieght": 1}]}, "peers.0.wieght"),
        ({"peers": [CNN, {**CNN, "name": "resnet81"}]}, "peers.1.name: 'resnet81' is not a timm model"),
        ({"peers": [{**CNN, "args": {"num_classes": 5}}]}, "peers.0.args: num_classes cannot be given here"),
        ({"peers": [{**CNN, "checkpoint": "nowhere.pth"}]}, "peers.0.checkpoint: nowhere.pth"),
        ({"peers": [{**VIT, "args": {"patch_size": 5}}]}, "is not a multiple of peers.0.name's patch size 5"),
        ({"peers": [CNN], "distill__peer_weight": -1}, "distill.peer_weight: -1.0 must not be below 0"),
        ({"peers": [CNN], "distill__peer_temperature": 0}, "distill.peer_temperature: 0"),
        (
            {"peers": [CNN], "teacher__kind": "average", "teacher__name": None, "teacher__random_weights": None}
            | {"train__ema_decay": 0.5},
            "peers: teach one another, and teacher.kind average",
        ),
        ({"peers": [CNN], "distill__kind": "none", "distill__alpha": 1}, "peers: learn from labels"),
        (
            {"peers": [CNN], "distill__kind": "none", "distill__alpha": {"start": 1, "until": 0.5}},
            "peers: learn from labels",
        ),
        ({"peers": [CNN], "distill__terms": [{"kind": "peers"}]}, "distill.terms.0.kind"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_and_writes_nothing(
    options: dict[str, Any], line: str, photos_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refused(["train", *tiny(photos_root, tmp_path / "run", **options)], capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_other_peers(
    finished: Path, photos_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {**EVERYTHING, "peers": [CNN]}
    assert "peers" in refused(["train", *tiny(photos_root, finished, **changed), "--resume", "auto"], capsys)


def test_bench_refuses_peers(photos_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "time each alone with --peers []" in refused(["bench", *tiny(photos_root, None, peers=[CNN])], capsys)


def test_a_finished_peer_is_not_trained_over(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer = finished / "peers" / str(CNN["name"])
    before = snapshot(finished)
    line = refused(["train", "--config", str(peer / "config.yaml"), "--resume", "auto"], capsys)
    assert f"output: {peer} is a peer that {finished} trained" in line
    assert snapshot(finished) == before


def test_a_table_of_scores_says_whose_they_are_and_names_a_teacher_only_where_one_taught(
    capsys: pytest.CaptureFixture[str],
) -> None:
    heads = {"cls": {"top1": 50.0, "top5": None, "nll": 1.0}, "dist": None, "fused": None}
    alone = {"n": 2, "unreadable": {}, "weights": "ema", "heads": heads, "teacher": None}
    print_heads({**alone, "agreement": {"cls_teacher": None}}, "resnet18")
    said = capsys.readouterr().out
    assert "resnet18: 2 images, weights: ema" in said.replace("\n", " ")
    assert "teacher" not in said
    print_heads({**alone, "agreement": {"cls_teacher": 0.5}})
    assert "agrees with teacher" in capsys.readouterr().out
