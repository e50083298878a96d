"""One run: prepare it, refuse what cannot work before anything is written, then train to the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deit_kd.checkpoint import CheckpointWriter, newest_checkpoint
from deit_kd.config import Config, flat, read_recipe
from deit_kd.data import Splits, TrainingLoader
from deit_kd.distributed import Processes, names_lost_process
from deit_kd.engine import STEP_TERMS, Distiller, StepResult, Trainer, evaluate, score_teacher, train
from deit_kd.files import check_writable, write_atomically, write_json
from deit_kd.interfaces import Batch, InputError, Stopped, Student, Teacher
from deit_kd.jobs import parts
from deit_kd.losses import Objective
from deit_kd.models import STUDENT_FOLDER, choose_attention, save_local_dir, tensors_hash
from deit_kd.optim import WeightAverage, build_schedule
from deit_kd.stopping import Watch, stopped_by
from deit_kd.store import RecordingTeacher, StoredTeacher
from deit_kd.students import TimmStudent
from deit_kd.teachers import NetworkTeacher, check_score
from deit_kd.tracking import (
    CHECKPOINTS,
    CONFIG_FILE,
    DATA_ERRORS_FILE,
    FACTS_FILE,
    HEADS_FILE,
    METRICS_FILE,
    DataErrors,
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
LEFTOVERS = {DATA_ERRORS_FILE, FACTS_FILE, f".{FACTS_FILE}.partial", f".{CONFIG_FILE}.partial"}

# Keys that a run may be resumed with another value of: they do not change a result.
FREE_ON_RESUME = {
    "output",
    "resume",
    "recipe",
    "data.root",  # the photos themselves are compared
    "data.workers",
    "data.in_memory",
    "data.on_error",  # says whether a run ends, and what it leaves out is listed
    "data.max_errors",
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
    "train.checkpoint_every_minutes",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.max_bad_steps",
    "train.timeout_seconds",
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
    errors: DataErrors  # photos that cannot be read

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
        splits = splits._replace(train=splits.train.in_memory(parts.skips(config)))
    loader = parts.build_training_loader(config, splits.train, processes)
    student = parts.build_student(config, splits.train.classes).to(processes.device)
    optimizer = parts.build_student_optimizer(config, student)
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
        errors=parts.build_data_errors(
            config, splits, folder, processes, first_step=0 if checkpoint is None else checkpoint["progress"]["step"]
        ),
    )


def execute(
    run: Run,
    teacher: NetworkTeacher | StoredTeacher | RecordingTeacher | None = None,
    teacher_source: str | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train `run` to its end; return what ``heads.json`` holds.

    `after_epoch(epoch)` is called in every process when the steps of an epoch are done.

    Raises:
        InputError: the teacher cannot be right, or no step has a finite gradient.
        OSError: a checkpoint cannot be written.
        Stopped: a signal ends the run; its checkpoint is written.
    """
    config, processes = run.config, run.processes
    teacher_facts, teacher_predictions = _meet_teacher(run, teacher, teacher_source)
    trainer = build_trainer(run, teacher)
    progress = Progress(processes.device)
    if run.checkpoint is not None:
        trainer.load_state(run.checkpoint["trainer"])
        progress.load_state(run.checkpoint["progress"], processes)
    if processes.is_main:
        _write_facts(run, teacher_facts)
        _say_start(run, progress.step)
    processes.wait()
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
            run, trainer, progress, journal, checkpoints, watch, teacher_score, teacher_predictions, after_epoch
        )
        scores = course.to_the_end()
    weights = "model" if trainer.ema is None else "ema"
    unreadable = run.errors.unreadable("validation", run.loader.total_steps)
    heads = head_scores(weights, scores[weights], teacher_score, unreadable)
    if processes.is_main:
        _save_student(run, trainer)
        write_json(run.folder / HEADS_FILE, heads)
        print_heads(heads)
        say(f"run: {run.folder}   student: {run.folder / STUDENT_FOLDER}   heads: {run.folder / HEADS_FILE}")
    processes.wait()
    return heads


@dataclass
class Course:
    """The training of one run: what happens between its steps."""

    run: Run
    trainer: Trainer
    progress: Progress
    journal: Journal
    checkpoints: CheckpointWriter
    watch: Watch
    teacher_score: dict[str, Any] | None
    teacher_predictions: Tensor | None
    after_epoch: Callable[[int], None] | None
    scores: dict[str, Any] = field(default_factory=dict)  # of the last epoch that ended here

    def to_the_end(self) -> dict[str, Any]:
        """Do the steps that are left; return the last epoch's scores, by model and by average.

        Raises:
            InputError: see `execute`.
            Stopped: see `execute`.
        """
        self._saved = time.monotonic()
        if not self.progress.epoch_is_scored:
            self._end_epoch()
        try:
            train(
                self.trainer,
                self.watch.over(_noting(self.run, self.run.loader.batches(self.progress.step))),
                first_step=self.progress.step,
                total_steps=self.run.loader.total_steps,
                after_step=self._after_step,
            )
        except RuntimeError as error:
            if self.run.processes.count > 1 and names_lost_process(error):
                raise Stopped("another process of the run is gone; the last checkpoint is kept", 1) from error
            raise
        finally:
            self.checkpoints.wait()
        return self.scores or self._score()

    def _after_step(self, step: int, result: StepResult) -> None:
        train, progress = self.run.config.train, self.progress
        progress.add(result)
        self.watch.beat()
        at_epoch_end = step % self.run.loader.steps_per_epoch == 0
        is_due = train.checkpoint_every_steps is not None and step % train.checkpoint_every_steps == 0
        if step % train.log_every_steps == 0 or at_epoch_end:
            overdue = (
                self.run.processes.is_main and time.monotonic() - self._saved > 60 * train.checkpoint_every_minutes
            )
            is_due |= self._record(overdue)
        if at_epoch_end:
            if self.after_epoch is not None:
                self.after_epoch(step // self.run.loader.steps_per_epoch - 1)
            self._end_epoch()
        elif is_due:
            self._save()
        if step < self.run.loader.total_steps and not self.watch.may_go_on(step):
            assert self.watch.signal is not None
            self._stop(self.watch.signal)

    def _record(self, overdue: bool) -> bool:
        """Write the record of the steps since the last one; return whether a checkpoint is overdue anywhere."""
        run, progress = self.run, self.progress
        record, is_overdue = progress.read(run.processes, run.config.train.batch_size, overdue)
        record["lr"] = max(group["lr"] for group in self.trainer.optimizer.param_groups)
        record["epoch"] = (progress.step - 1) // run.loader.steps_per_epoch
        if parts.skips(run.config):
            run.errors.tell()
            record["missing"] = run.errors.views("train")  # so far
        self.journal.record("step", progress.step, record)
        self.journal.progress(
            progress.step, _step_note(progress.step, run.loader.total_steps, record, run.config.distill.kind)
        )
        if record["bad_steps"]:
            self._record_bad_steps()
        return is_overdue

    def _record_bad_steps(self) -> None:
        """Write which views had no finite loss in the steps that were left out; give up where there are too many.

        Raises:
            InputError: `train.max_bad_steps` in a row.
        """
        run, most = self.run, self.run.config.train.max_bad_steps
        mine = [
            {
                "step": bad.step,
                "process": run.processes.rank,
                **{name: repr(value) for name, value in bad.terms.items()},  # JSON knows no nan
                "views": _named_views(run, bad),
            }
            for bad in self.progress.bad_steps[:most]
        ]
        for row in (row for rows in run.processes.gather(mine) for row in rows):
            self.journal.record("bad_step", self.progress.step, row)
        if self.progress.bad_in_a_row >= most:
            raise InputError(
                f"train: the last {self.progress.bad_in_a_row} steps had no finite gradient and were left out "
                f"(train.max_bad_steps is {most}); the records bad_step of {run.folder / METRICS_FILE} name the views: "
                f"lower optim.lr or set train.precision off, then continue with --resume auto"
            )

    def _end_epoch(self) -> None:
        """Score the epoch that has ended; where a signal comes first, the checkpoint says that it is not scored."""
        run, step = self.run, self.progress.step
        epoch = step // run.loader.steps_per_epoch - 1
        scores = self._score()
        heard = [number for number in run.processes.gather(self.watch.signal) if number is not None]
        self.progress.epoch_is_scored = not heard
        if heard:
            self._stop(heard[0])
        self.scores = scores
        self.journal.record("epoch", step, {"epoch": epoch, **scores, "teacher": self.teacher_score})
        if run.processes.is_main:
            say(_epoch_note(epoch, run.config.train.epochs, scores, self.teacher_score))
        heads = scores["model" if self.trainer.ema is None else "ema"]["heads"]
        top1 = (heads["fused"] or heads["cls"])["top1"]
        is_best = top1 > self.progress.best_top1
        self.progress.best_top1 = max(top1, self.progress.best_top1)
        self._save(is_best)
        self.progress.restart_clock()

    def _score(self) -> dict[str, Any]:
        run, trainer = self.run, self.trainer
        trainer.align_buffers()
        epoch = run.errors.step // run.loader.steps_per_epoch - 1
        models: dict[str, nn.Module] = {"model": run.student}
        if trainer.ema is not None:
            models["ema"] = trainer.ema.module
        scores = evaluate(
            models,
            run.errors.watch("validation", self.watch.until_signal(run.validation), epoch),
            classes=len(run.classes),
            total=len(run.splits.validation),
            processes=run.processes,
            precision=run.config.train.precision,
            fusion=run.config.evaluate.fusion,
            teacher_predictions=self.teacher_predictions,
        )
        run.errors.tell()
        return scores

    def _save(self, is_best: bool = False) -> None:
        self.run.errors.tell()
        state = {"trainer": self.trainer.state(), "progress": self.progress.state(self.run.processes)}
        if self.run.processes.is_main:
            self.checkpoints.save(self.progress.step, state, is_best)
        self._saved = time.monotonic()

    def _stop(self, number: int) -> None:
        """Write a checkpoint and end the run, as the signal `number` asks.

        Raises:
            Stopped: always.
        """
        self._save()
        self.checkpoints.wait()
        self.run.processes.wait()
        stopped = stopped_by(
            number,
            f"the checkpoint of step {self.progress.step} is in {self.run.folder / CHECKPOINTS}: continue with "
            f"--resume auto",
        )
        raise stopped if self.run.processes.is_main else Stopped("", stopped.code)


def _noting(run: Run, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the training batches, and note what each lacks under the step that it belongs to."""
    first = run.errors.step
    for index, batch in enumerate(batches):
        run.errors.step = first + index // run.config.train.accumulation_steps + 1
        run.errors.note("train", batch)
        yield batch


def _named_views(run: Run, bad: BadStep) -> list[dict[str, Any]]:
    """Return the views of a step whose loss is not finite; where every loss is, all of them."""
    keys = run.loader.views_of_step(bad.step - 1)
    chosen = [key for key, finite in zip(keys, bad.is_finite, strict=False) if not finite] or keys
    names = run.splits.train.names
    return [{"epoch": key.epoch, "position": key.position, "photo": names[key.photo]} for key in chosen]


class BadStep(NamedTuple):
    """A step that was left out, as one process saw it."""

    step: int  # from 1
    terms: dict[str, float]
    is_finite: list[bool]  # the loss of each view


class Progress:
    """How far a run is: steps done, what they gave since the last record, and the best epoch.

    Until the next record, what steps gave stays on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.step = 0
        self.best_top1 = -1.0
        self.epoch_is_scored = True
        self.bad_in_a_row = 0
        self.bad_steps: list[BadStep] = []  # of the last record, in this process
        self._results: list[StepResult] = []
        self._earlier = torch.zeros(0, len(STEP_TERMS), device=device)  # what a checkpoint kept of its last steps
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what has passed out of the rate."""
        self._since, self._steps_since = time.perf_counter(), 0

    def add(self, result: StepResult) -> None:
        """Count one step."""
        self.step += 1
        self._steps_since += 1
        self._results.append(result)

    def read(self, processes: Processes, batch_size: int, overdue: bool = False) -> tuple[dict[str, Any], bool]:
        """Return the means over finite steps and processes, and start anew; the one place that waits for the device.

        Also returns whether any process says that something is `overdue`.
        """
        rows = self._rows()
        finite = rows[:, :3].isfinite().all(1)
        sums = rows.where(finite[:, None], 0.0).sum(0)
        sums = torch.cat(
            [sums[:3], finite.sum()[None], rows[:, 4].sum()[None], torch.tensor([float(overdue)]).to(rows)]
        )
        *terms, count, teacher_not_finite, overdue_anywhere = processes.sum(sums).tolist()
        left_out = rows[:, 3].tolist()  # the same in every process
        self.bad_steps = [self._bad_step(index - len(rows)) for index, bad in enumerate(left_out) if bad]
        for bad in left_out:
            self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        elapsed = time.perf_counter() - self._since
        record: dict[str, Any] = {
            **{name: value / count if count else None for name, value in zip(STEP_TERMS[:3], terms, strict=True)},
            "bad_steps": len(self.bad_steps),
            "teacher_not_finite": int(teacher_not_finite),
            "images_per_second": self._steps_since * batch_size / elapsed,
        }
        self._results, self._earlier = [], self._earlier[:0]
        self.restart_clock()
        return record, bool(overdue_anywhere)

    def _rows(self) -> Tensor:
        """Return the terms [steps, 5] since the last record, of this process."""
        return torch.cat([self._earlier, *(result.terms[None] for result in self._results)])

    def _bad_step(self, index: int) -> BadStep:
        """Return the step at `index` from the end; which views were finite is not known from before a checkpoint."""
        terms = dict(zip(STEP_TERMS[:3], self._rows()[index, :3].tolist(), strict=True))
        known = -index <= len(self._results)
        is_finite = self._results[index].is_finite.tolist() if known else []
        return BadStep(self.step + 1 + index, terms, is_finite)

    def state(self, processes: Processes) -> dict[str, Any]:
        """Return what a checkpoint keeps; all processes must ask."""
        mine = self._rows()
        rows = torch.zeros(processes.count, *mine.shape, device=self._device)
        rows[processes.rank] = mine
        return {
            "step": self.step,
            "best_top1": self.best_top1,
            "epoch_is_scored": self.epoch_is_scored,
            "bad_in_a_row": self.bad_in_a_row,
            "rows": processes.sum(rows),
        }

    def load_state(self, state: dict[str, Any], processes: Processes) -> None:
        """Go back to a state that `state()` gave, also on another number of processes."""
        self.step, self.best_top1 = state["step"], state["best_top1"]
        self.epoch_is_scored, self.bad_in_a_row = state["epoch_is_scored"], state["bad_in_a_row"]
        rows = state["rows"].to(self._device)
        self._earlier = rows[processes.rank] if len(rows) == processes.count else rows.mean(0)


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
            run.errors.watch("validation", run.validation),
            classes=len(run.classes),
            total=len(run.splits.validation),
            processes=run.processes,
        )
        run.errors.tell()
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
        ema=WeightAverage(run.student, decay=config.train.ema_decay, use_warmup=True)
        if config.train.ema_decay
        else None,
        scaler=torch.amp.GradScaler(processes.device.type, enabled=config.train.precision == "fp16"),
        processes=processes,
        accumulation_steps=config.train.accumulation_steps,
        clip_grad_norm=config.optim.clip_grad_norm,
        seed=config.seed,
        skip=parts.skips(config),
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
    if record["loss"] is None:
        return f"step {step}/{total}  no finite loss in {record['bad_steps']} steps, which were left out"
    terms = f"loss {record['loss']:.3f}"
    if kind != "none":
        terms += f" (cls {record['classification']:.3f}, dist {record['distillation']:.3f})"
    if record["bad_steps"]:
        terms += f", {record['bad_steps']} steps left out"
    return f"step {step}/{total}  {terms}  lr {record['lr']:.2e}  {record['images_per_second']:.0f} images/s"


def _epoch_note(epoch: int, epochs: int, results: dict[str, Any], teacher_score: dict[str, Any] | None) -> str:
    pieces = [f"epoch {epoch + 1}/{epochs}"]
    for name, result in results.items():
        tops = [f"{head} {score['top1']:.1f}" for head, score in result["heads"].items() if score is not None]
        pieces.append(f"{name}: {' / '.join(tops)}")
    if teacher_score is not None:
        pieces.append(f"teacher {teacher_score['top1']:.1f}")
    return "   ".join(pieces)


def head_scores(weights: str, result: dict[str, Any], teacher_score: Any, unreadable: dict[str, str]) -> dict[str, Any]:
    """Return what ``heads.json`` holds, from one result of `evaluate`; the `unreadable` images are not among the n."""
    return {
        "n": result["n"],
        "unreadable": unreadable,
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
