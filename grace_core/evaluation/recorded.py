"""Recorded items and responses, JSON Lines, so that anyone can score a run again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_core.errors import GraceError
from grace_core.evaluation.declaration import Benchmark, identified
from grace_core.evaluation.items import Gold, Prediction
from grace_core.evaluation.loading.cells import EXPECTED, read_cell

_SHOWN = 20
"""Problems of a file that are listed; a file of another kind has one in every line."""


@dataclass(frozen=True)
class RecordedItems:
    """Golds of a file's rows, in order."""

    golds: tuple[Gold, ...]
    aside: frozenset[str]
    """Ids of rows that the benchmark leaves out."""


def read_items(benchmark: Benchmark, file: Path) -> RecordedItems:
    """Golds from rows with the columns that scoring needs; question and pictures may be absent.

    Raises GraceError naming file and line of every row that is malformed, and for a file without
    rows.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    problems = _Problems(file, f"unusable {benchmark.title} items")
    for number, row in _objects(file, problems):
        problem = _misfit(benchmark, row)
        if problem is None:
            rows.append((number, row))
        else:
            problems.add(number, problem)
    problems.raise_if_any()
    golds: list[Gold] = []
    aside: set[str] = set()
    named = identified(benchmark, [row for _, row in rows])
    for (number, row), (item_id, _) in zip(rows, named, strict=True):
        try:
            golds.append(benchmark.gold(row, item_id))
        except ValueError as error:
            problems.add(number, str(error))
        if not benchmark.keep(row):
            aside.add(item_id)
    problems.raise_if_any()
    if len(golds) == len(aside):
        raise GraceError(f"{file} holds no item of {benchmark.title}; name the file of its rows")
    return RecordedItems(tuple(golds), frozenset(aside))


def read_responses(file: Path) -> list[Prediction]:
    """Lines of `{"id", "response"}`, with `"error"` where an item ended in one.

    A response of null is no response: its item is missing. An empty one is an answer that says
    nothing. Raises GraceError naming file and line of every one that is malformed or has the id of
    an earlier one.
    """
    predictions: list[Prediction] = []
    lines: dict[str, int] = {}
    problems = _Problems(file, "unusable responses")
    for number, line in _objects(file, problems):
        name, response, error = line.get("id"), line.get("response"), line.get("error")
        if not isinstance(name, str | int) or isinstance(name, bool):
            problems.add(number, f"id {name!r} is neither text nor a whole number")
        elif not isinstance(response, str | None) or "response" not in line:
            problems.add(number, f"response {response!r} is no text")
        elif not isinstance(error, str | None):
            problems.add(number, f"error {error!r} is no text")
        elif str(name) in lines:
            problems.add(
                number,
                f"id {name!r} stands in line {lines[str(name)]} already; the second row of a "
                f"repeated id is called '{name}#2'",
            )
        else:
            lines[str(name)] = number
            if error is not None or response is not None:
                predictions.append(Prediction(str(name), response or "", error))
    problems.raise_if_any()
    return predictions


class _Problems:
    """What is wrong with a file, line by line."""

    def __init__(self, file: Path, title: str) -> None:
        self._file, self._title = file, title
        self._found: list[str] = []

    def add(self, number: int, problem: str) -> None:
        self._found.append(f"{self._file}:{number}: {problem}")

    def raise_if_any(self) -> None:
        if not self._found:
            return
        shown = self._found[:_SHOWN]
        if len(self._found) > _SHOWN:
            shown.append(f"... and {len(self._found) - _SHOWN} more")
        raise GraceError("\n".join([f"{self._title}; mend or remove them:", *shown]))


def _objects(file: Path, problems: _Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSON Lines file; blank lines are skipped."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    problems.add(number, f"not JSON: {error}")
                    continue
                if isinstance(value, dict):
                    yield number, value
                else:
                    problems.add(number, "not a JSON object")
    except OSError as error:
        raise GraceError(f"{file} cannot be read ({error.strerror}); mend its path") from error
    except UnicodeDecodeError as error:
        raise GraceError(f"{file} is no UTF-8 text ({error.reason}); convert it") from error


def _misfit(benchmark: Benchmark, row: dict[str, Any]) -> str | None:
    """What is wrong with the columns that score; they are brought into one form, in place."""
    for name, column in benchmark.columns.items():
        if not column.scores:
            continue
        if name not in row and not column.nullable:
            return f"column {name!r}, which should hold {EXPECTED[column.type]}, is missing"
        try:
            row[name] = read_cell(row.get(name), column)
        except ValueError as error:
            return f"column {name!r} {error}"
    return None
