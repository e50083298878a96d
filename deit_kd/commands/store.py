"""``deit-kd store``: commands about label stores."""

from __future__ import annotations

from collections.abc import Callable

from deit_kd.commands.shared import Arguments, asks_for_help
from deit_kd.config import Config, build_parser, parse_config
from deit_kd.interfaces import InputError, nearest
from deit_kd.places import check_there, check_training


def store(arguments: Arguments) -> None:
    """Build, check or describe a label store."""
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
        from deit_kd.jobs.store_build import join

        join(config, folder)
        return
    _check_asking(config)
    from deit_kd.jobs.store_build import build

    build(config, others["store"], others["epochs"], others["batch_size"], others["part"])


def _store_check(arguments: Arguments) -> None:
    parser = build_parser("deit-kd store check")
    parser.add_argument("folder", type=str, help="folder of the store")
    parser.add_argument("--samples", type=int, default=500, help="number of views to check against the teacher")
    config, others = parse_config(arguments, parser)
    check_there("teacher.store", others["folder"], "make one with deit-kd store build")
    _check_asking(config)
    from deit_kd.jobs.store import check

    check(config, others["folder"], others["samples"])


def _store_info(arguments: Arguments) -> None:
    if asks_for_help(arguments):
        print("usage: deit-kd store info DIR\n\nsay what a store holds, what it depends on, and what may use it")
        return
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise InputError(
            f"deit-kd store info: {' '.join(arguments) or 'nothing'} was given; name the folder of one store"
        )
    check_there("teacher.store", arguments[0], "make one with deit-kd store build")
    from deit_kd.jobs.store import info

    info(arguments[0])


def _check_asking(config: Config) -> None:
    """Raise an InputError if what is needed to ask the teacher itself is missing; its store need not be there."""
    check_training(config.with_keys(teacher={"store": None, "store_mode": "read"}))


STORE_VERBS: dict[str, Callable[[Arguments], None]] = {
    "build": _store_build,
    "check": _store_check,
    "info": _store_info,
}
