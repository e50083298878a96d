"""What jsonargparse and pydantic refuse, in one plain line: key, value, reason, cure."""

from __future__ import annotations

import re

from pydantic import ValidationError

from deit_kd.config.distill import ScheduleSection, TermSection
from deit_kd.config.keys import known_keys
from deit_kd.config.peers import PeerSection
from deit_kd.config.sections import Section, TeacherMember
from deit_kd.interfaces import nearest

# Of single values: what the libraries say, and what a user reads.
_REASONS = (
    (r"Input should be greater than or equal to (\S+)", r"must be at least \1"),
    (r"Input should be greater than (\S+)", r"must be above \1"),
    (r"Input should be less than or equal to (\S+)", r"must be at most \1"),
    (r"Input should be less than (\S+)", r"must be below \1"),
    (r"(String|Value|List|Tuple) should have at least (\d+) (\w+).*", r"must have at least \2 \3"),
    (r"Input should be a (valid|finite) integer.*|Expected a int", "is not a whole number"),
    (r"Input should be a (valid|finite) number.*|Expected a float", "is not a number"),
    (r"Input should be a valid boolean.*|Expected a bool", "is neither true nor false"),
    (r"Input should be a valid string.*|Expected a str", "is not a text"),
    (r"Input should be a valid list.*|Expected a list", "is not a list; write [a, b]"),
    (r"Input should be a valid dictionary.*|Expected a dict", "is not a mapping; write {key: value}"),
    (r"Expected a tuple with (\d+) elements", r"is not a list of \1 numbers"),
    (r"Expected a tuple", "is not a list of numbers"),
    (r"Field required", "is not set"),
)
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true, false",
    "str": "a text",
    "list": "a list",
    "dict": "a mapping",
}
_LISTS: dict[str, type[Section]] = {"terms": TermSection, "peers": PeerSection, "members": TeacherMember}
_OF_SCHEDULES = [field.alias or name for name, field in ScheduleSection.model_fields.items()]
_ALIASES = {"learning_rate": "lr"}  # of the last part of a key, in other packages


def one_line(message: str) -> str:
    """Turn an error of jsonargparse into ``key: value, reason, cure``."""
    if message.startswith("Problems parsing config: "):
        where = re.sub(r'in "<unicode string>", ', "in ", " ".join(message.split(": ", 1)[1].split()))
        return f"config: is not YAML ({where}); correct the recipe file"
    if "codec can't decode" in message:
        return f"config: is not text ({message}); name a recipe file"
    if message.startswith("Unexpected config: "):
        return "config: is not a recipe, which is YAML of keys and values such as 'seed: 0'"
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    unknown = unknown or re.search(r"Option '([\w.]+)' is not accepted", message)
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if unknown and unknown[1].endswith((".yaml", ".yml")) and not unknown[1].startswith("-"):
        return f"{unknown[1]}: is not an option; a recipe is named with --config {unknown[1]}"
    if unknown or in_group:
        key = unknown[1].lstrip("-").split("=")[0] if unknown else f"{in_group[1]}.{in_group[2]}" if in_group else ""
        return f"{key}: unknown key{_nearest_key(key)}"
    key_match = re.search(r'Parser key "([\w.]+)"', message)
    value_match = re.search(r"(?:Got|Given) value: (.*)", message, re.DOTALL)
    lines = [line.strip() for line in message.splitlines() if "For further information" not in line]
    reasons = [re.sub(r"\s*\[type=.*", "", line) for line in lines[1:]] or lines
    reason = next(
        (line for line in reasons if line.startswith(("Input should", "Expected", "Value error"))), reasons[0]
    )
    subtypes = next((line for line in lines if line.startswith("Subtypes: [")), None)
    if subtypes is not None:
        reason = f"Expected one of {subtypes[len('Subtypes: [') : -1]}"
    if key_match is None:
        return reason
    given = value_match[1].partition("\n")[0] if value_match else ""
    line = _joined(key_match[1], repr(given) if value_match else "", _in_words(reason))
    if given.startswith("{") and (spaced := re.sub(r":(?=[^\s:])", ": ", given)) != given:
        line += f"; a space after a colon is missing: {spaced}"
    return line


def first_refusal(error: ValidationError) -> str:
    """Turn the first error of pydantic into ``key: value, reason, cure``."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("number", "schedule")]
    key, reason = ".".join(path), first["msg"].removeprefix("Value error, ")
    if not key:
        return reason
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest_field(path)}"
    if first["type"] == "missing":
        return f"{key}: is not set; name it"
    return _joined(key, repr(first["input"]), _in_words(reason))


def _joined(key: str, value: str, reason: str) -> str:
    return f"{key}: {value} {reason}" if reason.startswith(("is ", "must ", "does ")) else f"{key}: {value}: {reason}"


def _in_words(reason: str) -> str:
    """Return what a library says of a value in words that need no Python."""
    reason = re.sub(r"\.? ?Got value: .*", "", reason, flags=re.DOTALL).removeprefix("Value error, ")
    reason = re.sub(r"<class '([\w.]+)'>", r"\1", reason).replace("typing.", "").replace("NoneType", "null")
    if reason.startswith(("Expected a Literal[", "Input should be '")):
        return f"is unknown; use one of {', '.join(_choices(reason))}"
    if reason.startswith("Expected one of "):
        parts = re.findall(r"Literal\[.*?\]|[^,\s][^,]*", reason.removeprefix("Expected one of "))
        *others, last = [choice for part in parts for choice in _choices(part)]
        return f"does not fit; use {', '.join(others)} or {last}"
    for pattern, words in _REASONS:
        if (match := re.fullmatch(pattern, reason)) is not None:
            return match.expand(words)
    return reason


def _choices(part: str) -> list[str]:
    """Return in words what a type takes: the members of a Literal, or what any other is called."""
    members = re.findall(r"'([^']*)'|\b(\d+)\b", part)
    return [text or number for text, number in members] or [_KINDS.get(re.sub(r"\[.*", "", part), part)]


def _nearest_field(path: list[str]) -> str:
    """Return the nearest known keys of one that pydantic does not know, perhaps within a list of sections."""
    section = next((section for name, section in _LISTS.items() if name in path), None)
    if section is None:
        return _nearest_key(".".join(path))
    return nearest(path[-1], [*section.model_fields, *_OF_SCHEDULES]) or f" (known: {', '.join(section.model_fields)})"


def _nearest_key(key: str) -> str:
    if key == "data.in_memory":  # of an earlier version; files may still hold it
        return " (say data.cache memory)"
    section, _, last = key.rpartition(".")
    keys, last = known_keys(), _ALIASES.get(last, last)
    meant = f"{section}.{last}"
    if meant != key and meant in keys:
        return f" (nearest: {meant})"
    elsewhere = [known for known in keys if known.rsplit(".", 1)[-1] == last and known != key]
    if elsewhere:
        shallow = sorted(elsewhere, key=lambda known: known.count("."))
        return nearest(key, elsewhere) or f" (nearest: {', '.join(shallow[:3])})"
    return nearest(key, keys) or nearest(last, {known.rsplit(".", 1)[-1] for known in keys})
