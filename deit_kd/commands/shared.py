"""What several commands share: how they read their arguments."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from deit_kd.files import check_file_to_be, check_writable
from deit_kd.interfaces import InputError

Arguments = list[str]


def named_file(option: str, path: str | None) -> Path | None:
    """Return the file that an option names, once it is known that it can be written."""
    if path is None:
        return None
    check_file_to_be(option, Path(path))
    return Path(path)


def named_folder(option: str, path: str | None) -> Path | None:
    """Return the folder that an option names, once it is known that it can be written."""
    if path is None:
        return None
    check_writable(option, Path(path))
    return Path(path)


def asks_for_help(arguments: Arguments) -> bool:
    """Return whether the user asks for help."""
    return any(argument in ("-h", "--help") for argument in arguments)


def first_argument(arguments: Arguments, parser: ArgumentParser) -> str:
    """Return what the first argument names; an option or nothing is refused."""
    if not arguments or arguments[0].startswith("-"):
        raise InputError(f"{parser.prog}: the first argument names a run; see {parser.prog} --help")
    return arguments[0]
