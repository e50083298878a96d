"""The one way from YAML and dotted overrides to a checked recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_loader
from pydantic import (
    ValidationError,
)
from pydantic.fields import FieldInfo

from deit_kd.config.recipe import Config
from deit_kd.config.refusals import first_refusal, one_line
from deit_kd.config.sections import Section
from deit_kd.config.shipped import RECIPES, recipe_file
from deit_kd.interfaces import InputError

DEEPEST = 64  # sections and lists of a recipe within each other
MOST_VALUES = 100_000  # of a recipe, each as often as aliases repeat it


def build_parser(program: str) -> ArgumentParser:
    """Return a parser of ``--config FILE`` and every key of `Config` as a dotted option.

    The parser knows single values, lists and dicts, and never a class: if it did, it would import the module of
    any ``class_path`` that a recipe names.
    """
    parser = ArgumentParser(
        prog=program, exit_on_error=False, allow_abbrev=False, description=Config.__doc__, parser_mode="recipe"
    )
    parser.add_argument(
        "--config", action="config", help=f"recipe file, or one of {', '.join(RECIPES)}; later options override it"
    )
    for path, field, value in _keys_of(Config()):
        # What depends on another key is resolved once that is known.
        default = field.get_default() if field.validate_default else value
        plain = _plain(field.annotation)
        kind = Annotated[(plain, *field.metadata)] if field.metadata and plain == field.annotation else plain
        parser.add_argument(f"--{path}", type=kind, default=default, help=field.description)
    return parser


def _plain(annotation: Any) -> Any:
    """Return the type of a key as the parser knows it; what is inside a dict or a list, the schema checks."""
    if get_origin(annotation) in (dict, list):
        return get_origin(annotation)
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return dict
    if get_origin(annotation) in (Union, UnionType):
        return Union[tuple(_plain(part) for part in get_args(annotation))]  # noqa: UP007 - of parts that are computed
    return annotation


def _keys_of(section: Section, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """Yield the path, the field and the default of every key that is not itself a section."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _keys_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name, field, value


def as_options(section: Section, prefix: str) -> list[str]:
    """Return every key of a section with its value, as they are typed on a command line."""
    options = []
    for path, _, value in _keys_of(section, prefix):
        text = value if isinstance(value, str) else json.dumps(value, default=lambda term: term.model_dump(mode="json"))
        options += [f"--{path}", text]
    return options


def load_recipe(text: str) -> Any:
    """Return the YAML of `text`, once it is known to be plain, shallow and no larger than it looks.

    Raises:
        InputError: it is nested too deeply, its aliases stand for too much, or an integer has too many digits.
        YAMLError: it is not YAML, or names an object.
    """
    _check_size(text)
    try:
        return _in_todays_keys(_load_yaml(text))
    except ValueError as error:
        raise InputError(
            f"config: holds a value that cannot be read ({str(error).splitlines()[0]}); correct it"
        ) from error


def _in_todays_keys(tree: Any) -> Any:
    """Return a recipe, perhaps of an earlier version, in the keys of this one."""
    section = tree.get("data") if isinstance(tree, dict) else None
    if isinstance(section, dict) and isinstance(kept := section.get("in_memory"), bool):
        renamed = {"cache": "memory" if kept else "none"}
        tree["data"] = renamed | {name: value for name, value in section.items() if name != "in_memory"}
    return tree


def _in_todays_options(arguments: list[str]) -> list[str]:
    """Return options, perhaps for an earlier version, in the keys of this one, with recipes by their files."""
    old, cache = "--data.in_memory", {"true": "memory", "false": "none"}
    apart = (f"{old}=", "--config=")
    whole = [part for one in arguments for part in (one.split("=", 1) if one.startswith(apart) else [one])]
    renamed = whole[:1]
    for before, one in pairwise(whole):
        if before == old and one.lower() in cache:
            renamed[-1:] = ["--data.cache", cache[one.lower()]]
        elif before == "--config":
            renamed.append(str(recipe_file(one)))
        else:
            renamed.append(one)
    return renamed


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the keys of a recipe file as written, unchecked.

    Raises:
        InputError: it is missing, or is not a recipe.
    """
    try:
        tree = load_recipe(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); name a run of deit_kd") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: is not a recipe, which is YAML of keys and values; name a run of deit_kd")
    return tree


def recorded_recipe(path: Path) -> Config:
    """Return the recipe that a run keeps, checked.

    Raises:
        InputError: it cannot be read, or this version refuses it.
    """
    try:
        return Config.model_validate(read_recipe(path))
    except ValidationError as error:
        raise InputError(f"{path}: {first_refusal(error)}; name a run of this version of deit_kd") from error


def in_todays_values(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a recorded recipe as this version records them, or as they are if it no longer takes them."""
    try:
        return Config.model_validate(tree).model_dump(mode="json")
    except ValidationError:
        return tree


def _check_size(text: str) -> None:
    """Refuse a text that would fill the stack or the memory; the parser's events show it before anything is built."""
    sizes: dict[str, int] = {}
    within: list[tuple[str | None, int]] = [(None, 0)]  # anchor and values so far, of each collection that is open
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        anchor, size = getattr(event, "anchor", None), 0
        if isinstance(event, yaml.CollectionStartEvent):
            within.append((anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = within.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        elif isinstance(event, yaml.AliasEvent):
            if anchor in [opened for opened, _ in within]:
                raise InputError(f"config: the alias *{anchor} contains itself; write the value out")
            size = sizes.get(str(anchor), 0)
        if anchor is not None and size:
            sizes[anchor] = size
        within[-1] = (within[-1][0], within[-1][1] + size)
        if len(within) > DEEPEST or within[-1][1] > MOST_VALUES:
            raise InputError(
                f"config: is nested more than {DEEPEST} deep or holds more than {MOST_VALUES} values, aliases "
                "included; write a plain recipe"
            )


_load_yaml = get_loader("yaml")
set_loader("recipe", load_recipe, (yaml.YAMLError,))


def read_options(arguments: list[str], parser: ArgumentParser) -> dict[str, Any]:
    """Return the options of a command line, each checked by itself.

    Raises:
        InputError: an unknown key, a wrong type or range, a recipe that is not there.
    """
    try:
        todays = _in_todays_options(arguments)
        options: dict[str, Any] = parser.parse_args(todays).as_dict()
        _read_single_values(todays, options)
    except (ArgumentError, ValueError) as error:
        line = one_line(str(error))
        more = f"; see {parser.prog} --help" if line.startswith("the following arguments are required") else ""
        raise InputError(line + more) from error
    return options


def _read_single_values(arguments: list[str], options: dict[str, Any]) -> None:
    """Read ``--student.args.embed_dim 48`` as YAML, as ``--student.args`` itself is: the parser leaves it a text."""
    for option, value in pairwise([*(part for one in arguments for part in _apart(one)), ""]):
        *path, last = option.removeprefix("--").split(".")
        if ".".join(path) not in _dicts():
            continue
        within = options
        for name in path:
            within = within[name]
        if within.get(last) == value:
            within[last] = load_recipe(value)


def _apart(option: str) -> list[str]:
    return option.split("=", 1) if option.startswith("--") else [option]


@cache
def _dicts() -> frozenset[str]:
    """Return the keys whose values are dicts."""
    return frozenset(path for path, field, _ in _keys_of(Config()) if _plain(field.annotation) is dict)


def parse_config(arguments: list[str], parser: ArgumentParser | None = None) -> tuple[Config, dict[str, Any]]:
    """Return the checked config of a command line, and whatever else the parser was told to read.

    Raises:
        InputError: what `read_options` refuses, or options that exclude each other.
    """
    values = read_options(arguments, parser or build_parser("deit-kd train"))
    files = values.pop("config") or []
    others = {key: values.pop(key) for key in list(values) if key not in Config.model_fields}
    if files and values["recipe"] == Config.model_fields["recipe"].default:
        values["recipe"] = Path(str(files[-1])).stem
    try:
        return Config.model_validate(values), others
    except ValidationError as error:
        raise InputError(first_refusal(error)) from error
