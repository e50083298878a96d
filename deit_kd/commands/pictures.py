"""``deit-kd report`` and ``plot``: commands that draw runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from deit_kd.commands.shared import Arguments, named_file, named_folder
from deit_kd.interfaces import InputError
from deit_kd.places import check_there


def report(arguments: Arguments) -> None:
    """Draw one page about runs."""
    parser = _run_list_parser("deit-kd report", "folders of finished runs")
    parser.add_argument("--to", type=str, default=None, help="folder for the page; RUN/report unless set")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:1")
    given = _runs_given(parser, arguments)
    from deit_kd.jobs.report import report

    report([Path(run) for run in given["runs"]], named_folder("--to", given["to"]), given["device"])


def plot(arguments: Arguments) -> None:
    """Draw the curves of runs."""
    parser = _run_list_parser("deit-kd plot", "folders of runs, finished or not")
    parser.add_argument("--to", type=str, default=None, help="PNG to write; RUN/curves.png unless set")
    given = _runs_given(parser, arguments)
    file = named_file("--to", given["to"])
    if file is not None and file.suffix.lower() != ".png":
        raise InputError(f"--to: {file} would hold PNG; name a file that ends in .png")
    from deit_kd.jobs.plot import plot

    plot([Path(run) for run in given["runs"]], file)


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
