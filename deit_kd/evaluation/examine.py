"""A student, a split, and the answers of the student and its teacher to it: every evaluation starts from these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from deit_kd import data
from deit_kd.asking import Answers, collect
from deit_kd.config import Config
from deit_kd.console import say
from deit_kd.data import Photos
from deit_kd.distributed import Processes, together
from deit_kd.evaluation.classes import Matched
from deit_kd.evaluation.right_answers import RightAnswers, read_right_answers
from deit_kd.evaluation.sources import Source, check_classes, load_student
from deit_kd.evaluation.teacher import teacher_of, whose
from deit_kd.interfaces import Batch, InputError, Preprocessing, head_probabilities, speaker
from deit_kd.metrics import judge
from deit_kd.models.state import tensors_hash
from deit_kd.run_folder import ScoreRecord
from deit_kd.runs.held_out import check_own_fold
from deit_kd.runs.photos import build_evaluation_loader, build_splits, compare_photos, with_labels
from deit_kd.students import TimmStudent
from deit_kd.teachers import NetworkTeacher
from deit_kd.teaching.stored import StoredAnswers


@dataclass(frozen=True)
class Examination:
    """A student, a split, and the answers of the student and its teacher to it."""

    source: Source
    config: Config
    split: str
    processes: Processes
    photos: Photos
    matched: Matched
    student: TimmStudent
    teacher: NetworkTeacher | None  # also None if a label store answers for it
    teacher_score: ScoreRecord | None  # ``top1``, ``top5`` and ``nll`` over the split, recorded in a label store
    answers: Answers
    unreadable: dict[int, str]  # the reason, by index in the split
    right_answers: RightAnswers | None = None  # to the split's images, in place of their labels

    @property
    def right(self) -> Tensor | None:
        """The right answers [n, C] to the images that are scored, if a file gives them."""
        return None if self.right_answers is None else self.right_answers.right[self.answers.indices]

    @property
    def speaker(self) -> str:
        """Which head speaks for the student, see `deit_kd.interfaces.speaker`."""
        return speaker(self.heads())

    def heads(self) -> dict[str, Tensor]:
        """Return the probabilities [n, C] of the heads that it has, of `ANSWERS`."""
        return dict(head_probabilities(self.answers.output, self.config.evaluate.fusion))

    def predictions(self) -> dict[str, Tensor]:
        """Return the classes [n] of the heads that it has."""
        return {head: probabilities.argmax(-1) for head, probabilities in self.heads().items()}


def examine(source: Source, config: Config, split: str, processes: Processes, labels: str | None = None) -> Examination:
    """Run a student, and its teacher if there is one, on every readable image of a split.

    With `labels`, the right answers are those of a file, see `read_right_answers`, and images without any are left out.

    Raises:
        InputError: the student cannot be built, the photos are of other classes, or none can be read.
    """
    photos = _photos(source, config, split, processes)
    if photos.rest is not None and source.classes is not None and photos.rest.name not in source.classes:
        raise InputError(
            f"data.rest: {source.name} knows no class {photos.rest.name!r}; compare on data.classes alone with "
            "--data.rest null"
        )
    matched = check_classes(source, photos.classes)
    if photos.rest is not None and {*matched.classes} != {*photos.classes}:
        raise InputError(
            f"data.rest: {photos.rest.name!r} stands for other classes here than in the head of {source.name}, which "
            f"knows {', '.join(matched.classes[:5])}; take the data.classes that it was trained on"
        )
    line = matched.line(source.name, photos.classes)
    if line is not None and processes.is_main:
        say(line)
    right = None
    if labels is not None:
        right = together(processes, lambda: read_right_answers(labels, photos.names, photos.classes))
    student = load_student(source, config, matched.classes, processes)
    teacher = teacher_of(source, config, _named_by(matched, photos), processes)
    stored = teacher if isinstance(teacher, StoredAnswers) else None
    network = None if isinstance(teacher, StoredAnswers) else teacher
    batches = build_evaluation_loader(config, photos, processes, skip=True)
    mine: dict[int, str] = {}
    answers = collect(
        student,
        network,
        _noting(batches, mine),
        classes=len(matched.classes),
        processes=processes,
        precision=config.train.precision,
    )
    answers = answers._replace(output=matched.answer(answers.output))
    unreadable = dict(sorted(pair for share in processes.gather(mine) for pair in share.items()))
    if not len(answers.labels):
        raise InputError(
            f"data.root: none of the {len(photos)} images of {split!r} can be read; {first_reason(unreadable)}"
        )
    if stored is not None:
        if bool((stored.predictions[answers.indices] < 0).any()):
            raise InputError(
                f"teacher.store: {config.teacher.store} has no answers for photos that were unreadable when the store "
                "was built and can be read now; rebuild it"
            )
        logits = None if stored.logits is None else stored.logits[answers.indices]
        answers = answers._replace(teacher_predictions=stored.predictions[answers.indices], teacher_logits=logits)
    score = None if stored is None or unreadable or right is not None else stored.score
    if right is not None:
        answers = _of_rows(answers, right.right[answers.indices].any(-1).nonzero()[:, 0])
    return Examination(
        source, config, split, processes, photos, matched, student, network, score, answers, unreadable, right
    )


def _of_rows(answers: Answers, rows: Tensor) -> Answers:
    """Return the answers to some of the images."""

    def chosen(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    return Answers(
        answers.indices[rows],
        answers.labels[rows],
        answers.output.mapped(lambda logits: logits[rows]),
        chosen(answers.teacher_predictions),
        chosen(answers.teacher_logits),
    )


def _named_by(matched: Matched, photos: Photos) -> Photos:
    """Return photos whose classes have the student's names, by which its teacher knows them."""
    return photos if matched.names == photos.classes else replace(photos, classes=matched.names)


def _noting(batches: Iterable[Batch], unreadable: dict[int, str]) -> Iterator[Batch]:
    for batch in batches:
        unreadable.update({view.photo: view.reason for view in batch.missing})
        yield batch


def first_reason(unreadable: dict[int, str]) -> str:
    return next(iter(unreadable.values()), "there are none")


def _photos(source: Source, config: Config, split: str, processes: Processes) -> Photos:
    """Return the photos of a split, which are the same for every process."""

    def found() -> Photos:
        if split in ("train", "validation"):
            splits = build_splits(with_labels(config))
            if source.run is not None:
                check_own_fold(source.run, config.data, splits)
            photos: Photos = getattr(splits, split)
            return photos
        where = config.data
        return data.one_split(
            name=where.name,
            root=where.root,
            split=split,
            classes=where.classes,
            rest=where.rest,
            stage=where.stage,
            image_column=where.image_column,
            label_column=where.label_column,
        )

    def listed() -> Photos:
        with processes.busy("lists the photos"):
            return found()

    photos = together(processes, listed)
    compare_photos(processes, {split: photos})
    return photos


PLACE = (  # keys of the section data that say which photos they are, and not how they are seen
    *("name", "root", "train_split", "validation_split", "validation_fraction", "folds", "fold"),
    *("classes", "rest", "rest_share", "fraction", "per_class", "workers", "stage", "image_column", "label_column"),
)


def examine_other(source: Source, first: Examination, split: str, processes: Processes) -> dict[str, Tensor]:
    """Return what each head of a second student predicts [n] for the images of the first.

    Its own recipe says how to preprocess them; their folder is the first one's.

    Raises:
        InputError: as `examine` does.
    """
    own = source.own_config()
    photos = {key: getattr(first.config.data, key) for key in PLACE}
    config = own.with_keys(data=photos, train={"device": first.config.train.device})
    config = config.model_copy(update={"teacher": type(own.teacher)()})
    labels = None if first.right_answers is None else first.right_answers.file
    return examine(source, config, split, processes, labels).predictions()


SEEN = set(Preprocessing._fields)  # of the section data


def evaluated(examination: Examination) -> dict[str, Any]:
    """Return what was evaluated: photos, preprocessing, weights, and the teacher they were compared with."""
    config, network = examination.config, examination.teacher
    teacher: dict[str, Any] | None = None
    if network is not None:
        teacher = {"name": network.facts.get("name"), "weights": tensors_hash(network.state_dict())}
    elif examination.answers.teacher_predictions is not None:
        teacher = {"store": config.teacher.store}
    root, right = config.data.root, examination.right_answers
    return {
        **({} if right is None else {"labels": right.digest}),
        "root": config.data.name if root is None else str(Path(root).expanduser().absolute()),
        "split": examination.split,
        "photos": examination.photos.digest(),
        "seen": config.data.model_dump(mode="json", include=SEEN),
        "student": tensors_hash(examination.student.state_dict()),
        "teacher": teacher,
    }


def is_as_trained(examination: Examination) -> bool:
    """Return whether a run is evaluated on its own photos, with its own preprocessing, teacher and fusion."""
    source, config = examination.source, examination.config
    if source.run is None or examination.right_answers is not None:
        return False
    own = source.own_config()
    digest = source.facts["data"].get(examination.split)
    same_photos = config.data.root == own.data.root if digest is None else examination.photos.digest() == digest

    def how(config: Config) -> tuple[Any, ...]:
        seen, teacher = config.data.model_dump(include=SEEN), config.teacher
        preprocessing = (
            teacher.image_size,
            teacher.mean,
            teacher.std,
            teacher.args,
            teacher.class_map,
            teacher.label_set,
        )
        return config.student, seen, config.evaluate.fusion, teacher.store, preprocessing, whose(teacher)

    return same_photos and how(config) == how(own)


def beside(name: str, examinations: Mapping[str, Examination]) -> dict[str, dict[str, Tensor]]:
    """Return the predictions [n] of the other students that saw the same photos as the examination called `name`."""
    own = examinations[name]
    return {
        other: examination.predictions()
        for other, examination in examinations.items()
        if other != name
        and examination.photos.digest() == own.photos.digest()
        and examination.unreadable == own.unreadable
    }


def _columns(examination: Examination) -> dict[str, Any]:
    """Return ``{"columns": …}``, the student's column and name of each class, if they are not the photos' own."""
    mapping = examination.matched.class_map
    return {} if mapping is None else {"columns": mapping.record(examination.photos.classes)}


def _labels(examination: Examination) -> dict[str, Any]:
    """Return ``{"labels": …}``, the file of right answers and how many images it leaves out, if there is one."""
    right = examination.right_answers
    if right is None:
        return {}
    readable = len(examination.photos) - len(examination.unreadable)
    return {"labels": {"file": right.file, "left_out": readable - len(examination.answers.labels)}}


def judge_heads(examination: Examination, others: Mapping[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Return what the evaluation's ``heads.json`` holds: that of a training run, and all that `judge` finds."""
    config, source, answers = examination.config, examination.source, examination.answers
    weights = "given" if source.run is None else "model" if config.train.ema_decay == 0 else "ema"
    judged = judge(
        answers.output,
        answers.labels,
        teacher_logits=answers.teacher_logits,
        teacher_predictions=answers.teacher_predictions,
        others=others,
        fusion=config.evaluate.fusion,
        seed=config.seed,
        right=examination.right,
    )
    if judged["teacher"] is not None:  # a store rounds its logits, but holds the scores from before
        judged["teacher"] |= examination.teacher_score or {}
    return {
        "n": len(answers.labels),
        "weights": weights,
        "fusion": config.evaluate.fusion,
        "student": source.name,
        "evaluated": evaluated(examination),
        "classes": list(examination.photos.classes),
        **_columns(examination),
        **_labels(examination),
        "unreadable": {examination.photos.names[index]: reason for index, reason in examination.unreadable.items()},
        **judged,
    }
