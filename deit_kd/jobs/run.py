"""One run: prepare it, refuse what cannot work before anything is written, then train to the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deit_kd.checkpoint import newest_checkpoint, save_checkpoint
from deit_kd.config import Config, flat, read_recipe
from deit_kd.data import Splits, TrainingLoader
from deit_kd.distributed import Processes
from deit_kd.engine import Distiller, Trainer, evaluate, score_teacher, train
from deit_kd.files import check_writable, write_atomically, write_json
from deit_kd.interfaces import Batch, InputError, Student, Teacher
from deit_kd.jobs import parts
from deit_kd.losses import Objective
from deit_kd.models import STUDENT_FOLDER, choose_attention, save_local_dir, tensors_hash
from deit_kd.optim import build_optimizer, build_schedule
from deit_kd.store import RecordingTeacher, StoredTeacher
from deit_kd.students import TimmStudent
from deit_kd.teachers import NetworkTeacher, check_score
from deit_kd.tracking import (
    CHECKPOINTS,
    CONFIG_FILE,
    FACTS_FILE,
    HEADS_FILE,
    Journal,
    check_tracking,
    newest_folder,
    next_free_folder,
    print_heads,
    read_facts,
    say,
)

RUNS = Path("runs")

# What a run leaves that was killed before its first step.
LEFTOVERS = {FACTS_FILE, f".{FACTS_FILE}.partial", f".{CONFIG_FILE}.partial"}

# Keys that a run may be resumed with another value of: they do not change a result.
FREE_ON_RESUME = {
    "output",
    "resume",
    "recipe",
    "data.root",  # the photos themselves are compared
    "data.workers",
    "data.in_memory",
    "data.download",
    "teacher.checkpoint",  # the weights themselves are compared
    "teacher.class_map",  # the columns are compared
    "teacher.min_top1",
    "teacher.fit.folder",
    "teacher.compile",
    "teacher.store",  # what it answers with is compared
    "teacher.store_mode",
    "teacher.store_top",
    "train.device",
    "train.log_every_steps",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "evaluate.report",
    "tracking.wandb",
    "tracking.project",
}


@dataclass
class Run:
    """Everything of one run but its teacher; nothing is written yet."""

    config: Config
    processes: Processes
    splits: Splits
    folder: Path
    loader: TrainingLoader
    validation: Iterable[Batch]
    student: TimmStudent
    objective: Objective
    optimizer: torch.optim.Optimizer
    data_facts: dict[str, str]  # a hash of each split
    schedule: Scheduler
    checkpoint: Any  # named parts, or None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the dataset."""
        return self.splits.train.classes


def prepare(config: Config, processes: Processes, splits: Splits | None = None) -> Run:
    """Build all parts of a run but the teacher.

    Raises:
        InputError: anything in the recipe, the data or the output folder that cannot work.
    """
    if config.train.precision == "fp16" and processes.device.type == "cpu":
        raise InputError("train.precision: fp16 needs CUDA; use bf16 or off on the CPU")
    check_tracking(config.tracking.wandb)
    choose_attention(config.train.attention, processes.device)
    splits = splits or parts.build_splits(config)
    if config.data.in_memory:  # here, so that a teacher's fit shares what was decoded
        splits = splits._replace(train=splits.train.in_memory())
    loader = parts.build_training_loader(config, splits.train, processes)
    student = parts.build_student(config, splits.train.classes).to(processes.device)
    optimizer = build_optimizer(
        student.backbone,
        name=config.optim.name,
        lr=config.optim.lr,
        lr_reference_batch=config.optim.lr_reference_batch,
        weight_decay=config.optim.weight_decay,
        layer_decay=config.optim.layer_decay,
        args=config.optim.args,
        batch_size=config.train.batch_size,
    )
    schedule = build_schedule(
        optimizer,
        warmup_epochs=config.optim.warmup_epochs,
        warmup_lr=config.optim.warmup_lr,
        min_lr=config.optim.min_lr,
        epochs=config.train.epochs,
        steps_per_epoch=loader.steps_per_epoch,
    )
    data_facts = {"train": splits.train.digest(), "validation": splits.validation.digest()}
    folder, checkpoint = _open_folder(config, processes, data_facts)
    processes.wait()  # until all have looked at the folder, nobody writes to it
    return Run(
        config=config,
        processes=processes,
        splits=splits,
        folder=folder,
        loader=loader,
        validation=parts.build_evaluation_loader(config, splits.validation, processes),
        student=student,
        objective=Objective(
            config.distill.kind, config.distill.alpha, config.distill.temperature, config.distill.scale
        ),
        optimizer=optimizer,
        data_facts=data_facts,
        schedule=schedule,
        checkpoint=checkpoint,
    )


def execute(
    run: Run,
    teacher: NetworkTeacher | StoredTeacher | RecordingTeacher | None = None,
    teacher_source: str | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train `run` to its end; return what ``heads.json`` holds.

    `after_epoch(epoch)` is called in every process when the steps of an epoch are done.
    """
    config, processes, folder = run.config, run.processes, run.folder
    teacher_facts, teacher_predictions = _meet_teacher(run, teacher, teacher_source)
    trainer = build_trainer(run, teacher)
    first_step, window = 0, Window(processes.device)
    if run.checkpoint is not None:
        trainer.load_state(run.checkpoint["trainer"])
        first_step = run.checkpoint["step"]
        window.load_state(run.checkpoint["window"], processes)
    if processes.is_main:
        _write_facts(run, teacher_facts)
        _say_start(run, first_step)
    processes.wait()
    journal = Journal(
        folder,
        title=folder.name,
        total_steps=run.loader.total_steps,
        first_step=first_step,
        is_main=processes.is_main,
        wandb_project=config.tracking.project if config.tracking.wandb else None,
        recipe=config.model_dump(mode="json"),
    )
    teacher_score = None if teacher_facts is None else teacher_facts["score"]
    latest: dict[str, Any] = {}  # scores of the last epoch that ended here

    def score() -> dict[str, Any]:
        trainer.align_buffers()
        models: dict[str, nn.Module] = {"model": run.student}
        if trainer.ema is not None:
            models["ema"] = trainer.ema.module
        return evaluate(
            models,
            run.validation,
            classes=len(run.classes),
            total=len(run.splits.validation),
            processes=processes,
            precision=config.train.precision,
            fusion=config.evaluate.fusion,
            teacher_predictions=teacher_predictions,
        )

    def after_step(step: int, terms: Tensor) -> None:
        window.add(terms)
        at_epoch_end = step % run.loader.steps_per_epoch == 0
        if step % config.train.log_every_steps == 0 or at_epoch_end:
            record = window.read(processes, config.train.batch_size)
            record["lr"] = max(group["lr"] for group in trainer.optimizer.param_groups)
            record["epoch"] = (step - 1) // run.loader.steps_per_epoch
            if not math.isfinite(record["loss"]):
                raise InputError(
                    f"train: the loss is {record['loss']} at step {step}; lower optim.lr or set train.precision off"
                )
            journal.record("step", step, record)
            journal.progress(step, _step_note(step, run.loader.total_steps, record, config.distill.kind))
        if at_epoch_end:
            epoch = step // run.loader.steps_per_epoch - 1
            if after_epoch is not None:
                after_epoch(epoch)
            latest.update(score())
            journal.record("epoch", step, {"epoch": epoch, **latest, "teacher": teacher_score})
            if processes.is_main:
                say(_epoch_note(epoch, config.train.epochs, latest, teacher_score))
            window.restart_clock()
        if at_epoch_end or step % config.train.checkpoint_every_steps == 0:
            state = {"step": step, "trainer": trainer.state(), "window": window.state(processes)}
            if processes.is_main:
                save_checkpoint(folder / CHECKPOINTS, step, state, config.train.keep_checkpoints)

    try:
        train(
            trainer,
            run.loader.batches(first_step),
            first_step=first_step,
            total_steps=run.loader.total_steps,
            after_step=after_step,
        )
    finally:
        journal.close()
    weights = "model" if trainer.ema is None else "ema"
    heads = head_scores(len(run.splits.validation), weights, (latest or score())[weights], teacher_score)
    if processes.is_main:
        _save_student(run, trainer)
        write_json(folder / HEADS_FILE, heads)
        print_heads(heads)
        say(f"run: {folder}   student: {folder / STUDENT_FOLDER}   heads: {folder / HEADS_FILE}")
    processes.wait()
    return heads


class Window:
    """Sums of the loss terms since the last record, on the device, and the rate of images."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, device=device)
        self._steps = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what has passed out of the rate."""
        self._since, self._steps_since = time.perf_counter(), 0

    def add(self, terms: Tensor) -> None:
        """Add the terms [3] of one step."""
        self._sums += terms
        self._steps += 1
        self._steps_since += 1

    def read(self, processes: Processes, batch_size: int) -> dict[str, Any]:
        """Return the means over steps and processes, and start anew; the one place that waits for the device."""
        means = (processes.sum(self._sums.clone()) / (self._steps * processes.count)).tolist()
        elapsed = time.perf_counter() - self._since
        rate = self._steps_since * batch_size / elapsed
        self._sums.zero_()
        self._steps = 0
        self.restart_clock()
        record: dict[str, Any] = dict(zip(("loss", "classification", "distillation"), means, strict=True))
        return {**record, "images_per_second": rate}

    def state(self, processes: Processes) -> dict[str, Any]:
        """Return the sums of every process [processes, 3]; all of them must ask."""
        rows = torch.zeros(processes.count, 3, device=self._sums.device)
        rows[processes.rank] = self._sums
        return {"sums": processes.sum(rows), "steps": self._steps}

    def load_state(self, state: dict[str, Any], processes: Processes) -> None:
        """Go back to a state that `state()` gave, also on another number of processes."""
        rows = state["sums"]
        self._sums.copy_(rows[processes.rank] if len(rows) == processes.count else rows.mean(0))
        self._steps = state["steps"]


def _open_folder(config: Config, processes: Processes, data_facts: dict[str, str]) -> tuple[Path, Any]:
    """Return the run's folder and the checkpoint to go on from; refuse a folder that holds something else."""
    folder = Path(config.output) if config.output is not None else None
    if folder is None:
        newest = newest_folder(RUNS, config.recipe) if config.resume == "auto" else None
        folder = newest or next_free_folder(RUNS, config.recipe)
    folder = processes.share(folder)
    check_writable("output", folder)
    if not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= LEFTOVERS):
        return folder, None
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"output: {folder} holds something that is no run; name another folder")
    if config.resume != "auto":
        raise InputError(
            f"output: {folder} already holds a run; continue it with --resume auto, or name another folder"
        )
    _refuse_changes(config, folder, data_facts)
    checkpoint, skipped = newest_checkpoint(folder / CHECKPOINTS)
    for line in skipped if processes.is_main else ():
        say(f"skipped: {line}")
    return folder, checkpoint


def _refuse_changes(config: Config, folder: Path, data_facts: dict[str, str]) -> None:
    before = flat(read_recipe(folder / CONFIG_FILE))
    now = flat(config.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in FREE_ON_RESUME
    ]
    before_data = read_facts(folder)["data"]
    changed += [f"data ({split}): other photos" for split in data_facts if before_data.get(split) != data_facts[split]]
    if changed:
        raise InputError(
            f"resume: {folder} was begun with another recipe ({'; '.join(changed)}); undo that, or name another output"
        )


def _meet_teacher(
    run: Run, teacher: NetworkTeacher | StoredTeacher | RecordingTeacher | None, source: str | None
) -> tuple[dict[str, Any] | None, Tensor | None]:
    """Score the teacher before the first step; refuse one that cannot be right, or differs between processes."""
    if teacher is None:
        return None, None
    facts: dict[str, Any] = {
        "name": run.config.teacher.name,
        **teacher.facts,
        "source": source,
        "random_weights": parts.has_random_weights(run.config),
    }
    if isinstance(teacher, StoredTeacher):
        facts["random_weights"] = teacher.facts["random_weights"]
    else:
        facts["weights"] = tensors_hash(teacher.state_dict())
    if not run.processes.same_everywhere(facts["weights"]):
        raise InputError("teacher: its weights differ between processes; give all of them the same file")
    if run.checkpoint is not None:
        before: Any = read_facts(run.folder)["teacher"] or {}
        if any(before.get(key) != facts.get(key) for key in ("weights", "store")):
            raise InputError(f"resume: {run.folder} was begun with other weights of the teacher; name the same ones")
    if isinstance(teacher, StoredTeacher | RecordingTeacher):
        facts["score"] = teacher.store.score()
        predictions = teacher.store.predictions(run.processes.rank, run.processes.count).to(run.processes.device)
    else:
        facts["score"], predictions = score_teacher(
            teacher,
            run.validation,
            classes=len(run.classes),
            total=len(run.splits.validation),
            processes=run.processes,
        )
    if not facts["random_weights"]:
        score, least = facts["score"], run.config.teacher.min_top1
        check_score(facts["name"], score["top1"], score["nll"], run.splits.validation.labels, least)
    if run.processes.is_main:
        for line in teacher.lines():
            say(line)
        say(f"teacher: {facts['name']}, top-1 {facts['score']['top1']:.2f} % on {len(run.splits.validation)} images")
        if facts["random_weights"]:
            say("warning: the teacher has random weights and teaches nothing")
    return facts, predictions


def build_trainer(run: Run, teacher: Teacher | None) -> Trainer:
    """Return the trainer of a prepared run, at its first step."""
    config, processes = run.config, run.processes
    learner: Any = torch.compile(run.student) if config.train.compile else run.student
    if processes.count > 1:
        learner = DistributedDataParallel(learner)
    wrapped: Student = learner
    return Trainer(
        distiller=Distiller(wrapped, teacher, run.objective, config.train.precision),
        model=run.student,
        optimizer=run.optimizer,
        schedule=run.schedule,
        ema=ModelEmaV3(run.student, decay=config.train.ema_decay, use_warmup=True) if config.train.ema_decay else None,
        scaler=torch.amp.GradScaler(processes.device.type, enabled=config.train.precision == "fp16"),
        processes=processes,
        accumulation_steps=config.train.accumulation_steps,
        clip_grad_norm=config.optim.clip_grad_norm,
        seed=config.seed,
    )


def _write_facts(run: Run, teacher_facts: dict[str, Any] | None) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "data": run.data_facts,
        "classes": list(run.classes),
        "student": None if run.student.account is None else run.student.account.record(),
        "teacher": teacher_facts,
        "processes": run.processes.count,
        "torch": torch.__version__,
    }
    write_json(run.folder / FACTS_FILE, facts)
    write_atomically(run.folder / CONFIG_FILE, run.config.to_yaml().encode())


def _say_start(run: Run, first_step: int) -> None:
    parameters = sum(parameter.numel() for parameter in run.student.parameters()) / 1e6
    say(
        f"{run.config.student.name}: {parameters:.1f} M parameters, {len(run.splits.train)} training images, "
        f"{len(run.classes)} classes, {run.config.train.epochs} epochs of {run.loader.steps_per_epoch} steps"
        + (f", continued from step {first_step}" if first_step else "")
        + f"; writes {run.folder}"
    )
    for line in run.student.account.lines() if run.student.account is not None and not first_step else ():
        say(line)


def _step_note(step: int, total: int, record: dict[str, Any], kind: str) -> str:
    terms = f"loss {record['loss']:.3f}"
    if kind != "none":
        terms += f" (cls {record['classification']:.3f}, dist {record['distillation']:.3f})"
    return f"step {step}/{total}  {terms}  lr {record['lr']:.2e}  {record['images_per_second']:.0f} images/s"


def _epoch_note(epoch: int, epochs: int, results: dict[str, Any], teacher_score: dict[str, Any] | None) -> str:
    pieces = [f"epoch {epoch + 1}/{epochs}"]
    for name, result in results.items():
        tops = [f"{head} {score['top1']:.1f}" for head, score in result["heads"].items() if score is not None]
        pieces.append(f"{name}: {' / '.join(tops)}")
    if teacher_score is not None:
        pieces.append(f"teacher {teacher_score['top1']:.1f}")
    return "   ".join(pieces)


def head_scores(n: int, weights: str, result: dict[str, Any], teacher_score: Any) -> dict[str, Any]:
    """Return what ``heads.json`` holds, from one result of `evaluate`."""
    return {
        "n": n,
        "weights": weights,
        "heads": result["heads"],
        "teacher": teacher_score,
        "agreement": result["agreement"],
    }


def _save_student(run: Run, trainer: Trainer) -> None:
    final: Any = run.student if trainer.ema is None else trainer.ema.module
    save_local_dir(
        final.backbone,
        run.folder / STUDENT_FOLDER,
        model_args=run.student.model_args,
        classes=run.classes,
        image_size=run.config.data.image_size,
        mean=run.config.data.mean,
        std=run.config.data.std,
        interpolation=run.config.data.interpolation,
        crop_fraction=run.config.data.crop_fraction,
    )
