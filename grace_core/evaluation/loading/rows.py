"""From files to items: every row read, checked, identified and turned into question and gold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from grace_core.errors import GraceError
from grace_core.evaluation.declaration import Benchmark, Column, identified
from grace_core.evaluation.items import Item, Picture
from grace_core.evaluation.loading.cells import (
    EXPECTED,
    AsFound,
    PictureStore,
    Reference,
    read_cell,
    read_pictures,
)
from grace_core.evaluation.loading.place import Place
from grace_core.evaluation.loading.tables import RawRow, read_rows
from grace_core.evaluation.prompts import LLAVA, PromptStyle

_SHOWN = 10
"""Unusable rows that are told of before reading ends."""

_PICTURES = ("picture", "pictures")
_REMEDY = (
    "is this the benchmark's data set? `grace benchmark list --json` tells its columns; set "
    "`repository`, `config` and `split`, or `path`"
)


@dataclass
class _Draft:
    """A kept row, whose references to other rows' pictures may be open."""

    where: str
    item_id: str
    values: dict[str, Any]

    def references(self) -> Iterator[Reference]:
        for value in self.values.values():
            yield from (
                part
                for part in (value if isinstance(value, list) else [value])
                if isinstance(part, Reference)
            )


def load_items(
    benchmark: Benchmark,
    place: Place,
    *,
    limit: int | None = None,
    style: PromptStyle = LLAVA,
    store: PictureStore | None = None,
) -> list[Item]:
    """The items of a benchmark in the order of its rows; no picture is decoded.

    Args:
        limit: so many items, from the first; None: all.
        store: where pictures go; by default they stay as they are, in memory where no file of
            their own holds them.

    Raises:
        GraceError: a column is missing or of another type, a row is unusable, a picture is missing
            or outside of its root. Names file, row and column, and all such rows up to ten.
    """
    reader = _Reader(benchmark, place, store or AsFound())
    drafts = reader.drafts(limit)
    items: list[Item] = []
    for draft in drafts:
        try:
            row = {name: reader.resolved(value) for name, value in draft.values.items()}
            items.append(benchmark.item(row, draft.item_id, style))
        except ValueError as error:
            reader.note(f"{draft.where}: {error}")
    reader.raise_problems()
    if not items:
        raise GraceError(f"{place.description} holds no items of {benchmark.title}; {_REMEDY}")
    return items


class _Reader:
    """One pass over the files of a benchmark."""

    def __init__(self, benchmark: Benchmark, place: Place, store: PictureStore) -> None:
        self.benchmark, self.place, self.store = benchmark, place, store
        self.problems: list[str] = []
        self.pictures: dict[str, Picture] = {}
        """By the id of the row that holds them; of picture tables by their own."""

        self._names = {
            name: (name, *column.otherwise) for name, column in benchmark.columns.items()
        }
        self._wanted = set(chain.from_iterable(self._names.values()))
        self._seen: set[str] = set()
        self._where = ""

    def drafts(self, limit: int | None) -> list[_Draft]:
        """The kept rows, up to `limit`, and every picture that they refer to."""
        self._read_picture_tables()
        drafts: list[_Draft] = []
        open_references: set[str] = set()
        for item_id, row in identified(self.benchmark, self._checked_rows()):
            if not self.benchmark.keep(row):
                continue
            full = limit is not None and len(drafts) >= limit
            if full and not open_references:
                break
            values = self._with_pictures(dict(row), item_id)
            if values is None:
                continue
            draft = _Draft(self._where, item_id, values)
            if not full:
                drafts.append(draft)
                open_references |= {reference.row for reference in draft.references()}
            open_references -= self.pictures.keys()
        if limit is None or len(drafts) < limit:
            self._require_columns()
        return drafts

    def resolved(self, value: Any) -> Any:
        """The value with pictures instead of references; raises ValueError where there is none."""
        if isinstance(value, list):
            return [self.resolved(part) for part in value]
        if not isinstance(value, Reference):
            return value
        if value.row not in self.pictures:
            raise ValueError(
                f"its picture {value.row!r} is neither a file below {self.place.root} nor the "
                "picture of another row"
            )
        return self.pictures[value.row]

    def note(self, problem: str) -> None:
        self.problems.append(problem)
        if len(self.problems) == _SHOWN:
            self.raise_problems()

    def raise_problems(self) -> None:
        if self.problems:
            title = f"{self.benchmark.title} cannot be read from {self.place.description}:"
            raise GraceError("\n  ".join([title, *self.problems]) + f"\n{_REMEDY}")

    def _checked_rows(self) -> Iterator[dict[str, Any]]:
        for file in self.place.files:
            for raw in read_rows(file, self._wanted):
                self._where = raw.where
                yield self._check(raw)

    def _check(self, raw: RawRow) -> dict[str, Any]:
        """Everything but pictures; those of rows that are left out are never looked at.

        A row that does not fit the schema ends the reading: the next would not fit either.
        """
        row: dict[str, Any] = {}
        for name, column in self.benchmark.columns.items():
            there = [other for other in self._names[name] if other in raw.values]
            self._seen.update({name} if there or raw.sparse else ())
            if not there and not column.nullable:
                self.note(f"{raw.where}: {self._missing(name, column, raw)}")
                self.raise_problems()
            value = raw.values[there[0]] if there else None
            if column.type in _PICTURES:
                row[name] = value
                continue
            try:
                row[name] = read_cell(value, column)
            except ValueError as error:
                self.note(f"{raw.where}: column {name!r} {error}")
                self.raise_problems()
        return row

    def _with_pictures(self, row: dict[str, Any], item_id: str) -> dict[str, Any] | None:
        for name, column in self.benchmark.columns.items():
            if column.type not in _PICTURES:
                continue
            try:
                row[name] = read_pictures(row[name], column, self.place.root, self.store)
            except ValueError as error:
                self.note(f"{self._where}: column {name!r} {error}")
                return None
            if isinstance(row[name], Picture):
                self.pictures.setdefault(item_id, row[name])
        return row

    def _read_picture_tables(self) -> None:
        for file in self.place.picture_files:
            for raw in read_rows(file, {"id", "image"}):
                try:
                    key = read_cell(raw.values.get("id"), Column("identifier"))
                    found = read_pictures(
                        raw.values.get("image"), Column("picture"), self.place.root, self.store
                    )
                except ValueError as error:
                    self.note(f"{raw.where}: {error}")
                    continue
                self.pictures[key] = found

    def _require_columns(self) -> None:
        """A column may be missing where it may be null, but not everywhere."""
        absent = [name for name in self.benchmark.columns if self._seen and name not in self._seen]
        for name in absent:
            holds = EXPECTED[self.benchmark.columns[name].type]
            self.note(f"column {name!r}, which should hold {holds}, is missing")
        if absent:
            self.raise_problems()

    def _missing(self, name: str, column: Column, raw: RawRow) -> str:
        others = f" (or {', '.join(column.otherwise)})" if column.otherwise else ""
        return (
            f"column {name!r}{others}, which should hold {EXPECTED[column.type]}, is missing; "
            f"found of the benchmark's columns: {', '.join(sorted(raw.values)) or 'none'}"
        )
