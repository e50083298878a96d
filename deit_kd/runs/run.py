"""One run, from its parts to its end: prepare it, connect it, train."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch import nn

from deit_kd.checkpoint import CheckpointWriter
from deit_kd.config import Config, described
from deit_kd.console import say
from deit_kd.data import Splits
from deit_kd.distributed import Processes, on_main
from deit_kd.engine import Trainer
from deit_kd.files import write_atomically, write_json
from deit_kd.interfaces import InputError, Rest, counted
from deit_kd.kernels import choose_kernels, preferred_attention
from deit_kd.learner import Learner
from deit_kd.models import last_block
from deit_kd.models.tokens import answers_apart
from deit_kd.randomness import PATHS_VERSION, VIEWS_VERSION
from deit_kd.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    FACTS_FILE,
    HEADS_FILE,
    STUDENT_FOLDER,
    AttentionFacts,
    Facts,
    HeadScores,
    RestFacts,
    TeacherFacts,
    kept_weights,
    peer_folder,
)
from deit_kd.runs import parts
from deit_kd.runs.attention import attention_line, attention_of
from deit_kd.runs.average import AverageTeacher, average_line, build_average, check_own_average
from deit_kd.runs.course import Course
from deit_kd.runs.journal import Journal, check_tracking
from deit_kd.runs.lesson import Lesson, build_distiller, connect
from deit_kd.runs.meeting import meet_teachers
from deit_kd.runs.memory_format import Choices, lay_out_teachers, memory_format_lines
from deit_kd.runs.opening import open_folder
from deit_kd.runs.outcome import head_scores, print_heads, save_student
from deit_kd.runs.peers import build_peers, save_peer
from deit_kd.runs.photos import agreed_splits, build_data_errors, build_evaluation_loader, skips
from deit_kd.runs.prepared import AfterEpoch, Peer, Run
from deit_kd.runs.progress import Progress
from deit_kd.runs.viewing import build_training_loader, cached, makers_of, training_order
from deit_kd.stopping import Watch
from deit_kd.students import TimmStudent


def prepare(
    config: Config, processes: Processes, splits: Splits | None = None, is_named_by_recipe: bool = False
) -> Run:
    """Build all parts of a run but the teacher.

    Args:
        config: its recipe.
        processes: that train it.
        splits: its photos, if they are already listed.
        is_named_by_recipe: whether the folder's name identifies everything that the run depends on; it then resumes
            whatever else has changed.

    Raises:
        InputError: anything in the recipe, the data or the output folder that cannot work.
    """
    if config.train.precision == "fp16" and processes.device.type == "cpu":
        raise InputError("train.precision: fp16 needs CUDA; use bf16 or off on the CPU")
    check_tracking(config.tracking.wandb)
    choose_kernels(processes.device, config.train.deterministic)
    splits = splits or agreed_splits(config, processes)
    if len(splits.validation) < processes.count:
        raise InputError(
            f"data: {len(splits.validation)} validation images are fewer than {processes.count} processes; use fewer "
            "processes"
        )
    order = training_order(config, splits.train, processes)
    check_own_average(config, order.total_steps)
    parts.check_taught(config, len(splits.train.classes))
    with processes.busy("builds the student"):
        student = parts.build_student(config, splits.train.classes, processes.device)
    parts.check_batch_norms(config, student, processes)
    optimizer = parts.build_student_optimizer(config, student)
    peers = build_peers(config, splits.train.classes, processes, order.steps_per_epoch)
    schedule = parts.build_schedule(config, optimizer, order.steps_per_epoch)
    data_facts = {split: photos.digest() for split, photos in splits._asdict().items()}
    backbones = [student.backbone, *(peer.student.backbone for peer in peers)]
    folder, checkpoint = open_folder(config, processes, None if is_named_by_recipe else data_facts, backbones)
    # Photos are decoded once everything else is known to work; a teacher's fit shares them.
    splits = splits._replace(train=cached(config, splits.train, processes))
    return Run(
        config=config,
        processes=processes,
        splits=splits,
        folder=folder,
        loader=build_training_loader(config, splits.train, processes),
        validation=build_evaluation_loader(config, splits.validation, processes),
        student=student,
        optimizer=optimizer,
        data_facts=data_facts,
        schedule=schedule,
        checkpoint=checkpoint,
        peers=peers,
        errors=build_data_errors(
            config, splits, folder, processes, first_step=0 if checkpoint is None else checkpoint["progress"]["step"]
        ),
    )


def execute(run: Run, lesson: Lesson | None = None, after_epoch: AfterEpoch | None = None) -> HeadScores:
    """Train `run` from its `lesson` to its end; return what ``heads.json`` holds.

    `after_epoch(epoch, beat)` is called in every process when the steps of an epoch are done; if it takes long, it must
    call `beat`.

    Raises:
        InputError: the teacher cannot be right, or no step has a finite gradient.
        OSError: a checkpoint cannot be written.
        Stopped: a signal ends the run; its checkpoint is written.
    """
    config, processes = run.config, run.processes
    lesson = lesson or Lesson()
    prepared, run = run, connect(run, lesson)
    memory_formats = lay_out_teachers(run, lesson)
    teacher_facts, teacher_predictions = meet_teachers(run, lesson)
    further_of_peers = {peer.name: peer.objective.further_terms for peer in run.peers}
    progress = Progress(processes.device, run.objective.further_terms, further_of_peers)
    if run.checkpoint is not None:
        progress.load_state(run.checkpoint["progress"], processes)
    trainer = build_trainer(run, lesson, progress.step)
    attention = attention_of(run, is_resumed=run.checkpoint is not None)
    if run.checkpoint is not None:
        trainer.load_state(run.checkpoint["trainer"])
    prepared.checkpoint = run.checkpoint = None  # or its tensors would stay in memory until the end

    def begin() -> None:
        _write_facts(run, teacher_facts, attention, memory_formats)
        _say_start(run, trainer, progress.step)
        if attention is not None:
            say(attention_line(attention))
        for line in memory_format_lines(memory_formats or {}):
            say(line)

    on_main(processes, begin, "writes the facts of the run")
    journal = Journal(
        run.folder,
        title=run.folder.name,
        total_steps=run.loader.total_steps,
        first_step=progress.step,
        is_main=processes.is_main,
        wandb_project=config.tracking.project if config.tracking.wandb else None,
        recipe=config.model_dump(mode="json"),
    )
    checkpoints = CheckpointWriter(run.folder / CHECKPOINTS, config.train.keep_checkpoints)
    teacher_score = None if teacher_facts is None else teacher_facts["score"]
    with closing(journal), closing(checkpoints), Watch(processes, progress.step, config.train.timeout_seconds) as watch:
        course = Course(
            run, lesson, trainer, progress, journal, checkpoints, watch, teacher_score, teacher_predictions, after_epoch
        )
        with preferred_attention(None if attention is None else attention["kernel"]):
            scores = course.to_the_end()
    weights, networks = kept_weights(scores), trainer.weights()
    unreadable = run.errors.unreadable("validation", run.loader.total_steps)
    heads = head_scores(weights, scores[weights], teacher_score, unreadable)

    def end() -> None:
        save_student(run, networks[weights], run.folder)
        for peer in run.peers:
            called = f"{peer.name}/{weights}"
            of_peer = head_scores(weights, scores[called], teacher_score, unreadable)
            save_peer(run, peer, networks[called], of_peer)
            say(f"peer {peer.name}: {peer_folder(run.folder, peer.name)}")
            print_heads(of_peer, peer.name)
        write_json(run.folder / HEADS_FILE, heads)
        print_heads(heads, config.student.name if run.peers else None)
        say(f"run: {run.folder}   student: {run.folder / STUDENT_FOLDER}   heads: {run.folder / HEADS_FILE}")

    on_main(processes, end, "writes the student")
    return heads


def build_trainer(run: Run, lesson: Lesson, first_step: int = 0) -> Trainer:
    """Return the trainer of a connected run; if its own average teaches, `lesson` gets to know it."""
    config, processes = run.config, run.processes
    student = _learner_of(run, run.loader.total_steps, connectors=run.connectors)
    if config.learns_from_own_average:
        assert student.ema is not None  # or the recipe is refused
        lesson.answers = AverageTeacher(student.ema.module, config.train.precision, config.evaluate.fusion)
    return Trainer(
        distiller=build_distiller(run, lesson, first_step),
        learners=(student, *(_learner_of(peer, run.loader.total_steps, name=peer.name) for peer in run.peers)),
        scaler=torch.amp.GradScaler(processes.device.type, enabled=config.train.precision == "fp16"),
        processes=processes,
        accumulation_steps=config.train.accumulation_steps,
        seed=config.seed,
        skip=skips(config),
        total_steps=run.loader.total_steps,
    )


def _learner_of(one: Run | Peer, total_steps: int, connectors: nn.Module | None = None, name: str = "") -> Learner:
    average = build_average(one.config, one.student, total_steps)
    own = (one.student, one.optimizer, one.schedule, average, one.config.optim.clip_grad_norm)
    return Learner(*own, connectors, one.objective.further_terms, name)


def _write_facts(
    run: Run, teacher_facts: TeacherFacts | None, attention: AttentionFacts | None, memory_formats: Choices | None
) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    makers = makers_of(run.config)
    facts: Facts = {
        "data": run.data_facts,
        "images": {split: len(photos) for split, photos in run.splits._asdict().items()},
        "views": VIEWS_VERSION,
        "paths": PATHS_VERSION,
        "last_block": last_block.VERSION,
        "executor": makers["executor"],
        "decoder": makers["decoder"],
        "classes": list(run.classes),
        "rest": _rest_facts(run.splits.train.rest),
        "student": _account_of(run.student),
        "teacher": teacher_facts,
        "processes": run.processes.count,
        "attention": attention,
        "memory_format": memory_formats,
        "torch": torch.__version__,
    }
    if run.peers:
        facts["peers"] = {peer.name: _account_of(peer.student) for peer in run.peers}
    write_json(run.folder / FACTS_FILE, facts)
    write_atomically(run.folder / CONFIG_FILE, run.config.to_yaml().encode())


def _rest_facts(rest: Rest | None) -> RestFacts | None:
    return None if rest is None else {"name": rest.name, "classes": list(rest.classes), "kept": rest.kept}


def _account_of(student: TimmStudent) -> dict[str, Any] | None:
    return None if student.account is None else student.account.record()


def _say_start(run: Run, trainer: Trainer, first_step: int) -> None:
    size = _peer_text(run.student) if run.peers else _size_text(run.student)
    say(
        f"{run.config.student.name}: {size}, {counted(len(run.splits.train), 'training image')}, "
        f"{counted(len(run.classes), 'class')}, {counted(run.config.train.epochs, 'epoch')} of "
        f"{counted(run.loader.steps_per_epoch, 'step')}"
        + (f", continued from step {first_step}" if first_step else "")
        + f"; writes {run.folder}"
    )
    if run.config.data.taken:
        say(f"takes part of the photos: {run.config.data.taken}")
    say(f"learns from {described(run.config)}")
    for peer in run.peers:
        say(f"peer {peer.name}: {_peer_text(peer.student)}, learns from {described(peer.config)}")
    if trainer.student.ema is not None:
        say(average_line(trainer.student.ema, run.loader.total_steps))
    if run.config.learns_from_own_average:
        say("teacher: the average of the student's own weights; nothing checks it before the first step")
    if not run.objective.learns_from_labels:
        say(
            f"the run does not learn from labels: score the features with deit-kd eval {run.folder} --probe true, not "
            "the heads"
        )
    for student in (run.student, *(peer.student for peer in run.peers)):
        for line in student.account.lines() if student.account is not None and not first_step else ():
            say(line)


def _size_text(student: TimmStudent) -> str:
    return f"{sum(parameter.numel() for parameter in student.parameters()) / 1e6:.1f} M parameters"


def _peer_text(student: TimmStudent) -> str:
    return f"{_size_text(student)}, {'two heads' if answers_apart(student.backbone) else 'one head'}"
