"""One run: prepare it, refuse what cannot work before anything is written, then train to the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deit_kd.checkpoint import CheckpointWriter, Found, load_checkpoint, newest_checkpoint
from deit_kd.config import Config, Guide, TeacherSection, flat, read_recipe
from deit_kd.data import Splits
from deit_kd.distributed import Processes, on_main, together
from deit_kd.engine import Trainer, score_teacher
from deit_kd.files import LOCK, InUse, check_writable, held, write_atomically, write_json
from deit_kd.interfaces import InputError
from deit_kd.runs import parts
from deit_kd.runs.course import Course
from deit_kd.runs.lesson import Answers, Lesson, build_distiller, connect
from deit_kd.runs.prepared import AfterEpoch, Run
from deit_kd.runs.progress import Progress
from deit_kd.runs.vectors import score_headless
from deit_kd.models import choose_attention, save_local_dir, tensors_hash
from deit_kd.optim import WeightAverage
from deit_kd.randomness import VIEWS_VERSION
from deit_kd.run_folder import STUDENT_FOLDER
from deit_kd.stopping import Watch
from deit_kd.store import RecordingTeacher, StoredTeacher
from deit_kd.teachers import FrozenTeacher, check_columns, check_features, check_score
from deit_kd.tracking import (
    CHECKPOINTS,
    CONFIG_FILE,
    DATA_ERRORS_FILE,
    FACTS_FILE,
    HEADS_FILE,
    Journal,
    check_tracking,
    newest_folder,
    next_free_folder,
    print_heads,
    read_facts,
    say,
    score_text,
)

RUNS = Path("runs")
AVERAGED_SHARE = 1 / 20  # of a run's steps, by the average of the weights, where the recipe names no decay
SECONDS_BETWEEN_TRIES = 1.0  # to be the only one who writes to a folder

# What a run leaves that was killed before its first step.
LEFTOVERS = {LOCK, DATA_ERRORS_FILE, FACTS_FILE, f".{FACTS_FILE}.partial", f".{CONFIG_FILE}.partial"}

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
    "data.unlabelled",  # the photos themselves are compared
    "evaluate.batch_size",
    "teacher.checkpoint",  # the weights themselves are compared
    "teacher.class_map",  # the columns are compared
    "teacher.min_top1",
    "teacher.fit.folder",
    "guide.checkpoint",
    "guide.class_map",
    "guide.min_top1",
    "guide.fit.folder",
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


def prepare(
    config: Config, processes: Processes, splits: Splits | None = None, is_named_by_recipe: bool = False
) -> Run:
    """Build all parts of a run but the teacher.

    Args:
        config: its recipe.
        processes: that train it.
        splits: its photos, where they are at hand.
        is_named_by_recipe: whether the folder's name stands for all that the run depends on; it then goes on with
            whatever else has changed.

    Raises:
        InputError: anything in the recipe, the data or the output folder that cannot work.
    """
    if config.train.precision == "fp16" and processes.device.type == "cpu":
        raise InputError("train.precision: fp16 needs CUDA; use bf16 or off on the CPU")
    check_tracking(config.tracking.wandb)
    choose_attention(config.train.attention, processes.device)
    splits = splits or parts.agreed_splits(config, processes)
    if config.data.in_memory:  # here, so that a teacher's fit shares what was decoded
        with processes.busy("decodes the photos"):
            splits = splits._replace(train=splits.train.in_memory(parts.skips(config)))
    if len(splits.validation) < processes.count:
        raise InputError(
            f"data: {len(splits.validation)} validation images are fewer than {processes.count} processes; use fewer"
        )
    loader = parts.build_training_loader(config, splits.train, processes)
    with processes.busy("builds the student"):
        student = parts.build_student(config, splits.train.classes).to(processes.device)
    optimizer = parts.build_student_optimizer(config, student)
    schedule = parts.build_schedule(config, optimizer, loader.steps_per_epoch)
    data_facts = {split: photos.digest() for split, photos in splits._asdict().items()}
    folder, checkpoint = _open_folder(config, processes, None if is_named_by_recipe else data_facts)
    return Run(
        config=config,
        processes=processes,
        splits=splits,
        folder=folder,
        loader=loader,
        validation=parts.build_evaluation_loader(config, splits.validation, processes),
        student=student,
        optimizer=optimizer,
        data_facts=data_facts,
        schedule=schedule,
        checkpoint=checkpoint,
        errors=parts.build_data_errors(
            config, splits, folder, processes, first_step=0 if checkpoint is None else checkpoint["progress"]["step"]
        ),
    )


@contextmanager
def claimed(folder: Path, processes: Processes, waiting: str | None = None) -> Iterator[None]:
    """Keep the folder of a run from all others until it ends, while its teacher is fitted, too.

    Args:
        folder: of the run.
        processes: of the run.
        waiting: what a person is told while another run has it; None does not wait.

    Raises:
        InputError: another run has it, and is not waited for.
    """
    taken = f"output: {folder} is being written by another run; wait for it, or name another folder"
    with ExitStack() as stack:

        def enter() -> None:
            told = False
            while True:
                try:
                    return stack.enter_context(held(folder, taken))
                except InUse:
                    if waiting is None:
                        raise
                if not told:
                    say(waiting)
                    told = True
                time.sleep(SECONDS_BETWEEN_TRIES)

        on_main(processes, enter, "" if waiting is None else f"waits for the run that writes {folder}")
        yield


def execute(run: Run, lesson: Lesson | None = None, after_epoch: AfterEpoch | None = None) -> dict[str, Any]:
    """Train `run` from its `lesson` to its end; return what ``heads.json`` holds.

    `after_epoch(epoch, beat)` is called in every process when the steps of an epoch are done; where it takes long, it
    calls `beat`.

    Raises:
        InputError: the teacher cannot be right, or no step has a finite gradient.
        OSError: a checkpoint cannot be written.
        Stopped: a signal ends the run; its checkpoint is written.
    """
    config, processes = run.config, run.processes
    lesson = lesson or Lesson()
    prepared, run = run, connect(run, lesson)
    teacher_facts, teacher_predictions = _meet_teacher(run, lesson)
    progress = Progress(processes.device, run.objective.further_terms)
    if run.checkpoint is not None:
        progress.load_state(run.checkpoint["progress"], processes)
    trainer = build_trainer(run, lesson, progress.step)
    if run.checkpoint is not None:
        trainer.load_state(run.checkpoint["trainer"])
    prepared.checkpoint = run.checkpoint = None  # or its tensors would stay in memory to the end

    def begin() -> None:
        _write_facts(run, teacher_facts)
        _say_start(run, trainer, progress.step)

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
        scores = course.to_the_end()
    weights = "model" if trainer.ema is None else "ema"
    unreadable = run.errors.unreadable("validation", run.loader.total_steps)
    heads = head_scores(weights, scores[weights], teacher_score, unreadable)

    def end() -> None:
        _save_student(run, trainer)
        write_json(run.folder / HEADS_FILE, heads)
        print_heads(heads)
        say(f"run: {run.folder}   student: {run.folder / STUDENT_FOLDER}   heads: {run.folder / HEADS_FILE}")

    on_main(processes, end, "writes the student")
    return heads


def _open_folder(config: Config, processes: Processes, data_facts: dict[str, str] | None) -> tuple[Path, Any]:
    """Return the run's folder and the checkpoint to go on from; refuse a folder that holds something else.

    Where `data_facts` is None, the folder is known to be of this recipe and these photos.

    The main process chooses; the others, whose disks may look otherwise, load what it has chosen.
    """
    folder = Path(config.output) if config.output is not None else None
    if folder is None:
        newest = newest_folder(RUNS, config.recipe) if config.resume == "auto" else None
        folder = newest or next_free_folder(RUNS, config.recipe)
    folder = processes.share(folder)
    check_writable("output", folder)
    found = on_main(processes, lambda: _newest(config, folder, data_facts), "looks for the newest checkpoint")
    chosen = processes.share(None if found is None else (found.path, found.digest))

    def load() -> Any:
        if found is not None or chosen is None:
            return None if found is None else found.parts
        try:
            with processes.busy("reads the checkpoint"):
                return load_checkpoint(*chosen)
        except ValueError as error:
            raise InputError(
                f"resume: {error}, but process 0 goes on from it; let all processes see the same folder, or delete "
                "that checkpoint"
            ) from error

    return folder, together(processes, load)


def _newest(config: Config, folder: Path, data_facts: dict[str, str] | None) -> Found | None:
    """Return the checkpoint that a run goes on from, if any."""
    if not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= LEFTOVERS):
        return None
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"output: {folder} holds something that is no run; name another folder")
    if config.resume != "auto":
        raise InputError(
            f"output: {folder} already holds a run; continue it with --resume auto, or name another folder"
        )
    if data_facts is not None:
        _refuse_changes(config, folder, data_facts)
    found, skipped = newest_checkpoint(folder / CHECKPOINTS)
    for line in skipped:
        say(f"skipped: {line}")
    return found


def _refuse_changes(config: Config, folder: Path, data_facts: dict[str, str]) -> None:
    # A key that a run was begun without has its default.
    before = flat(Config().model_dump(mode="json")) | flat(read_recipe(folder / CONFIG_FILE))
    now = flat(config.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in FREE_ON_RESUME
    ]
    facts = read_facts(folder)
    before_data, before_views = facts["data"], facts.get("views", 1)
    changed += [f"views: version {before_views} -> {VIEWS_VERSION}"] * (before_views != VIEWS_VERSION)
    changed += [f"data ({split}): other photos" for split in data_facts if before_data.get(split) != data_facts[split]]
    if changed:
        raise InputError(
            f"resume: {folder} was begun with another recipe ({'; '.join(changed)}); undo that, or name another output"
        )


def _meet_teacher(run: Run, lesson: Lesson) -> tuple[dict[str, Any] | None, Tensor | None]:
    """Score who teaches before the first step; refuse one that cannot be right, or differs between processes."""
    if lesson.answers is None and lesson.guide is None:
        return None, None
    if lesson.answers is None:
        assert lesson.guide is not None
        return _met(run, "guide", lesson.guide, lesson.guide_source, _guide_section(run.config))
    facts, predictions = _met(run, "teacher", lesson.answers, lesson.source, run.config.teacher)
    if lesson.guide is not None:
        facts["guide"], _ = _met(run, "guide", lesson.guide, lesson.guide_source, _guide_section(run.config))
    return facts, predictions


def _guide_section(config: Config) -> TeacherSection | Guide:
    return config.guide if config.guide.is_named else config.teacher


def _met(
    run: Run, role: str, teacher: Answers, source: str | None, section: TeacherSection | Guide
) -> tuple[dict[str, Any], Tensor | None]:
    """Return what a run records about one who teaches, and its predictions on validation, once it may teach."""
    facts: dict[str, Any] = {
        "name": section.name,
        **teacher.facts,
        "source": source,
        "random_weights": parts.has_random_weights(section),
    }
    if isinstance(teacher, StoredTeacher):
        facts["random_weights"] = teacher.facts["random_weights"]
    else:
        facts["weights"] = tensors_hash(teacher.state_dict())
    if not run.processes.same_everywhere([facts["weights"], facts.get("store")]):
        raise InputError(f"{role}: its weights differ between processes; give all of them the same file")
    if run.checkpoint is not None:
        on_main(run.processes, lambda: _refuse_other_teacher(run, role, facts))
    if isinstance(teacher, FrozenTeacher) and not teacher.has_head:
        return _met_headless(run, role, facts, teacher, section), None
    if isinstance(teacher, StoredTeacher | RecordingTeacher):
        facts["score"] = teacher.store.score()
        predictions = teacher.store.predictions(run.processes.rank, run.processes.count).to(run.processes.device)
    else:
        facts["score"], predictions = score_teacher(
            teacher,
            run.processes.busy_over("asks the teacher", run.errors.watch("validation", run.validation)),
            classes=len(run.classes),
            total=len(run.splits.validation),
            processes=run.processes,
        )
        run.errors.tell()
    score = facts["score"]
    shares = run.processes.gather(predictions.cpu().numpy())
    if not facts["random_weights"]:
        labels = run.splits.validation.labels
        whole = np.empty(len(labels), dtype=np.int64)
        for rank, share in enumerate(shares):
            whole[rank :: len(shares)] = share
        if section.min_top1 != 0:
            check_columns(facts, run.classes, np.asarray(labels), whole)
        check_score(facts["name"], score["top1"], score["nll"], labels, section.min_top1)
    _say_met(run, role, teacher, facts)
    return facts, predictions


def _met_headless(
    run: Run, role: str, facts: dict[str, Any], teacher: FrozenTeacher, section: TeacherSection | Guide
) -> dict[str, Any]:
    """Return what a run records about a teacher without a head, once its features may teach."""
    facts["score"] = score_headless(run, teacher)
    if not facts["random_weights"]:
        check_features(facts["name"], facts["score"]["knn"], run.splits.validation.labels, section.min_top1)
    _say_met(run, role, teacher, facts)
    return facts


def _say_met(run: Run, role: str, teacher: Answers, facts: dict[str, Any]) -> None:
    if run.processes.is_main:
        for line in teacher.lines(role):
            say(line)
        say(f"{role}: {facts['name']}, {score_text(facts['score'], 2)} % on {len(run.splits.validation)} images")
        if facts["random_weights"]:
            say(f"warning: the {role} has random weights and teaches nothing")


def _refuse_other_teacher(run: Run, role: str, facts: dict[str, Any]) -> None:
    before: Any = read_facts(run.folder)["teacher"] or {}
    if role == "guide" and "guide" in before:
        before = before["guide"]
    if any(before.get(key) != facts.get(key) for key in ("weights", "store")):
        raise InputError(f"resume: {run.folder} was begun with other weights of the {role}; name the same ones")


def build_trainer(run: Run, lesson: Lesson, first_step: int = 0) -> Trainer:
    """Return the trainer of a connected run."""
    config, processes = run.config, run.processes
    return Trainer(
        distiller=build_distiller(run, lesson, first_step),
        model=run.student,
        connectors=run.connectors,
        optimizer=run.optimizer,
        schedule=run.schedule,
        ema=_average(run),
        scaler=torch.amp.GradScaler(processes.device.type, enabled=config.train.precision == "fp16"),
        processes=processes,
        accumulation_steps=config.train.accumulation_steps,
        clip_grad_norm=config.optim.clip_grad_norm,
        seed=config.seed,
        skip=parts.skips(config),
        total_steps=run.loader.total_steps,
        further_terms=run.objective.further_terms,
    )


def _average(run: Run) -> WeightAverage | None:
    decay = run.config.train.ema_decay
    if decay is None:
        decay = 1 - 1 / max(1.0, AVERAGED_SHARE * run.loader.total_steps)
    elif not decay:
        return None
    return WeightAverage(run.student, decay)


def average_line(average: WeightAverage, total_steps: int) -> str:
    """Return what a person is told about the average of the weights."""
    share = 100 * average.span / total_steps
    line = f"average: over {average.span:.0f} steps, {share:.1f} % of the run's {total_steps}"
    if average.span <= total_steps:
        return line
    return f"warning: {line}, so that it is the plain mean of all of them; set train.ema_decay lower, or null"


def _write_facts(run: Run, teacher_facts: dict[str, Any] | None) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "data": run.data_facts,
        "views": VIEWS_VERSION,
        "classes": list(run.classes),
        "student": None if run.student.account is None else run.student.account.record(),
        "teacher": teacher_facts,
        "processes": run.processes.count,
        "torch": torch.__version__,
    }
    write_json(run.folder / FACTS_FILE, facts)
    write_atomically(run.folder / CONFIG_FILE, run.config.to_yaml().encode())


def _say_start(run: Run, trainer: Trainer, first_step: int) -> None:
    parameters = sum(parameter.numel() for parameter in run.student.parameters()) / 1e6
    say(
        f"{run.config.student.name}: {parameters:.1f} M parameters, {len(run.splits.train)} training images, "
        f"{len(run.classes)} classes, {run.config.train.epochs} epochs of {run.loader.steps_per_epoch} steps"
        + (f", continued from step {first_step}" if first_step else "")
        + f"; writes {run.folder}"
    )
    if trainer.ema is not None:
        say(average_line(trainer.ema, run.loader.total_steps))
    if not run.objective.learns_from_labels:
        say(f"labels teach nothing: score the features with deit-kd eval {run.folder} --probe true, not the heads")
    for line in run.student.account.lines() if run.student.account is not None and not first_step else ():
        say(line)


def head_scores(weights: str, result: dict[str, Any], teacher_score: Any, unreadable: dict[str, str]) -> dict[str, Any]:
    """Return what ``heads.json`` holds, from one result of `evaluate`; the `unreadable` images are not among the n."""
    return {
        "n": result["n"],
        "unreadable": unreadable,
        "weights": weights,
        "heads": result["heads"],
        "teacher": None if teacher_score is None or "knn" in teacher_score else teacher_score,
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
        crop_mode=run.config.data.crop_mode,
    )
