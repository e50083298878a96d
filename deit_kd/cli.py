"""The command line: parse, build the config, call one job."""

from __future__ import annotations

import sys
from collections.abc import Callable

from deit_kd.config import parse_config
from deit_kd.interfaces import InputError, nearest


def _train(arguments: list[str]) -> None:
    from deit_kd.jobs.train import train

    train(parse_config(arguments)[0])


VERBS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "train": ("train a student, its teacher first where the recipe says so", _train),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; return the exit code: 0, or 2 where the input cannot be used."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print("usage: deit-kd VERB …\n\nverbs (deit-kd VERB --help says more):")
        for name, (summary, _) in VERBS.items():
            print(f"  {name:9} {summary}")
        return 0
    try:
        if verb not in VERBS:
            raise InputError(f"{verb}: unknown verb; use one of {', '.join(VERBS)}{nearest(verb, VERBS)}")
        VERBS[verb][1](arguments[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
