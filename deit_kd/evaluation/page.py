"""The page of the report: every figure of one or several runs, with its numbers beside it."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from deit_kd.config import Config, build_parser, described, parse_config
from deit_kd.console import say, score_text
from deit_kd.distributed import Processes
from deit_kd.evaluation.curves import Records, charts_of, names_of, read_records, rows_of, troubles_of
from deit_kd.evaluation.diagnose import Diagnosis, Portrait, diagnose, write_diagnosis
from deit_kd.evaluation.examine import Examination, beside, examine, judge_heads
from deit_kd.evaluation.folds import FoldedExamination, common_folds, examine_folds, fold_scores, folded_students
from deit_kd.evaluation.sources import Source, open_source
from deit_kd.evaluation.written import write_evaluation
from deit_kd.figures import (
    as_png,
    as_svg,
    class_bars,
    image_jpeg,
    line_charts,
    matrix,
    reliability_diagram,
    token_chart,
)
from deit_kd.files import new_folder, write_atomically, write_json
from deit_kd.interfaces import ANSWERS, PAIRS, InputError, counted
from deit_kd.metrics import names_in_every_head
from deit_kd.run_folder import CONFIG_FILE, HEADS_FILE, peer_folders

REPORT_FILE = "report.html"
REPORT_FOLDER = "report"  # in a run
SEVERAL = Path("runs/report")  # of several runs
MOST_CLASSES = 24  # bars in a figure
HEADS = {
    "cls": "class token",
    "dist": "distillation token",
    "patch": "patch tokens",
    "fused_softmax": "fused, mean of softmaxes",
    "fused_logits": "fused, mean of logits",
    **{name: f"fused, {first} and {second} alone" for name, (first, second) in PAIRS.items()},
    "teacher": "teacher",
}


@dataclass(frozen=True)
class Subject:
    """What a section of the page is about: a run, or the runs of one recipe over its folds."""

    runs: list[str]  # names of the runs
    whole: Examination
    inside: Examination  # of the run whose layers are shown: the first fold's
    folded: FoldedExamination | None = None


@dataclass(frozen=True)
class Seen:
    """A finished run, the scores of its heads, and the diagnosis of its layers."""

    name: str
    facts: dict[str, Any]
    heads: dict[str, Any]
    diagnosis: Diagnosis


@dataclass
class Figures:
    """Collects the figures of a page; each is also written beside it as PNG, with its numbers as JSON or CSV."""

    folder: Path
    drawn: list[str] = field(default_factory=list)

    def add(self, name: str, figure: Figure, numbers: Any, caption: str = "") -> dict[str, str]:
        """Write ``<name>.png`` and its numbers (rows as CSV, anything else as JSON); return what the page shows."""
        write_atomically(self.folder / f"{name}.png", as_png(figure))
        if isinstance(numbers, list):
            write_atomically(self.folder / f"{name}.csv", _csv(numbers).encode())
        else:
            write_json(self.folder / f"{name}.json", numbers)
        self.drawn.append(name)
        return {"name": name, "svg": as_svg(figure, f"figure{len(self.drawn)}"), "caption": caption}


def write_report(folders: list[Path], folder: Path | None, processes: Processes) -> None:
    """Write the report from within a job, see `report`."""
    folder = folder or (folders[0] / REPORT_FOLDER if len(folders) == 1 else SEVERAL)
    named = {run.resolve(): run for run in folders}
    peers = {peer.resolve(): peer for run in folders for peer in peer_folders(run)}
    names = names_of(list((named | peers).values()))
    sources = {name: _open_run(run) for name, run in names.items()}
    records = {name: read_records(run) for name, run in names.items()}
    subjects = _subjects(sources, processes)
    try:
        if processes.is_main:
            with new_folder(folder):
                _draw(folder, subjects, records)
    finally:
        processes.wait()  # the others wait, whether or not the page succeeds


def _draw(folder: Path, subjects: Mapping[str, Subject], records: Mapping[str, Records]) -> None:
    seen = [
        _see(
            name,
            folder if len(subjects) == 1 else folder / name,
            subjects,
            troubles_of([record for run in subject.runs for record in records[run]]),
        )
        for name, subject in subjects.items()
    ]
    charts = charts_of({name: records[subject.runs[0]] for name, subject in subjects.items()})
    figures = Figures(folder)
    curves = [figures.add(name, line_charts([chart]), rows_of(chart)) for name, chart in charts.items()]
    tokens = {run.name: run.diagnosis.numbers["tokens"] for run in seen if run.diagnosis.numbers["tokens"]}
    if tokens:
        caption = "After every block, mean and spread over images. In the paper: .06 at the input, .93 at the end."
        curves.append(figures.add("tokens", token_chart(tokens), tokens, caption))
    html = _template().render(
        title=" · ".join(subjects),
        runs=[_section(run, figures, len(seen) > 1) for run in seen],
        heads=HEADS,
        curves=curves,
    )
    write_atomically(folder / REPORT_FILE, html.encode())
    say(f"report: {folder / REPORT_FILE}")


def _open_run(folder: Path) -> Source:
    if (folder / CONFIG_FILE).is_file() and not (folder / HEADS_FILE).is_file():
        raise InputError(
            f"{folder}: is not a finished run (it has no {HEADS_FILE}); finish it with --resume auto, or draw what it "
            "has with deit-kd plot"
        )
    source = open_source(str(folder))
    if source.run is None:
        raise InputError(f"{folder}: is not a run (it has no {CONFIG_FILE}); a report needs its records")
    return source


def _subjects(sources: Mapping[str, Source], processes: Processes) -> dict[str, Subject]:
    """Examine every run; join those that are folds of one recipe."""
    parser = build_parser("deit-kd report")
    configs = {name: parse_config(source.recipe, parser)[0] for name, source in sources.items()}
    in_folds = [name for name, config in configs.items() if config.data.folds is not None and len(configs) > 1]
    subjects = {}
    for name in [name for name in sources if name not in in_folds]:
        examination = examine(sources[name], configs[name], "validation", processes)
        subjects[name] = Subject([name], examination, examination)
    students = folded_students([(sources[name], configs[name]) for name in in_folds])
    for student in common_folds(students, processes):
        folded = examine_folds(student, processes)
        runs = [source.name for source, _ in student.runs.values()]
        name = f"{student.name}-folds" if student.name in subjects else student.name
        subjects[name] = Subject(runs, folded.whole, next(iter(folded.by_fold.values())), folded)
    return subjects


def _see(name: str, folder: Path, subjects: Mapping[str, Subject], troubles: str) -> Seen:
    """Score and diagnose one subject, and write the results; others that saw the same photos are compared with it."""
    subject = subjects[name]
    own = subject.whole
    others = beside(name, {other: one.whole for other, one in subjects.items()})
    heads = judge_heads(own, others) if subject.folded is None else subject.folded.judge(others)
    diagnosis = diagnose(subject.inside, [])
    facts = {**_facts(own.config, own.source.facts, heads), "soundness": troubles}
    if subject.folded is not None:
        facts["folds"] = f"{fold_scores(heads)}; curves, layers and images are those of {subject.runs[0]}"
    write_evaluation(folder, own, heads)
    write_diagnosis(folder, diagnosis)
    return Seen(name, facts, heads, diagnosis)


def _facts(config: Config, facts: Mapping[str, Any], heads: Mapping[str, Any]) -> dict[str, Any]:
    """Describe in words what was trained, and from what."""
    teacher = facts["teacher"]
    train = config.train
    return {
        "student": f"{config.student.name}, {config.data.image_size} px",
        "teacher": "the average of its own weights"
        if config.learns_from_own_average
        else "none"
        if teacher is None
        else f"{teacher['name']}, {score_text(heads['teacher'] or teacher['score'], 2)} %",
        "learned from": described(config),
        "data": _data_words(config, facts),
        "training": f"{counted(train.epochs, 'epoch')}, batch {train.batch_size}, seed {config.seed}, "
        f"precision {train.precision}",
        "scored": f"{counted(heads['n'], 'validation image')}, weights: {heads['weights']}"
        + (f", {counted(len(heads['unreadable']), 'unreadable image')} left out" if heads["unreadable"] else ""),
    }


def _data_words(config: Config, facts: Mapping[str, Any]) -> str:
    """Describe the photos, and what was taken of them."""
    words = f"{config.data.root or config.data.name}, {len(facts['classes'])} classes"
    if "images" in facts:
        words += f", {counted(facts['images']['train'], 'training image')}"
    return f"{words} ({config.data.taken})" if config.data.taken else words


def _section(run: Seen, figures: Figures, several: bool) -> dict[str, Any]:
    """Return what the template shows of one run."""
    prefix = f"{run.name}/" if several else ""
    heads, numbers = run.heads, run.diagnosis.numbers
    disagreement, calibration = heads["disagreement"], heads["reliability"]
    names = disagreement["names"]
    paper = "DeiT, Table 4: distillation brings the student nearer to its teacher (.133 to .102)."
    shown = [
        figures.add(
            f"{prefix}disagreement",
            matrix("Share of images on which two predictors differ", names, names, disagreement["matrix"]),
            disagreement,
            paper if "teacher" in names else "",
        ),
        figures.add(f"{prefix}reliability", _reliability_figure(calibration, heads["fusion"]), calibration),
        _class_figure(prefix, heads, figures),
    ]
    if numbers["cka"] is not None:
        cka = numbers["cka"]
        values = matrix(
            "Which stage of the teacher is each block like?", cka["student"], cka["teacher"], cka["matrix"], 2
        )
        caption = f"Linear centred kernel alignment (CKA) over {cka['images']} images."
        shown.append(figures.add(f"{prefix}cka", values, cka, caption))
    return {
        "name": run.name,
        "facts": run.facts,
        "scores": {**heads["heads"], "teacher": heads["teacher"]},
        "temperature": heads["temperature"],
        "fusion_weight": heads["fusion_weight"],
        "comparisons": heads["comparisons"],
        "followed": numbers["followed"],
        "collapsed": numbers["collapsed"],
        "figures": shown,
        "gallery": [_card(portrait) for portrait in run.diagnosis.gallery],
        "disputed": [_card(portrait) for portrait in run.diagnosis.disputed],
    }


def _class_figure(prefix: str, heads: Mapping[str, Any], figures: Figures) -> dict[str, str]:
    """Draw accuracy by class, starting with the classes on which the two heads differ most."""
    by_class, classes = heads["by_class"], heads["classes"]
    present = [name for name in (*ANSWERS, "teacher") if name in by_class]
    filled = [index for index, support in enumerate(by_class["support"]) if support]

    def gain(index: int) -> tuple[float, float]:
        cls = by_class["cls"][index]
        return by_class.get("dist", by_class["cls"])[index] - cls, -cls

    order = sorted(filled, key=gain, reverse=True)
    ends = order if len(order) <= MOST_CLASSES else order[: MOST_CLASSES // 2] + order[-MOST_CLASSES // 2 :]
    bars = class_bars(
        "By class, largest gain of dist first" if "dist" in by_class else "By class, hardest first",
        [classes[index] for index in ends],
        {name: [by_class[name][index] for index in ends] for name in present if name != "teacher"},
    )
    rows = [
        {"class": classes[index], "support": by_class["support"][index], **{n: by_class[n][index] for n in present}}
        for index in order
    ]
    caption = f"{len(ends)} of {len(order)} classes; the CSV file has all of them." if len(ends) < len(order) else ""
    return figures.add(f"{prefix}classes", bars, rows, caption)


def _reliability_figure(calibration: Mapping[str, Any], fusion: str) -> Figure:
    names = names_in_every_head(fusion).items()
    return reliability_diagram({name: calibration[head] for name, head in names if head in calibration})


def _card(portrait: Portrait) -> dict[str, Any]:
    panels = portrait.panels()
    return {
        "path": portrait.path,
        "answers": portrait.answers,
        "panels": {
            caption: _data_url(image_jpeg(pixels)) for caption, pixels in panels.items() if "head" not in caption
        },
        "by_head": {caption: _data_url(image_jpeg(pixels)) for caption, pixels in panels.items() if "head" in caption},
    }


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("deit_kd"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")
