"""Students that were trained once for each fold: which runs belong together, and their answers joined."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit_kd.asking import Answers
from deit_kd.config import NOTHING, Config, effects, flat, read_recipe
from deit_kd.console import say
from deit_kd.data import joined
from deit_kd.distributed import Processes
from deit_kd.evaluation.examine import Examination, evaluated, examine, judge_heads
from deit_kd.evaluation.sources import Source
from deit_kd.interfaces import InputError, StudentOutput, speaker
from deit_kd.places import path_of
from deit_kd.run_folder import CONFIG_FILE, name_of_run, read_facts, run_of, whose_peer


@dataclass(frozen=True)
class FoldedStudent:
    """The runs of one recipe over the folds of the same photos."""

    name: str
    folds: int  # how many there are
    runs: dict[int, tuple[Source, Config]]  # by fold, in order; those that exist

    @property
    def missing(self) -> list[int]:
        """Return the folds without a run."""
        return [fold for fold in range(self.folds) if fold not in self.runs]


@dataclass(frozen=True)
class FoldedExamination:
    """The answers of the runs of one recipe to the photos that each has held out."""

    student: FoldedStudent
    whole: Examination  # as if one student had answered; ``student`` and ``teacher`` are those of the first fold
    by_fold: dict[int, Examination]

    def judge(self, others: Mapping[str, dict[str, Tensor]]) -> dict[str, Any]:
        """Return the result of `judge_heads`, and ``folds``: their number, those left out, their runs and top-1."""
        top1 = {
            str(fold): {
                head: 100 * float((predicted == examination.answers.labels).double().mean())
                for head, predicted in examination.predictions().items()
            }
            for fold, examination in self.by_fold.items()
        }
        runs = {str(fold): str(source.run) for fold, (source, _) in self.student.runs.items()}
        return {
            **judge_heads(self.whole, others),
            "evaluated": {str(fold): evaluated(examination) for fold, examination in self.by_fold.items()},
            "folds": {"count": self.student.folds, "missing": self.student.missing, "runs": runs, "top1": top1},
        }


def fold_scores(heads: Mapping[str, Any]) -> str:
    """Return a line with the score of a student's main head by fold."""
    folds = heads["folds"]
    main = speaker(heads["heads"])
    by_fold = ", ".join(f"{fold}: {top1[main]:.2f}" for fold, top1 in folds["top1"].items())
    return f"top-1 % of {main} by fold of {folds['count']}: {by_fold}"


def folded_students(runs: Sequence[tuple[Source, Config]]) -> list[FoldedStudent]:
    """Group runs that differ only in the fold that they hold out and in keys that never change a result.

    The weights of a fold's own teacher, and those that a student starts from, may also differ if they come from a run:
    its recipe is compared instead. Runs with different seeds are different students.

    Args:
        runs: each with its recipe, command-line overrides included.

    Raises:
        InputError: one is not a run of a fold, or two are of the same fold of one recipe.
    """
    groups: dict[str, dict[int, tuple[Source, Config]]] = {}
    for source, config in runs:
        data = config.data
        if source.run is None or data.folds is None or data.fold is None:
            raise InputError(
                f"{source.name}: is not a run of a fold (data.folds), as several students must be; compare two other "
                "students with --against"
            )
        peer = None if whose_peer(source.run) is None else source.run.resolve().name  # it may be built as the student
        place = str(Path(data.root or data.name).resolve())
        key = json.dumps([recipe_but_fold(source.run), place, data.folds, peer])
        group = groups.setdefault(key, {})
        if data.fold in group:
            raise InputError(
                f"{source.run}: is fold {data.fold} of the same recipe as {group[data.fold][0].run}; name only one of "
                "them"
            )
        group[data.fold] = source, config
    names = _names(groups.values())
    return [
        FoldedStudent(name, next(iter(group.values()))[1].data.folds or 0, dict(sorted(group.items())))
        for name, group in zip(names, groups.values(), strict=True)
    ]


def recipe_but_fold(run: Path, learners: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what the result of a run depends on besides its photos: its recipe, and those of the runs that it uses.

    Args:
        run: its folder.
        learners: the runs that have learned from it.
    """

    def recipes_of(sources: Iterable[str | None]) -> list[dict[str, Any]]:
        runs = [run_of(path_of(source)) for source in sources if source is not None]
        return [recipe_but_fold(one, (*learners, run)) for one in runs if one is not None and one not in learners]

    keys = flat(Config().model_dump(mode="json")) | flat(read_recipe(run / CONFIG_FILE))
    keys["student.checkpoint"] = recipes_of([keys["student.checkpoint"]]) or keys["student.checkpoint"]
    keys["peers"] = [
        {**peer, "checkpoint": recipes_of([peer.get("checkpoint")]) or peer.get("checkpoint")} for peer in keys["peers"]
    ]
    teacher: Any = read_facts(run)["teacher"] or {}
    return {
        "classes": read_facts(run)["classes"],
        **{key: keys[key] for key in sorted(keys) if effects().get(key) != NOTHING and key != "data.fold"},
        "teachers' runs": recipes_of(_sources_of(teacher)),
    }


def _sources_of(teacher: dict[str, Any]) -> list[str]:
    """Return where the weights of a run's teacher, and of the guide beside it, came from."""
    both = [teacher, teacher.get("guide") or {}]
    return [one["source"] for one in both if one.get("source") is not None]


def _names(groups: Iterable[Mapping[int, tuple[Source, Config]]]) -> list[str]:
    """Return the name of each group of runs: that of its first run, without the fold if possible."""
    names: list[str] = []
    for group in groups:
        run = group[min(group)][0].run
        assert run is not None
        whole = whose_peer(run) or run.resolve()
        short = re.sub(r"[-_.]*(fold)?[-_.]*\d*$", "", whole.name) or whole.parent.name
        short += name_of_run(run).removeprefix(whole.name)  # which peer it is, if it is one
        names.append(name_of_run(run) if short in names else short)
    return names


def common_folds(students: Sequence[FoldedStudent], processes: Processes) -> list[FoldedStudent]:
    """Return the students with the folds that all of them have; say which are missing.

    Raises:
        InputError: their numbers of folds differ, or they have no fold in common.
    """
    counts = {student.folds: student for student in students}
    if len(counts) > 1:
        (few, first), (many, second) = sorted(counts.items())[:2]
        raise InputError(
            f"data.folds: {first.name} has {few} and {second.name} has {many}, so they hold out different photos; name "
            "runs with the same number of folds"
        )
    if not students:
        return []
    common = set.intersection(*(set(student.runs) for student in students))
    for student in students if processes.is_main else ():
        if student.missing:
            missing = ", ".join(map(str, student.missing))
            say(f"{student.name}: no run of fold {missing} of {student.folds}")
    if not common:
        raise InputError("data.fold: these students have no fold in common; train the missing runs")
    if processes.is_main and any(set(student.runs) != common for student in students):
        say(f"compared on the folds that all of them have: {', '.join(map(str, sorted(common)))}")
    return [replace(student, runs={fold: student.runs[fold] for fold in sorted(common)}) for student in students]


def examine_folds(student: FoldedStudent, processes: Processes) -> FoldedExamination:
    """Run every fold's student on the photos that it held out, so that each photo has one answer.

    Raises:
        InputError: a run cannot be loaded, or the photos are not those that it was trained with and scored on.
    """
    by_fold = {
        fold: examine(source, config, "validation", processes) for fold, (source, config) in student.runs.items()
    }
    of_folds = list(by_fold.values())
    sizes = [len(examination.photos) for examination in of_folds]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    whole = replace(
        of_folds[0],
        source=of_folds[0].source._replace(name=student.name),
        photos=joined([examination.photos for examination in of_folds]),
        teacher_score=None,
        answers=_joined_answers([examination.answers for examination in of_folds], starts),
        unreadable={
            start + index: reason
            for examination, start in zip(of_folds, starts, strict=True)
            for index, reason in examination.unreadable.items()
        },
    )
    return FoldedExamination(student, whole, by_fold)


def _joined_answers(parts: Sequence[Answers], starts: Sequence[int]) -> Answers:
    outputs = [part.output for part in parts]
    return Answers(
        indices=torch.cat([part.indices + start for part, start in zip(parts, starts, strict=True)]),
        labels=torch.cat([part.labels for part in parts]),
        output=StudentOutput.of(
            {name: torch.cat([output.logits[name] for output in outputs]) for name in outputs[0].logits}
        ),
        teacher_predictions=_all_or_none([part.teacher_predictions for part in parts]),
        teacher_logits=_all_or_none([part.teacher_logits for part in parts]),
    )


def _all_or_none(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if len(there) == len(tensors) else None
