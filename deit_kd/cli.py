"""The command line: parse, build the config, call one job."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt

from deit_kd.config import Config, build_parser, parse_config, read_options
from deit_kd.files import check_file_to_be, refusal
from deit_kd.interfaces import InputError, Stopped, nearest, printable
from deit_kd.places import check_source, check_there, check_training, path_of, photos_root
from deit_kd.stopping import handlers, leave_signals_alone, stop_at_once

Arguments = list[str]


def _train(arguments: Arguments) -> None:
    parser = build_parser("deit-kd train")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="take two steps and one evaluation batch, print memory, time and disk, write nothing",
    )
    config, others = parse_config(arguments, parser)
    check_training(config)
    if others["dry_run"]:
        from deit_kd.jobs.dry_run import dry_run

        dry_run(config)
        return
    from deit_kd.jobs.train import train

    train(config)


def _evaluate(arguments: Arguments) -> None:
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
    if _asks_for_help(arguments):
        parse_config(arguments, parser)
    _first_argument(arguments, parser)
    sources = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    _check_evaluation(read_options(arguments, parser))
    from deit_kd.evaluation.sources import open_source, options_before
    from deit_kd.jobs.evaluate import evaluate_folds, evaluate_source

    typed = arguments[len(sources) :]
    opened = [open_source(source) for source in sources]
    parsed = [parse_config([*sources, *options_before(one, typed), *typed], parser) for one in opened]
    config, others = parsed[0]
    folder = None if others["to"] is None else Path(others["to"])
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
    if options["data"]["root"] is not None and options["data"]["name"] == "folder":
        photos_root(options["data"]["root"])


def _predict(arguments: Arguments) -> None:
    parser = _run_parser("deit-kd predict")
    parser.add_argument("files", type=str, nargs="+", help="images")
    parser.add_argument("--head", choices=["cls", "dist", "fused", "all"], default="fused", help="which head answers")
    parser.add_argument("--csv", type=str, default=None, help="CSV file to write; standard output unless set")
    if arguments and arguments[0].endswith(".onnx") and not _asks_for_help(arguments):
        from deit_kd.jobs.predict import recipe_of_model

        folder = Path(arguments[0])
        arguments = [arguments[0], *recipe_of_model(folder), *arguments[1:]]
    else:
        folder, arguments = _with_recipe_of_run(arguments, parser)
    config, others = parse_config(arguments, parser)
    from deit_kd.jobs.predict import predict

    csv_file = None if others["csv"] is None else Path(others["csv"])
    predict(folder, config, [Path(file) for file in others["files"]], others["head"], csv_file)


def _report(arguments: Arguments) -> None:
    parser = _run_list_parser("deit-kd report", "folders of finished runs")
    parser.add_argument("--to", type=str, default=None, help="folder for the page; RUN/report unless set")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:1")
    given = _runs_given(parser, arguments)
    from deit_kd.jobs.report import report

    report([Path(run) for run in given["runs"]], None if given["to"] is None else Path(given["to"]), given["device"])


def _plot(arguments: Arguments) -> None:
    parser = _run_list_parser("deit-kd plot", "folders of runs, finished or not")
    parser.add_argument("--to", type=str, default=None, help="PNG to write; RUN/curves.png unless set")
    given = _runs_given(parser, arguments)
    from deit_kd.jobs.plot import plot

    plot([Path(run) for run in given["runs"]], _named_file("--to", given["to"]))


def _export(arguments: Arguments) -> None:
    parser = _run_parser("deit-kd export")
    parser.add_argument("--format", type=str, required=True, help="timm, local-dir, transformers, onnx or torch-export")
    parser.add_argument("--to", type=str, default=None, help="folder to write; RUN/export/FORMAT unless set")
    parser.add_argument(
        "--outputs", type=str, nargs="+", default=None, help="any of cls, dist and fused; all unless set"
    )
    parser.add_argument("--opset", type=int, default=18, help="ONNX operator set, 18 to 23")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32", help="of the weights in ONNX or .pt2")
    parser.add_argument("--dynamic_size", type=bool, default=False, help="accept images of other sizes")
    if _asks_for_help(arguments):
        parse_config(arguments, parser)
    named = _first_argument(arguments, parser)
    if not path_of(named).exists():
        raise InputError(f"{named}: is not there; name the folder of a run, or one of its checkpoints")
    from deit_kd.evaluation.sources import open_source
    from deit_kd.exports import Choices
    from deit_kd.jobs.export import export_student

    source = open_source(named)
    config, others = parse_config([named, *source.recipe, *arguments[1:]], parser)
    outputs = None if others["outputs"] is None else tuple(others["outputs"])
    choices = Choices(outputs, others["opset"], others["dynamic_size"], others["precision"])
    export_student(source, config, others["format"], None if others["to"] is None else Path(others["to"]), choices)


def _bench(arguments: Arguments) -> None:
    parser = build_parser("deit-kd bench")
    parser.add_argument("--rounds", type=int, default=7, help="how often to time each part")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps in each timing")
    parser.add_argument("--photos", type=int, default=2048, help="training photos to use; a store is filled with them")
    parser.add_argument(
        "--other_compile", type=bool, default=False, help="also time the step with train.compile reversed"
    )
    parser.add_argument("--json", type=str, default=None, help="file for the numbers")
    config, others = parse_config(arguments, parser)
    check_training(config)
    from deit_kd.jobs.bench import bench

    bench(
        config,
        others["rounds"],
        others["steps"],
        others["photos"],
        others["other_compile"],
        _named_file("--json", others["json"]),
    )


def _named_file(option: str, path: str | None) -> Path | None:
    """Return the file that an option names, once it is known that it can be written."""
    if path is None:
        return None
    check_file_to_be(option, Path(path))
    return Path(path)


def _run_list_parser(program: str, runs: str) -> ArgumentParser:
    parser = ArgumentParser(prog=program, exit_on_error=False)
    parser.add_argument("runs", type=str, nargs="+", help=runs)
    return parser


def _runs_given(parser: ArgumentParser, arguments: Arguments) -> dict[str, Any]:
    try:
        given: dict[str, Any] = parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        raise InputError(f"{str(error).splitlines()[0]}; see {parser.prog} --help") from error
    for run in given["runs"]:
        check_there("runs", run, "name the folder of a run")
    return given


def _data(arguments: Arguments) -> int | None:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print("usage: deit-kd data check PHOTOS | pack PHOTOS OUT | index PHOTOS")
        return 0
    if verb not in DATA_VERBS:
        raise InputError(f"data {verb}: unknown; use one of {', '.join(DATA_VERBS)}{nearest(verb, DATA_VERBS)}")
    return DATA_VERBS[verb](arguments[1:])


def _data_check(arguments: Arguments) -> int:
    parser = build_parser("deit-kd data check")
    parser.add_argument("root", type=str, nargs="?", default=None, help="folder of the photos; data.root unless set")
    parser.add_argument("--json", type=str, default=None, help="file for the findings")
    config, others = parse_config(arguments, parser)
    json_file = _named_file("--json", others["json"])
    config = _of_folder(config, others["root"])
    from deit_kd.jobs.data import check_data, tell_taken
    from deit_kd.machine import available_cores
    from deit_kd.runs.parts import build_splits

    splits, share = build_splits(config), config.data.validation_fraction
    if splits.validation.source is splits.train.source and config.data.folds is None:
        # Without its recipe, another share would be checked than the one that is trained with.
        print(f"validation: {100 * share:g} % of each class (data.validation_fraction; --config takes a recipe's)")
    tell_taken(config, splits)
    return 0 if check_data(splits, available_cores(), json_file) else 1


def _data_pack(arguments: Arguments) -> None:
    parser = build_parser("deit-kd data pack")
    parser.add_argument("tree", type=str, help="folder of the photos")
    parser.add_argument("out", type=str, help="folder for the shards")
    parser.add_argument(
        "--splits", type=str, nargs="+", default=[], help="folders in the tree; the recipe's two unless set"
    )
    parser.add_argument(
        "--short-side",
        type=PositiveInt,
        default=None,
        help="bring the shorter side of larger photos to this many pixels",
    )
    parser.add_argument("--quality", type=PositiveInt, default=None, help="of JPEG, 1 to 100; 90 with --short-side")
    parser.add_argument("--shard-mb", type=PositiveFloat, default=256, help="photos of one shard, in MB of the tree")
    parser.add_argument("--workers", type=PositiveInt, default=None, help="threads that read and encode")
    config, others = parse_config(arguments, parser)
    photos_root(others["tree"])
    quality = others["quality"] or (90 if others["short_side"] else None)
    if quality is not None and quality > 100:
        raise InputError(f"--quality: {quality} is not a quality of JPEG; use 1 to 100")
    from deit_kd.jobs.pack import pack_tree
    from deit_kd.machine import available_cores
    from deit_kd.packing import Look

    look = Look(others["short_side"], quality)
    threads = others["workers"] or max(4, available_cores())
    pack_tree(
        config, others["tree"], Path(others["out"]), others["splits"], look, int(others["shard_mb"] * 10**6), threads
    )


def _data_index(arguments: Arguments) -> None:
    parser = build_parser("deit-kd data index")
    parser.add_argument("root", type=str, nargs="?", default=None, help="folder of the photos; data.root unless set")
    parser.add_argument("--splits", type=str, nargs="+", default=[], help="splits besides the recipe's two")
    parser.add_argument("--workers", type=PositiveInt, default=None, help="processes that read shards")
    config, others = parse_config(arguments, parser)
    config = _of_folder(config, others["root"])
    from deit_kd.jobs.index import index
    from deit_kd.machine import available_cores

    index(config, others["splits"], others["workers"] or available_cores())


def _of_folder(config: Config, root: str | None) -> Config:
    """Return the recipe for the photos in a folder, which is a tree unless it holds shards."""
    root = root or config.data.root
    top = photos_root(root)
    splits = [top / split for split in (".", config.data.train_split, config.data.validation_split)]
    name = "shards" if any(next(split.glob("*.tar"), None) for split in splits) else "folder"
    return config.model_copy(update={"data": config.data.model_copy(update={"name": name, "root": root})})


DATA_VERBS: dict[str, Callable[[Arguments], int | None]] = {
    "check": _data_check,
    "pack": _data_pack,
    "index": _data_index,
}


def _store(arguments: Arguments) -> None:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(
            "usage: deit-kd store build --config R --store DIR [--part 3/16 | --join] | check DIR --config R | info DIR"
        )
        return
    if verb not in STORE_VERBS:
        raise InputError(f"store {verb}: unknown; use one of {', '.join(STORE_VERBS)}{nearest(verb, STORE_VERBS)}")
    STORE_VERBS[verb](arguments[1:])


def _store_build(arguments: Arguments) -> None:
    parser = build_parser("deit-kd store build")
    parser.add_argument("--store", type=str, default=None, help="folder of the store; teacher.store unless set")
    parser.add_argument("--epochs", type=int, default=None, help="view epochs to store; train.epochs unless set")
    parser.add_argument("--batch_size", type=int, default=256, help="images per process and batch")
    parser.add_argument("--part", type=str, default=None, help="build only a part, such as 3/16: the third of 16")
    parser.add_argument("--join", action="store_true", help="finish a store that was built in parts")
    config, others = parse_config(arguments, parser)
    if others["join"] and others["part"] is not None:
        raise InputError(f"--join: cannot be used with --part {others['part']}; build all parts, then join them")
    if others["join"]:
        folder = others["store"] or config.teacher.store
        if folder is not None:
            check_there("teacher.store", folder, "build its parts first, with --part")
        from deit_kd.jobs.store import join

        join(config, folder)
        return
    check_training(config)
    from deit_kd.jobs.store import build

    build(config, others["store"], others["epochs"], others["batch_size"], others["part"])


def _store_check(arguments: Arguments) -> None:
    parser = build_parser("deit-kd store check")
    parser.add_argument("folder", type=str, help="folder of the store")
    parser.add_argument("--samples", type=int, default=500, help="number of views to check against the teacher")
    config, others = parse_config(arguments, parser)
    check_there("teacher.store", others["folder"], "make one with deit-kd store build")
    check_training(config)
    from deit_kd.jobs.store import check

    check(config, others["folder"], others["samples"])


def _store_info(arguments: Arguments) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise InputError(
            f"deit-kd store info: {' '.join(arguments) or 'nothing'} was given; name the folder of one store"
        )
    check_there("teacher.store", arguments[0], "make one with deit-kd store build")
    from deit_kd.jobs.store import info

    info(arguments[0])


STORE_VERBS: dict[str, Callable[[Arguments], None]] = {
    "build": _store_build,
    "check": _store_check,
    "info": _store_info,
}


def _run_parser(program: str) -> ArgumentParser:
    parser = build_parser(program)
    parser.add_argument("run", type=str, help="folder of a run; options override its recipe")
    return parser


def _with_recipe_of_run(arguments: Arguments, parser: ArgumentParser) -> tuple[Path, Arguments]:
    """Return the run's folder, which is the first argument, and the arguments with its recipe before them."""
    if _asks_for_help(arguments):
        return Path(), arguments
    folder = Path(_first_argument(arguments, parser))
    recipe = folder / "config.yaml"
    if not recipe.is_file():
        raise InputError(f"{folder}: is not a run (it has no {recipe.name}); name the folder of a run")
    return folder, [arguments[0], "--config", str(recipe), *arguments[1:]]


def _asks_for_help(arguments: Arguments) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


def _first_argument(arguments: Arguments, parser: ArgumentParser) -> str:
    if not arguments or arguments[0].startswith("-"):
        raise InputError(f"{parser.prog}: the first argument names a run; see {parser.prog} --help")
    return arguments[0]


VERBS: dict[str, tuple[str, Callable[[Arguments], int | None]]] = {
    "train": ("train a student, and its teacher first if the recipe says so", _train),
    "eval": ("score the heads of a student, separately and fused: a run or a published model", _evaluate),
    "report": ("draw one page about runs: curves, heads, calibration, attention", _report),
    "plot": ("draw the curves of a run that is still going", _plot),
    "data": ("check photos, pack them into shards, or index them (check, pack, index)", _data),
    "store": ("run a teacher once for every view, and keep its answers (build, check, info)", _store),
    "predict": ("print class and probability for images without labels", _predict),
    "export": ("export a run's student to timm, transformers, ONNX or torch.export", _export),
    "bench": ("time the training loop and its parts, with and without a teacher and a store", _bench),
}


def main(arguments: Arguments | None = None) -> int:
    """Run one verb; return the exit code.

    0; 1 where a check found something or another process is gone; 2 where the input cannot be used; 143, 130 or 75
    after SIGTERM, SIGINT or SIGUSR1.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print("usage: deit-kd VERB …\n\nverbs (deit-kd VERB --help shows their options):")
        for name, (summary, _) in VERBS.items():
            print(f"  {name:9} {summary}")
        return 0
    try:
        if verb not in VERBS:
            raise InputError(f"{verb}: unknown verb; use one of {', '.join(VERBS)}{nearest(verb, VERBS)}")
        with handlers(stop_at_once):
            return VERBS[verb][1](arguments[1:]) or 0
    except (InputError, OSError) as error:
        told = refusal(error) if isinstance(error, OSError) else error
        if told is None:
            raise
        print(f"error: {printable(str(told))}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        atexit.register(leave_signals_alone)  # a second one on the way out would change the exit code
        if str(stopped):
            print(stopped, file=sys.stderr)
        return stopped.code
    except RuntimeError as error:
        return _lost(error)


def _lost(error: RuntimeError) -> int:
    """Say that a worker or another process has died, and return the exit code; raise any other error."""
    from deit_kd.data import lost_worker
    from deit_kd.distributed import lost_process

    if (worker := lost_worker(error)) is not None:
        print(f"error: {worker}", file=sys.stderr)
        return 2
    if (process := lost_process(error)) is not None:
        print(process, file=sys.stderr)
        return process.code
    raise error
