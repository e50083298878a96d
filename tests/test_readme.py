"""What README.md and docs/ promise: examples run, commands are taken as they stand, links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from deit_kd.cli import main
from deit_kd.interfaces import InputError
from tests.helpers import REPOSITORY, Finished, write_photos

README = REPOSITORY / "README.md"
PAGES = [str(page.relative_to(REPOSITORY)) for page in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")]]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = ("bash", "bash no-test", "python", "python no-test", "yaml", "text")
SCRIPTS = ("scripts/check", "scripts/fuzz", "scripts/soak")
PROGRAMS = ("deit-kd", "python", "torchrun", "sbatch", "pip", "pytest", "tensorboard", *SCRIPTS)
NOWHERE = "no-photos-here"
UNKNOWN = "no-such-option"
# What a command says that is right in everything but what is not there: the files that it names, or an extra library.
STOPPED = re.compile(
    r"error: (.*(is not a folder|is not there|is not a file); |--to: .* already exists; |--format: \w+ needs "
    r"|data\.name: hf needs |data\.root: \w+ cannot be loaded as )"
)

pytestmark = pytest.mark.skipif(not README.is_file(), reason="there is no README.md")


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the language and the text of each fenced block."""
    return BLOCK.findall((REPOSITORY / page).read_text())


def commands(page: str, folder: Path) -> Iterator[list[str]]:
    """Yield the commands of a page's bash blocks as bash takes them apart; of those that differ in numbers, one."""
    record, seen = folder / "record", set[str]()
    for program in PROGRAMS:
        stand_in = folder / program
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text(f"#!/bin/bash\nprintf '%s\\x1f' {program} \"$@\" >> {record}\nprintf '\\x1e' >> {record}\n")
        stand_in.chmod(0o755)
    for language, block in blocks(page):
        if language != "bash":
            continue
        record.write_text("")
        environment = {"PATH": f"{folder}:/usr/bin:/bin"}
        done = subprocess.run(["bash", "-euc", block], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{page}:\n{block}{done.stderr}"
        for command in record.read_text().split("\x1e")[:-1]:
            if (shape := re.sub(r"\d+", "0", command)) not in seen:
                seen.add(shape)
                yield command.split("\x1f")[:-1]


def what_runs(command: list[str]) -> tuple[str, list[str]]:
    """Return the program of ours that a command starts, and its arguments."""
    program, arguments = command[0], command[1:]
    if program == "torchrun":
        given = get_args_parser().parse_args(arguments)
        program, arguments = given.training_script, given.training_script_args
    elif program in ("python", "sbatch"):
        program, arguments = arguments[0], arguments[1:]
        assert (REPOSITORY / program).is_file(), " ".join(command)
    return ("deit-kd", ["train", *arguments]) if program == "train.py" else (program, arguments)


def astray(arguments: list[str]) -> list[str]:
    """Return the arguments with photos or a first run that are not there, where it would work otherwise."""
    verb = arguments[0]
    two = (["store", "build"], ["store", "check"], ["data", "confusions"])
    if verb in ("train", "eval", "bench") or arguments[:2] in two:
        return [*arguments, "--data.name", "folder", "--data.root", NOWHERE]
    return [verb, NOWHERE, *arguments[1:]] if verb in ("report", "plot") else arguments


def refusal(program: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a program says to `arguments` and to one more, which it does not know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments, f"--{UNKNOWN}", "1"])
        patch.syspath_prepend(REPOSITORY / Path(program).parent)  # as Python does for a script
        try:
            runpy.run_path(str(REPOSITORY / program), run_name="__main__")
        except (InputError, SystemExit) as end:
            return f"{end}\n{capsys.readouterr().err}"
    return "it has run"


@pytest.mark.parametrize("page", ["README.md", "docs/guide/distillation.md", "docs/guide/views.md"])
def test_the_example_of_an_own_loop_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (REPOSITORY / page).read_text().partition("In your own loop")[2]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert example is not None, f"{page} has no python block under 'In your own loop'"
    monkeypatch.chdir(tmp_path)
    exec(compile(example[1], page, "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", PAGES)
def test_a_command_in_the_docs_lacks_nothing_but_the_files_that_it_names(
    page: str, tmp_path: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.folder, tmp_path / "RUN")
    for taken in ("onnx", "timm", "timm-best", "transformers"):
        (tmp_path / "RUN" / "export" / taken).mkdir(parents=True)
    for taken in ("quantized-8", "quantized-4", "trained-4"):
        (tmp_path / "RUN" / taken).mkdir()
        (tmp_path / "RUN" / taken / "heads.json").touch()
    write_photos(tmp_path / "halves" / "PHOTOS", {"": 4})  # benchmarks/finetune.py halves them before it reads options
    for folder in (tmp_path, tmp_path / "halves"):
        for name in ("configs", "benchmarks"):
            (folder / name).symlink_to(REPOSITORY / name)
    for command in commands(page, tmp_path / "shell"):
        program, arguments = what_runs(command)
        told = f"{page}: {' '.join(command)}"
        if program == "deit-kd":
            monkeypatch.chdir(tmp_path)
            capsys.readouterr()
            main(astray(arguments))
            said = capsys.readouterr().err
            assert STOPPED.match(said), f"{told}\n{said}"
        elif program.startswith(("benchmarks/", "scripts/f", "scripts/s")):
            monkeypatch.chdir(tmp_path / "halves")
            said = refusal(program, arguments, capsys)
            assert re.search(f"{UNKNOWN}: unknown key|unrecognized arguments: --{UNKNOWN} 1", said), f"{told}\n{said}"


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_in_a_block_that_is_not_bash(page: str) -> None:
    for language, block in blocks(page):
        assert language in LANGUAGES, f"{page}: a block of {language!r}"
        if not language.startswith("bash"):
            assert not re.search(r"^(deit-kd|torchrun|python) ", block, re.MULTILINE), f"{page}:\n{block}"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_in_the_docs_lead_somewhere(page: str) -> None:
    text = (REPOSITORY / page).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", text):
        name, _, anchor = link.partition("#")
        target = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings], link
    for path in re.findall(r"\b(?:configs|benchmarks|docs|scripts)/[\w/.-]*\w", text):
        assert (REPOSITORY / path).exists(), f"{page}: {path}"


def test_the_map_names_every_room() -> None:
    section = README.read_text().partition("\n## Map\n")[2]
    rooms = {f"deit_kd/{path.parent.name}/" for path in (REPOSITORY / "deit_kd").glob("*/__init__.py")}
    named = set(re.findall(r"`(deit_kd/[\w/.]+)`", section))
    assert rooms - named == set()
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()


def test_the_map_lists_every_file_with_the_phrase_that_it_begins_with() -> None:
    files = sorted((REPOSITORY / "deit_kd").rglob("*.py"))
    assert [str(file) for file in files if not file.read_text().startswith('"""')] == []
    found = subprocess.run([REPOSITORY / "scripts" / "map", "--check"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
