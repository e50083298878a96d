"""What several commands share: how they read their arguments."""

from __future__ import annotations

from pathlib import Path

from deit_kd.files import check_file_to_be

Arguments = list[str]


def named_file(option: str, path: str | None) -> Path | None:
    """Return the file that an option names, once it is known that it can be written."""
    if path is None:
        return None
    check_file_to_be(option, Path(path))
    return Path(path)


def asks_for_help(arguments: Arguments) -> bool:
    """Return whether the user asks for help."""
    return any(argument in ("-h", "--help") for argument in arguments)
