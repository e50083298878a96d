"""The results as JSON, and as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deit_kd.files import write_atomically, write_json
from on_gpu.timing import Row

JSON, MARKDOWN = "gpu.json", "gpu.md"


def write(output: Path, found: Mapping[str, Any]) -> None:
    """Write what was found so far to `output`."""
    write_json(output / JSON, found)
    write_atomically(output / MARKDOWN, markdown(found).encode())


def markdown(found: Mapping[str, Any]) -> str:
    """Return the whole page."""
    parts = [f"# {found['title']}", found["note"]]
    for section in found["sections"].values():
        parts += [f"## {section['title']}", *_tables(section["rows"])]
        parts += [f"- {name}: {why}" for name, why in section.get("failed", {}).items()]
        if section.get("left_out"):
            parts.append(f"No time was left for: {'; '.join(section['left_out'])}.")
    parts += ["## What loses most", *(f"{place}. {text}" for place, text in enumerate(found["slowest"], 1))]
    return "\n\n".join(parts) + "\n"


def _tables(rows: list[Row]) -> Iterable[str]:
    """Yield the table of `rows`, then one for each of their cells that holds rows itself."""
    if rows:
        yield table([{name: value for name, value in row.items() if not isinstance(value, list)} for row in rows])
    for row in rows:
        for name, value in row.items():
            if isinstance(value, list) and value:
                of_what = ", ".join(str(cell) for cell in list(row.values())[:3])
                yield f"{of_what}: {name}"
                yield table(value)


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table; a column is there if any row has it."""
    columns = sorted(dict.fromkeys(name for row in rows for name in row), key=lambda name: name == "failed")
    lines = [columns, ["---"] * len(columns), *([_text(row.get(name)) for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
    return str(value).replace("|", "\\|")
