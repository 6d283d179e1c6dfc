"""From files to items: every row read, checked, identified and turned into question and gold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from grace_core.errors import GraceError
from grace_core.evaluation.declaration import Benchmark, Column, identified
from grace_core.evaluation.items import Gold, Item, Picture
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
    return _items(_Reader(benchmark, place, store or AsFound()), limit, None, style)


@dataclass(frozen=True)
class Questions:
    """The first questions of a benchmark, each with all its items."""

    items: list[Item]
    part: bool
    """Whether others were left out."""


def load_questions(
    benchmark: Benchmark,
    place: Place,
    *,
    limit: int | None,
    style: PromptStyle,
    store: PictureStore,
) -> Questions:
    """As `load_items`, but a question that is asked in several items is taken whole: MMBench's
    rotations come after all that are not rotated, and its score counts questions.

    limit: so many questions, from the first; None: all.
    """
    reader = _Reader(benchmark, place, store)
    group = None if limit is None else benchmark.group
    items = _items(reader, limit, group, style)
    return Questions(items, reader.part)


def _items(
    reader: _Reader,
    limit: int | None,
    group: Callable[[Gold], str | None] | None,
    style: PromptStyle,
) -> list[Item]:
    drafts = reader.drafts(limit, group)
    items: list[Item] = []
    for draft in drafts:
        try:
            row = {name: reader.resolved(value) for name, value in draft.values.items()}
            items.append(reader.benchmark.item(row, draft.item_id, style))
        except ValueError as error:
            reader.note(f"{draft.where}: {error}")
    reader.raise_problems()
    if not items:
        title = reader.benchmark.title
        raise GraceError(f"{reader.place.description} holds no items of {title}; {_REMEDY}")
    return items


class _Reader:
    """One pass over the files of a benchmark."""

    def __init__(self, benchmark: Benchmark, place: Place, store: PictureStore) -> None:
        self.benchmark, self.place, self.store = benchmark, place, store
        self.problems: list[str] = []
        self.pictures: dict[str, Picture] = {}
        """By the id of the row that holds them; of picture tables by their own."""

        self.part = False
        """Whether kept rows were left out."""

        self._names = {
            name: (name, *column.otherwise) for name, column in benchmark.columns.items()
        }
        self._wanted = set(chain.from_iterable(self._names.values()))
        self._seen: set[str] = set()
        self._where = ""

    def drafts(self, limit: int | None, group: Callable[[Gold], str | None] | None) -> list[_Draft]:
        """The kept rows of the first `limit` groups (without `group`: the first rows), and every
        picture that they refer to.
        """
        self._read_picture_tables()
        drafts: list[_Draft] = []
        taken: set[str] = set()
        open_references: set[str] = set()
        for item_id, row in self._kept_rows():
            one = self._group(row, item_id, group)
            full = limit is not None and len(taken) >= limit and one not in taken
            self.part |= full
            if full and not open_references:
                if group is None:
                    break
                continue
            values = self._with_pictures(row, item_id)
            if values is None:
                continue
            draft = _Draft(self._where, item_id, values)
            if not full:
                drafts.append(draft)
                taken.add(one)
                open_references |= {reference.row for reference in draft.references()}
            open_references -= self.pictures.keys()
        if open_references and group is not None:  # to pictures of rows that were passed over
            for item_id, row in self._kept_rows():
                if item_id in open_references:
                    self._with_pictures(row, item_id)
        if not self.part:
            self._require_columns()
        return drafts

    def _kept_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for item_id, row in identified(self.benchmark, self._checked_rows()):
            if self.benchmark.keep(row):
                yield item_id, dict(row)

    def _group(
        self, row: dict[str, Any], item_id: str, group: Callable[[Gold], str | None] | None
    ) -> str:
        """What the row is taken with; itself where that cannot be told."""
        if group is None:
            return item_id
        try:
            return group(self.benchmark.gold(row, item_id)) or item_id
        except ValueError:  # told when the row becomes an item
            return item_id

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
