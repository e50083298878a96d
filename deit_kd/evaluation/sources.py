"""Where a student comes from: a run, a timm or transformers folder, a file of weights, or a timm name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from timm.data.constants import DEFAULT_CROP_PCT

from deit_kd.config import IMAGENET_MEAN, IMAGENET_STD, Config, TeacherSection, as_options, build_parser, parse_config
from deit_kd.console import say
from deit_kd.distributed import Processes
from deit_kd.evaluation.classes import NUMBER, Matched, knows_any, match_classes
from deit_kd.interfaces import DENSE, InputError, Preprocessing
from deit_kd.models.local_dir import KnownPreprocessing
from deit_kd.models.names import has_published_second_head
from deit_kd.origins import Origin, imagenet_names, open_origin, open_published
from deit_kd.places import LOCAL_DIR, TEACHER_OF_RUN, check_source, path_of
from deit_kd.run_folder import CHECKPOINTS, CONFIG_FILE, HEADS_FILE, STUDENT_FOLDER, name_of_run, read_facts, run_of
from deit_kd.runs import parts
from deit_kd.students import TimmStudent

HEADS = ("head.weight", "fc.weight", "classifier.weight", "head.fc.weight", "head.linear.weight")  # of most timm models

TIMMS = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "bicubic", DEFAULT_CROP_PCT, "center")  # unless it is known


class Source(NamedTuple):
    """A student that was named on the command line, before its weights are read."""

    name: str  # as given on the command line
    recipe: list[str]  # the options that it stands for; the command line overrides them
    origin: Origin
    run: Path | None = None  # None for anything but a run
    checkpoint: Path | None = None  # of the run, to read instead of its final student

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Its classes; None if only their number is known, or nothing."""
        return self.origin.classes

    def own_config(self) -> Config:
        """Return its recipe, without command-line overrides."""
        return parse_config(self.recipe, build_parser("deit-kd eval"))[0]

    @property
    def facts(self) -> dict[str, Any]:
        """The facts of a run; empty for any other source."""
        return {} if self.run is None else dict(read_facts(self.run))


def open_source(text: str) -> Source:
    """Find out what `text` names: a run or one of its checkpoints, an exported folder, a file, or a timm model.

    Raises:
        InputError: it is none of these, or a run that is not finished.
    """
    check_source(text)
    if text.endswith(TEACHER_OF_RUN):
        return _from_weights(text, Path(text))
    path = Path(text.removeprefix(LOCAL_DIR)).expanduser()
    if not path.exists():
        return _from_timm(text)
    run, is_checkpoint = run_of(path), path.is_file() and path.resolve().parent.name == CHECKPOINTS
    if run is not None and (is_checkpoint or (path / CONFIG_FILE).is_file()):
        return _from_run(text, run, path if is_checkpoint else None)
    if run is None and path.is_dir() and not (path / "config.json").is_file():
        raise InputError(
            f"{text}: is neither a run (no {CONFIG_FILE}) nor an exported folder (no config.json); name one of these"
        )
    return _from_weights(text, path)


def _from_run(text: str, run: Path, checkpoint: Path | None) -> Source:
    if checkpoint is None and not (run / HEADS_FILE).is_file():
        raise InputError(
            f"{run}: is not a finished run (it has no {HEADS_FILE}); name one of its {CHECKPOINTS}, or finish it with "
            "--resume auto"
        )
    recipe = ["--config", str(run / CONFIG_FILE), "--teacher.fit.epochs", "0"]  # it has been fitted already
    name = name_of_run(run) if checkpoint is None else f"{name_of_run(run)}-{checkpoint.stem}"
    return Source(name, recipe, open_origin("run", text), run, checkpoint)


def _from_weights(text: str, path: Path) -> Source:
    origin = open_origin("run", text)
    if path.is_dir() and origin.architecture is None:
        raise InputError(f"{text}: config.json names no timm architecture; export it as a timm local-dir")
    if origin.layer_norm_eps is not None and origin.preprocessing.mean is None:
        raise InputError(
            f"{text}: has no preprocessor_config.json, which says how images are prepared; save its processor there"
        )
    if origin.columns is not None:
        raise InputError(f"{text}: answers through a class map; name it as the --teacher.checkpoint of a student")
    place = path.resolve()
    name = place.parent.name if place.name == STUDENT_FOLDER else place.name if place.is_dir() else place.stem
    if text.endswith(TEACHER_OF_RUN) and (recipe := path_of(text) / CONFIG_FILE).is_file():
        own = parse_config(["--config", str(recipe)], build_parser("deit-kd eval"))[0].data
        seen = Preprocessing(*(getattr(own, field) for field in Preprocessing._fields))
        options = [*as_options(own, "data."), *_options(text, origin, seen)]
    else:
        options = _options(text, origin)
    return Source(name.replace(":", "-"), options, origin)


def _from_timm(name: str) -> Source:
    origin = open_published("run", name)
    recipe = [*("--student.name", name), *("--student.pretrained", "true"), *_kind(has_published_second_head(name))]
    return Source(name, [*recipe, *_input_of(origin.preprocessing)], origin)


def _options(text: str, origin: Origin, otherwise: Preprocessing = TIMMS) -> list[str]:
    """Return the options that weights stand for, as far as they are described; see `_input_of`."""
    kind = _kind(origin.is_distilled, origin.answers_with_patches)
    options = ["--student.checkpoint", text, *kind, "--student.bits", json.dumps(origin.bits)]
    if origin.architecture is None:
        return options
    arguments = json.dumps(origin.model_args)
    return [
        *("--student.name", origin.architecture, "--student.args", arguments),
        *options,
        *_input_of(origin.preprocessing, otherwise),
    ]


def options_before(source: Source, typed: list[str]) -> list[str]:
    """Return the options that a source stands for, without its teacher's if the command line names another teacher."""
    is_another = any(option.partition("=")[0] == "--teacher.checkpoint" for option in typed)
    return [*source.recipe, *as_options(TeacherSection(), "teacher.")] if is_another else source.recipe


def _kind(distilled: bool, patches: bool = False) -> list[str]:
    terms = ["--distill.terms", json.dumps([{"kind": DENSE}])] if patches else []
    return ["--distill.kind", "hard" if distilled else "none", *terms, "--student.drop_path", "0"]


def _input_of(known: KnownPreprocessing, otherwise: Preprocessing = TIMMS) -> list[str]:
    """Return the options of a network's input; what is not known is as in `otherwise`."""
    return data_options(
        otherwise._replace(**{field: value for field, value in known._asdict().items() if value is not None})
    )


def data_options(preprocessing: Preprocessing) -> list[str]:
    """Return the options that a preprocessing stands for."""
    options = []
    for key, value in preprocessing._asdict().items():
        options += [f"--data.{key}", value if isinstance(value, str) else json.dumps(value)]
    return options


def check_classes(source: Source, ours: tuple[str, ...]) -> Matched:
    """Find the classes of photos among the student's, see `match_classes`.

    A 1000-way head without names of its own is taken for ImageNet's. 1000 folders with numbers for names are then its
    columns (ImageNet-V2), and 1000 that have none of its names are taken in its order, with a warning.

    Raises:
        InputError: the student does not know a class, or nothing says what its classes are.
    """
    theirs, count = source.classes, _class_count(source)
    imagenet = imagenet_names(1000) if count == 1000 else None
    if imagenet is not None and (theirs is None or source.origin.is_published or theirs == imagenet):
        theirs = imagenet
        if len(ours) == 1000 and all(map(NUMBER.fullmatch, ours)):
            return match_classes(source.name, tuple(map(str, range(1000))), ours)._replace(classes=theirs)
        if len(ours) == 1000 and not knows_any(theirs, ours):
            say(
                f"warning: {source.name} has ImageNet's 1000 classes, and the class folders are assumed to be in the "
                "same order"
            )
            return Matched(theirs, tuple(range(1000)))
    if theirs is None and count not in (None, len(ours)):
        raise InputError(
            f"data.root: {source.name} has {count} classes, the data have {len(ours)}; name photos of its classes"
        )
    if theirs is None:
        raise InputError(
            f"{source.name}: nothing says which classes its head stands for, and their number does not identify them; "
            'write {"label_names": ["…", …]}, in the order of its head, to config.json beside its weights'
        )
    return match_classes(source.name, theirs, ours)


def _class_count(source: Source) -> int | None:
    """Return how many classes a student has; None if its head is not known."""
    known = source.origin.class_count
    if known is not None or source.origin.is_published:
        return known
    heads = [source.origin.state[name] for name in HEADS if name in source.origin.state]
    return len(heads[0]) if heads and heads[0].ndim else None


def load_student(source: Source, config: Config, classes: tuple[str, ...], processes: Processes) -> TimmStudent:
    """Return the student of `source` in eval, on its device.

    Raises:
        InputError: its weights cannot be read, or belong to another model.
    """
    own = None if source.run is None else str(source.checkpoint or source.run)
    student = parts.build_student(config, classes, processes.device, own, strict=True)
    account = student.account
    if account is None or account.initialised or account.derived:
        new = "all of it" if account is None else ", ".join([*account.initialised, *account.derived])
        raise InputError(
            f"{source.name}: has no weights for part of the student (new: {new[:120]}); name the student's own weights"
        )
    return student.eval()
