"""The training of one run: its parts, and what happens between its steps."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from deit_kd.asking import evaluate
from deit_kd.checkpoint import CheckpointWriter
from deit_kd.console import say, score_text, size_text
from deit_kd.distributed import on_main
from deit_kd.engine import StepResult, Trainer, train
from deit_kd.interfaces import ANSWERS, Batch, InputError, Stopped, counted, speaker
from deit_kd.interrupts import stopped_by
from deit_kd.losses import FeatureTerm, Objective, Term
from deit_kd.memory import peak_memory, reset_peak_memory
from deit_kd.run_folder import CHECKPOINTS, METRICS_FILE, FeatureRecord, ScoreRecord, kept_weights
from deit_kd.runs.journal import Journal
from deit_kd.runs.lesson import Lesson, build_distiller
from deit_kd.runs.peers import split_scores
from deit_kd.runs.photos import skips
from deit_kd.runs.prepared import AfterEpoch, Run
from deit_kd.runs.progress import BadStep, Progress
from deit_kd.schedules import Schedule
from deit_kd.stopping import Watch


@dataclass
class Course:
    """The training of one run: what happens between its steps."""

    run: Run
    lesson: Lesson
    trainer: Trainer
    progress: Progress
    journal: Journal
    checkpoints: CheckpointWriter
    watch: Watch
    teacher_score: ScoreRecord | FeatureRecord | None
    teacher_predictions: Tensor | None
    after_epoch: AfterEpoch | None
    scores: dict[str, Any] = field(default_factory=dict)  # of the last epoch that ended here, see `Trainer.weights`

    def to_the_end(self) -> dict[str, Any]:
        """Do the steps that are left; return the last epoch's scores, by model and by average.

        Raises:
            InputError: see `execute`.
            Stopped: see `execute`.
        """
        self._saved = time.monotonic()
        self._settles_after = self._ends_of_schedules()
        if not self.progress.epoch_is_scored:
            self._end_epoch()
        try:
            with self.lesson.reading_ahead(self.run, self.progress.step):
                train(
                    self.trainer,
                    self.watch.over(_noting(self.run, self.run.loader.batches(self.progress.step, lent=True))),
                    first_step=self.progress.step,
                    total_steps=self.run.loader.total_steps,
                    after_step=self._after_step,
                )
            on_main(self.run.processes, self.checkpoints.wait, "writes the checkpoint")
        finally:
            self.checkpoints.wait()
        if not self.scores:  # all steps had been done already
            self.trainer.align_buffers()
            self.scores = self._score()
        self._stop_if_asked()
        return self.scores

    def _after_step(self, step: int, result: StepResult) -> None:
        train, progress = self.run.config.train, self.progress
        progress.add(result)
        self.watch.beat()
        at_epoch_end = step % self.run.loader.steps_per_epoch == 0
        is_due = train.checkpoint_every_steps is not None and step % train.checkpoint_every_steps == 0
        if step % train.log_every_steps == 0 or at_epoch_end or step in self._settles_after:
            overdue = (
                self.run.processes.is_main and time.monotonic() - self._saved > 60 * train.checkpoint_every_minutes
            )
            is_due |= self._record(overdue)
        if at_epoch_end:
            if self.after_epoch is not None:
                self.after_epoch(step // self.run.loader.steps_per_epoch - 1, self.watch.beat)
            self._end_epoch()
            self._let_go()
        elif is_due:
            self._save()
        if step < self.run.loader.total_steps and not self.watch.may_go_on(step):
            assert self.watch.signal is not None
            self._stop(self.watch.signal)

    def _ends_of_schedules(self) -> set[int | None]:
        """Return the steps after which a weight has its last value; a record of them says up to where it had others."""
        members, total = self.trainer.distiller.members, self.run.loader.total_steps
        return {schedule.settled_after(total) for member in members for schedule in member.objective.schedules}

    def _let_go(self) -> None:
        """Drop what the next epoch no longer needs: ended terms, their connectors and their teachers."""
        run, distiller = self.run, self.trainer.distiller
        rest = run.objective.remaining(self.progress.step / run.loader.total_steps)
        if rest.active == distiller.objective.active:
            return
        over = ", ".join(kind for kind in distiller.objective.active if kind not in rest.active)
        self.trainer.distiller = build_distiller(run, self.lesson, self.progress.step)
        self._settles_after = self._ends_of_schedules()
        del distiller
        gc.collect()  # a DDP wrapper is a reference cycle
        peak = peak_memory(run.processes.device)
        reset_peak_memory(run.processes.device)
        if run.processes.is_main and self.progress.step < run.loader.total_steps:
            now = size_text(peak_memory(run.processes.device))
            say(f"{over}: ended after step {self.progress.step}; memory peaked at {size_text(peak)} and is {now} now")

    def _record(self, overdue: bool) -> bool:
        """Write the record of the steps since the last one; return whether a checkpoint is overdue anywhere."""
        run, progress = self.run, self.progress
        record, is_overdue = progress.read(run.processes, run.config.train.batch_size, overdue)
        record["lr"] = max(group["lr"] for group in self.trainer.student.optimizer.param_groups)
        record["epoch"] = (progress.step - 1) // run.loader.steps_per_epoch
        record |= self._weights(record, run.objective, self.trainer.distiller.objective)
        for peer, member in zip(run.peers, self.trainer.distiller.members[1:], strict=True):
            record["peers"][peer.name] |= self._weights(record["peers"][peer.name], peer.objective, member.objective)
        if skips(run.config):
            run.errors.tell()
            record["missing"] = run.errors.views("train")  # so far
        self.journal.record("step", progress.step, record)
        self.journal.progress(
            progress.step, _step_note(progress.step, run.loader.total_steps, record, run.config.distill.kind)
        )
        if record["bad_steps"]:
            self._record_bad_steps()
        self._give_up_without_answers()
        return is_overdue

    def _weights(self, measured: dict[str, Any], whole: Objective, rest: Objective) -> dict[str, Any]:
        """Return what changes a record of losses: weights beside them, and no loss that the `rest` no longer has."""
        place = (self.progress.step - 1) / self.run.loader.total_steps
        found: dict[str, Any] = whole.changing(place)
        if whole.distils and not rest.distils:
            found["distillation"] = None
        if "terms" in measured:
            found["terms"] = {term.kind: self._term(measured["terms"][term.kind], term, place) for term in rest.terms}
        return found

    def _term(self, measured: dict[str, float | None], term: Term, place: float) -> dict[str, float | None]:
        """Return what a record says of a term: loss, weight, what else changes, and the cosine of features."""
        values = {item.name: getattr(term, item.name) for item in fields(term)}
        schedules = {name: value for name, value in values.items() if isinstance(value, Schedule)}
        live = {name: value.at(place) for name, value in schedules.items() if name == "weight" or value.changes}
        cosine = {"cosine": measured["cosine"]} if isinstance(term, FeatureTerm) else {}
        return {"loss": measured["loss"], **live, **cosine}

    def _record_bad_steps(self) -> None:
        """Record which views had no finite loss in the steps left out; give up if there are too many.

        Raises:
            InputError: `train.max_bad_steps` in a row.
        """
        run, most = self.run, self.run.config.train.max_bad_steps
        mine = [
            {
                "step": bad.step,
                "process": run.processes.rank,
                **{name: repr(value) for name, value in bad.terms.items()},  # JSON has no NaN
                "views": _named_views(run, bad),
            }
            for bad in self.progress.bad_steps[:most]
        ]
        for row in (row for rows in run.processes.gather(mine) for row in rows):
            self.journal.record("bad_step", self.progress.step, row)
        if self.progress.bad_in_a_row >= most:
            raise InputError(
                f"train: the last {self.progress.bad_in_a_row} steps had no finite gradient and were left out "
                f"(train.max_bad_steps is {most}); the bad_step records in {run.folder / METRICS_FILE} name the views: "
                "lower optim.lr or set train.precision off, and start again with another output"
            )

    def _give_up_without_answers(self) -> None:
        """Give up if the teacher's answers have not been finite for too long.

        Raises:
            InputError: `train.max_bad_steps` in a row.
        """
        steps, most = self.progress.unanswered_in_a_row, self.run.config.train.max_bad_steps
        if steps >= most:
            raise InputError(
                f"teacher: each of the last {steps} steps had an answer that was not finite (train.max_bad_steps is "
                f"{most}); set teacher.precision off or name other weights, and start again with another output"
            )

    def _end_epoch(self) -> None:
        """Score the epoch that has ended, if it is due; if a signal comes first, the checkpoint notes what is left."""
        run, step = self.run, self.progress.step
        epoch = step // run.loader.steps_per_epoch - 1
        # Heads that no label has taught say nothing of an epoch: the newest is then the best.
        newest_is_best = not run.objective.learns_from_labels
        self.trainer.align_buffers()
        if (epoch + 1) % run.config.evaluate.every_epochs and step < run.loader.total_steps:
            self._save(newest_is_best)
            self.progress.restart_clock()
            return
        scores = self._score()
        self.progress.epoch_is_scored = False
        self._stop_if_asked()
        self.progress.epoch_is_scored = True
        self.scores = scores
        own, peers = split_scores(scores)
        of_peers = {"peers": peers} if peers else {}
        self.journal.record("epoch", step, {"epoch": epoch, **own, "teacher": self.teacher_score, **of_peers})
        if run.processes.is_main:
            say(_epoch_note(epoch, run.config.train.epochs, scores, self.teacher_score))
        heads = own[kept_weights(own)]["heads"]
        top1 = heads[speaker(heads)]["top1"]
        is_best = top1 > self.progress.best_top1 or newest_is_best
        self.progress.best_top1 = max(top1, self.progress.best_top1)
        self._save(is_best)
        self.progress.restart_clock()

    def _score(self) -> dict[str, Any]:
        run = self.run
        epoch = run.errors.step // run.loader.steps_per_epoch - 1
        scores = evaluate(
            self.trainer.weights(),
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
        step = self.progress.step
        work = "waits for the previous checkpoint to reach its disk"
        on_main(self.run.processes, lambda: self.checkpoints.save(step, state, is_best), work)
        self._saved = time.monotonic()

    def _stop_if_asked(self) -> None:
        """Stop if any process has received a signal: an evaluation then ends early."""
        heard = [number for number in self.run.processes.gather(self.watch.signal) if number is not None]
        if heard:
            self._stop(heard[0])

    def _stop(self, number: int) -> None:
        """Write a checkpoint and end the run because of signal `number`.

        Raises:
            Stopped: always.
        """
        self._save()
        on_main(self.run.processes, self.checkpoints.wait, "writes the checkpoint")
        stopped = stopped_by(
            number,
            f"the checkpoint of step {self.progress.step} is in {self.run.folder / CHECKPOINTS}: continue with "
            f"--resume auto",
        )
        raise stopped if self.run.processes.is_main else Stopped("", stopped.code)


def _noting(run: Run, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the training batches, and note the missing views of each under its step."""
    first = run.errors.step
    for index, batch in enumerate(batches):
        run.errors.step = first + index // run.config.train.accumulation_steps + 1
        run.errors.note("train", batch)
        yield batch


def _named_views(run: Run, bad: BadStep) -> list[dict[str, Any]]:
    """Return the views of a step whose loss is not finite; all of them if every loss is finite."""
    keys = run.loader.views_of_step(bad.step - 1)
    chosen = [key for key, finite in zip(keys, bad.is_finite, strict=False) if not finite] or keys
    names = run.splits.train.names
    return [{"epoch": key.epoch, "position": key.position, "photo": names[key.photo]} for key in chosen]


def _step_note(step: int, total: int, record: dict[str, Any], kind: str) -> str:
    if record["loss"] is None:
        return f"step {step}/{total}  no finite loss in {counted(record['bad_steps'], 'step')}, left out"
    heads = {} if kind == "none" and "alpha" not in record else {"cls": record["classification"]}
    heads |= {} if kind == "none" else {"dist": record["distillation"]}
    parts = [f"{head} {'-' if loss is None else f'{loss:.3f}'}" for head, loss in heads.items()]
    parts += [f"alpha {record['alpha']:.3g}"] if "alpha" in record else []
    terms = f"loss {record['loss']:.3f}" + (f" ({', '.join(parts)})" if parts else "")
    for kind, term in record.get("terms", {}).items():
        terms += f", {kind} {term['loss']:.3f} x {term['weight']:.3g}"
        terms += f" (cos {term['cosine']:.2f})" if "cosine" in term else ""
    if record["bad_steps"]:
        terms += f", {counted(record['bad_steps'], 'step')} left out"
    if record["teacher_not_finite"]:
        terms += f", {counted(record['teacher_not_finite'], 'teacher answer')} not finite"
    return f"step {step}/{total}  {terms}  lr {record['lr']:.2e}  {record['images_per_second']:.0f} images/s"


def _epoch_note(
    epoch: int, epochs: int, results: dict[str, Any], teacher_score: ScoreRecord | FeatureRecord | None
) -> str:
    pieces = [f"epoch {epoch + 1}/{epochs}"]
    for name, result in results.items():
        there = ((head, result["heads"].get(head)) for head in ANSWERS)
        tops = [f"{head} {score['top1']:.1f}" for head, score in there if score is not None]
        pieces.append(f"{name}: {' / '.join(tops)}")
    if teacher_score is not None:
        pieces.append(f"teacher {score_text(teacher_score, 1).removeprefix('top-1 ')}")
    return "   ".join(pieces)
