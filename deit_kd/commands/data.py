"""``deit-kd data``: commands about photos and their classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse.typing import PositiveFloat, PositiveInt

from deit_kd.commands.shared import Arguments, asks_for_help, first_argument, named_file, named_folder
from deit_kd.config import Config, build_parser, parse_config, read_options
from deit_kd.interfaces import InputError, nearest
from deit_kd.places import check_source, photos_root


def data(arguments: Arguments) -> int | None:
    """Check, pack or index photos, or find the classes that a network confuses."""
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print("usage: deit-kd data check PHOTOS | pack PHOTOS OUT | index PHOTOS | confusions RUN")
        return 0
    if verb not in DATA_VERBS:
        raise InputError(f"data {verb}: unknown; use one of {', '.join(DATA_VERBS)}{nearest(verb, DATA_VERBS)}")
    return DATA_VERBS[verb](arguments[1:])


def _data_check(arguments: Arguments) -> int:
    parser = build_parser("deit-kd data check")
    parser.add_argument("root", type=str, nargs="?", default=None, help="folder of the photos; data.root unless set")
    parser.add_argument("--json", type=str, default=None, help="file for the findings")
    config, others = parse_config(arguments, parser)
    json_file = named_file("--json", others["json"])
    config = _of_folder(config, others["root"])
    from deit_kd.jobs.data import check_data, tell_taken
    from deit_kd.machine import available_cores
    from deit_kd.runs.photos import build_splits

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
    if config.data.name not in ("folder", "shards"):
        raise InputError(f"data index: {config.data.name} needs no index; name a tree or shards")
    from deit_kd.jobs.index import index
    from deit_kd.machine import available_cores

    index(config, others["splits"], others["workers"] or available_cores())


def _data_confusions(arguments: Arguments) -> None:
    parser = build_parser("deit-kd data confusions")
    parser.add_argument("source", type=str, help="a run, RUN:teacher, an exported folder, a file or a timm model")
    parser.add_argument("--split", type=str, default="validation", help="train, validation or a folder in data.root")
    parser.add_argument(
        "--clusters", type=PositiveInt, default=None, help="how many; the root of the number of classes unless set"
    )
    parser.add_argument("--to", type=str, default=None, help="folder for the files; RUN/confusions unless set")
    if asks_for_help(arguments):
        parse_config(arguments, parser)
    named = first_argument(arguments, parser)
    check_source(named)
    where = read_options(arguments, parser)["data"]
    if where["root"] is not None and where["name"] == "folder":
        photos_root(where["root"])
    from deit_kd.evaluation.sources import open_source
    from deit_kd.jobs.confusions import tell_confusions

    source = open_source(named)
    config, others = parse_config([named, *source.recipe, *arguments[1:]], parser)
    folder = named_folder("--to", others["to"])
    tell_confusions(source, config, others["split"], others["clusters"], folder)


def _of_folder(config: Config, root: str | None) -> Config:
    """Return the recipe for the photos in a folder, a tree or shards unless the recipe names another set."""
    root, name = root or config.data.root, config.data.name
    if name in ("folder", "shards"):
        top = photos_root(root)
        splits = [top / split for split in (".", config.data.train_split, config.data.validation_split)]
        name = "shards" if any(next(split.glob("*.tar"), None) for split in splits) else "folder"
    return config.with_keys(data={"name": name, "root": root})


DATA_VERBS: dict[str, Callable[[Arguments], int | None]] = {
    "check": _data_check,
    "pack": _data_pack,
    "index": _data_index,
    "confusions": _data_confusions,
}
