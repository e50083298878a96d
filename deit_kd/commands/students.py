"""``deit-kd eval``, ``predict`` and ``export``: commands about a student."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from deit_kd.commands.shared import Arguments, asks_for_help, first_argument, named_folder
from deit_kd.config import build_parser, parse_config, read_options
from deit_kd.interfaces import ANSWERS, InputError
from deit_kd.places import check_source, check_there, path_of, photos_root
from deit_kd.run_folder import is_model


def evaluate(arguments: Arguments) -> None:
    """Score the heads of a student, or of the students of several folds."""
    parser = build_parser("deit-kd eval")
    parser.add_argument(
        "sources",
        type=str,
        nargs="+",
        help="a run, an exported folder, a file or a timm model; or the runs of several folds",
    )
    parser.add_argument("--split", type=str, default="validation", help="train, validation or a folder in data.root")
    parser.add_argument(
        "--labels", type=str, default=None, help="JSON of right answers, or real; several or none a photo"
    )
    parser.add_argument("--against", type=str, default=None, help="another student to compare with")
    parser.add_argument("--to", type=str, default=None, help="folder for the files; RUN/eval/<split> unless set")
    parser.add_argument("--diagnose", type=bool, default=False, help="also look at tokens, layers and attention")
    parser.add_argument("--images", type=list[str], default=[], help="names of the images that --diagnose shows")
    parser.add_argument("--probe", type=bool, default=False, help="also score the features by k-NN and a linear probe")
    if asks_for_help(arguments):
        parse_config(arguments, parser)
    first_argument(arguments, parser)
    sources = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    _check_evaluation(read_options(arguments, parser))
    from deit_kd.evaluation.sources import open_source, options_before
    from deit_kd.jobs.evaluate import evaluate_folds, evaluate_source

    typed = arguments[len(sources) :]
    opened = [open_source(source) for source in sources]
    parsed = [parse_config([*sources, *options_before(one, typed), *typed], parser) for one in opened]
    config, others = parsed[0]
    folder = named_folder("--to", others["to"])
    if len(opened) > 1:
        evaluate_folds([(one, config) for one, (config, _) in zip(opened, parsed, strict=True)], folder)
        return
    evaluate_source(
        sources[0],
        config,
        others["split"],
        against=others["against"],
        folder=folder,
        look_inside=others["diagnose"],
        images=others["images"],
        with_probe=others["probe"],
        labels=others["labels"],
    )


def _check_evaluation(options: dict[str, Any]) -> None:
    """Refuse what is misspelt or missing, before timm is asked what the student is."""
    for student in (*options["sources"], options["against"]):
        if student is not None:
            check_source(student)
    if options["labels"] not in (None, "real"):
        check_there("--labels", options["labels"], "name a file like real.json, or real")
    of_one = [option for option in ("against", "diagnose", "images", "probe", "labels") if options[option]]
    of_one += ["split"] * (options["split"] != "validation")
    if of_one and len(options["sources"]) > 1:
        raise InputError(f"--{of_one[0]}: works for one student only; leave it out for runs of several folds")
    if options["images"] and not options["diagnose"]:
        raise InputError("--images: names what --diagnose shows, and it is off; add --diagnose true")
    if options["data"]["root"] is not None and options["data"]["name"] == "folder":
        photos_root(options["data"]["root"])


def predict(arguments: Arguments) -> int:
    """Print the classes of images; return 1 if some of them cannot be read."""
    parser = _run_parser("deit-kd predict")
    parser.add_argument("files", type=str, nargs="+", help="images, or folders of some")
    parser.add_argument("--head", choices=[*ANSWERS, "all"], default="fused", help="which head answers")
    parser.add_argument("--csv", type=str, default=None, help="CSV file to write; standard output unless set")
    if arguments and is_model(arguments[0]) and not asks_for_help(arguments):
        from deit_kd.jobs.predict import recipe_of_model

        folder = Path(arguments[0])
        arguments = [arguments[0], *recipe_of_model(folder), *arguments[1:]]
    else:
        folder, arguments = _with_recipe_of_run(arguments, parser)
    config, others = parse_config(arguments, parser)
    from deit_kd.jobs.predict import predict

    csv_file = None if others["csv"] is None else Path(others["csv"])
    return 1 if predict(folder, config, [Path(file) for file in others["files"]], others["head"], csv_file) else 0


def export(arguments: Arguments) -> None:
    """Export a run's student."""
    parser = _run_parser("deit-kd export")
    parser.add_argument("--format", type=str, required=True, help="timm, local-dir, transformers, onnx or torch-export")
    parser.add_argument("--to", type=str, default=None, help="folder to write; RUN/export/FORMAT unless set")
    parser.add_argument(
        "--outputs", type=str, nargs="+", default=None, help=f"any of {', '.join(ANSWERS)}; all unless set"
    )
    parser.add_argument("--opset", type=int, default=18, help="ONNX operator set, 18 to 23")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="fp32", help="of the weights")
    parser.add_argument("--dynamic_size", type=bool, default=False, help="accept images of other sizes")
    if asks_for_help(arguments):
        parse_config(arguments, parser)
    named = first_argument(arguments, parser)
    if not path_of(named).exists():
        raise InputError(f"{named}: is not there; name the folder of a run, or one of its checkpoints")
    from deit_kd.evaluation.sources import open_source
    from deit_kd.exports import Choices
    from deit_kd.jobs.export import export_student

    source = open_source(named)
    config, others = parse_config([named, *source.recipe, *arguments[1:]], parser)
    outputs = None if others["outputs"] is None else tuple(others["outputs"])
    choices = Choices(outputs, others["opset"], others["dynamic_size"], others["precision"])
    export_student(source, config, others["format"], named_folder("--to", others["to"]), choices)


def _run_parser(program: str) -> ArgumentParser:
    parser = build_parser(program)
    parser.add_argument("run", type=str, help="folder of a run; options override its recipe")
    return parser


def _with_recipe_of_run(arguments: Arguments, parser: ArgumentParser) -> tuple[Path, Arguments]:
    """Return the run's folder, which is the first argument, and the arguments with its recipe before them."""
    if asks_for_help(arguments):
        return Path(), arguments
    folder = Path(first_argument(arguments, parser))
    recipe = folder / "config.yaml"
    if not recipe.is_file():
        raise InputError(f"{folder}: is not a run (it has no {recipe.name}); name the folder of a run")
    return folder, [arguments[0], "--config", str(recipe), *arguments[1:]]
