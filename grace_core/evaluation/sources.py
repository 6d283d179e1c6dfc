"""Rows of a benchmark from a local folder: `items.jsonl` and the pictures it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grace_core.errors import GraceError
from grace_core.evaluation.declaration import Benchmark, Column, identified
from grace_core.evaluation.items import Item, Picture

ITEMS_FILE = "items.jsonl"


def load_items(benchmark: Benchmark, folder: Path) -> list[Item]:
    """Read the items of a benchmark, pictures looked up but not decoded.

    Raises GraceError naming file and line of every item that is malformed, occurs twice, or whose
    picture is missing or outside the folder.
    """
    file = folder / ITEMS_FILE
    if not file.is_file():
        raise GraceError(f"{file} does not exist; make the benchmark first, or mend its path")
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    problems: list[str] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_read_row(line, benchmark, folder))
            lines.append(number)
        except ValueError as error:
            problems.append(f"{file}:{number}: {error}")
    items: list[Item] = []
    for number, (item_id, row) in zip(lines, identified(benchmark, rows), strict=True):
        try:
            items.append(benchmark.item(row, item_id))
        except ValueError as error:
            problems.append(f"{file}:{number}: {error}")
    if problems:
        raise GraceError("\n".join(["unusable benchmark items; mend or remove them:", *problems]))
    if not items:
        raise GraceError(f"{file} holds no items")
    return items


def _read_row(line: str, benchmark: Benchmark, folder: Path) -> dict[str, Any]:
    """Raises ValueError saying what is wrong with the line."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for name, column in benchmark.columns.items():
        value = row.get(name)
        if value is None:
            if not column.nullable:
                raise ValueError(f"{name}: missing")
        elif column.type == "picture":
            row[name] = _picture(value, folder)
        elif not _fits(value, column):
            raise ValueError(f"{name}: {value!r} is no {column.type}")
    return row


def _fits(value: object, column: Column) -> bool:
    return isinstance(value, {"text": str, "record": dict}[column.type])


def _picture(value: object, folder: Path) -> Picture:
    if not isinstance(value, str):
        raise ValueError(f"picture {value!r} is no path")
    file = folder / value
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"picture {value} lies outside the benchmark's folder")
    if not file.is_file():
        raise ValueError(f"picture {value} does not exist")
    return Picture(file)
