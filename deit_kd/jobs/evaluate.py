"""``deit-kd eval``: score the heads of any student on a split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deit_kd.config import Config
from deit_kd.console import console, say
from deit_kd.distributed import process_group
from deit_kd.evaluation.diagnose import (
    ATTENTION_FOLDER,
    DIAGNOSIS_FILE,
    diagnose,
    tell_diagnosis,
    write_diagnosis,
)
from deit_kd.evaluation.examine import (
    Examination,
    beside,
    examine,
    examine_other,
    first_reason,
    is_as_trained,
    judge_heads,
)
from deit_kd.evaluation.folds import common_folds, examine_folds, fold_scores, folded_students
from deit_kd.evaluation.sources import Source, open_source
from deit_kd.evaluation.tables import print_comparison, print_probe, print_scores, print_students
from deit_kd.evaluation.written import PREDICTIONS_FILE, write_evaluation
from deit_kd.files import read_json
from deit_kd.interfaces import counted
from deit_kd.run_folder import HEADS_FILE

EVALUATIONS = Path("runs/eval")  # of students that have no run


def evaluate_source(
    text: str,
    config: Config,
    split: str,
    *,
    against: str | None,
    folder: Path | None,
    look_inside: bool,
    images: list[str],
    with_probe: bool,
    labels: str | None,
) -> None:
    """Score a student on a split; print the tables, write ``heads.json`` and ``predictions.parquet``.

    Args:
        text: a run, an exported folder, a file of weights or a timm model.
        config: the recipe of `text`, with command-line overrides.
        split: ``train``, ``validation``, or another folder under ``data.root`` (``.`` is the root itself).
        against: a second student, named like `text`.
        folder: where the files go; None is `default_folder`.
        look_inside: write ``diagnosis.json`` and the images with the tokens' attention, too; see `diagnose`.
        images: which images to show then; the most interesting ones if it is empty.
        with_probe: score the features as well, see `probe`.
        labels: a file of right answers in place of the labels, see `read_right_answers`.

    Raises:
        InputError: the student cannot be built, the photos are of other classes, or none can be read.
    """
    with process_group(config.train.device) as processes:
        source = open_source(text)
        examination = examine(source, config, split, processes, labels)
        other = None if against is None else open_source(against)
        others = {} if other is None else {other.name: examine_other(other, examination, split, processes)}
        heads = judge_heads(examination, others)
        if with_probe:
            # Imported here so that nothing else waits for scikit-learn.
            from deit_kd.evaluation.probe import probe

            heads["probe"] = probe(examination)
        if processes.is_main:
            diagnosis = diagnose(examination, images) if look_inside else None
            folder = folder or default_folder(examination, heads)
            write_evaluation(folder, examination, heads)
            tell(heads, examination, folder)
            if diagnosis is not None:
                write_diagnosis(folder, diagnosis)
                tell_diagnosis(diagnosis)
                say(f"diagnosis: {folder / DIAGNOSIS_FILE}   images: {folder / ATTENTION_FOLDER}")


def evaluate_folds(runs: Sequence[tuple[Source, Config]], folder: Path | None) -> None:
    """Join the runs of each recipe over its folds and score every photo once; print the tables, write the files.

    Args:
        runs: of folds, each with its recipe, command-line overrides included; several recipes are compared image by
            image over the folds that all of them have.
        folder: where the files go, in a folder for each student if there are several; None is
            ``runs/eval/<name>-folds``.

    Raises:
        InputError: a run is not of a fold or cannot be loaded, or the photos are not those that it knows.
    """
    with process_group(runs[0][1].train.device) as processes:
        students = common_folds(folded_students(runs), processes)
        folded = {student.name: examine_folds(student, processes) for student in students}
        examinations = {name: one.whole for name, one in folded.items()}
        found: dict[str, dict[str, Any]] = {}
        for name, whole in examinations.items() if processes.is_main else ():
            found[name] = folded[name].judge(beside(name, examinations))
            own_folder = folder / name if folder is not None and len(students) > 1 else folder
            own_folder = own_folder or EVALUATIONS / f"{name}-folds"
            write_evaluation(own_folder, whole, found[name])
            say(f"{name}, {fold_scores(found[name])}")
            if len(students) == 1:
                tell(found[name], whole, own_folder)
            else:
                say(f"numbers and predictions: {own_folder}")
        if len(found) > 1:
            print_students(found)


def default_folder(examination: Examination, heads: dict[str, Any]) -> Path:
    """Return where the files of an evaluation go: to ``RUN/eval/<split>``, or to ``runs/eval/<name>-<split>``.

    A run's folder is reserved for its own photos, preprocessing and teacher; any other source's for what was evaluated
    there first. Everything else gets a folder with the photos' root and a hash in its name.
    """
    source, split = examination.source, examination.split
    name = "root" if split == "." else split.replace("/", "-")
    if source.checkpoint is not None:
        name += f"-{source.checkpoint.stem}"
    folder = EVALUATIONS / f"{source.name}-{name}" if source.run is None else source.run / "eval" / name
    what = {"fusion": heads["fusion"], **heads["evaluated"]}
    if source.run is None:
        is_own = not (folder / HEADS_FILE).is_file() or _without_root(_evaluated_in(folder)) == _without_root(what)
    else:
        is_own = is_as_trained(examination)
    if is_own:
        return folder
    digest = hashlib.blake2b(json.dumps(_without_root(what), sort_keys=True).encode(), digest_size=4).hexdigest()
    return folder.with_name(f"{folder.name}-{Path(what['root']).name}-{digest}")


def _evaluated_in(folder: Path) -> dict[str, Any]:
    heads = read_json(folder / HEADS_FILE, dict[str, Any])
    return {"fusion": heads.get("fusion"), **heads.get("evaluated", {})}


def _without_root(what: dict[str, Any]) -> dict[str, Any]:
    """Return what distinguishes one evaluation from another; photos that were moved are the same."""
    return {key: value for key, value in what.items() if key != "root"}


def tell(heads: dict[str, Any], examination: Examination, folder: Path) -> None:
    """Print the tables of an evaluation and where its files are."""
    if heads["heads"]["dist"] is None:
        say(f"{heads['student']} has no distillation head: only its class head is scored")
    if examination.unreadable:
        say(
            f"{len(examination.unreadable)} of {len(examination.photos)} images cannot be read and are left out: "
            f"{first_reason(examination.unreadable)}"
        )
    if "labels" in heads:
        labels = heads["labels"]
        say(f"labels: {labels['file']}; left out: {counted(labels['left_out'], 'image')} without a right answer")
    print_scores(heads)
    print_comparison(heads)
    if "probe" in heads:
        print_probe(heads)
    console.print()
    say(f"numbers: {folder / HEADS_FILE}   predictions: {folder / PREDICTIONS_FILE}")
