"""Benchmarks on disk: a folder with `items.jsonl` and the pictures it names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from grace_core.errors import GraceError
from grace_core.toy.world import ITEMS_FILE, prompt_for

Kind = Literal["mcq", "yesno"]


@dataclass(frozen=True)
class Item:
    """One question about one picture."""

    id: str
    kind: Kind
    question: str
    choices: dict[str, str] | None
    """Upper-case letter -> option text, for `mcq` only."""

    answer: str
    """A letter of `choices`, or "Yes" / "No"."""

    category: str
    image: Path

    @property
    def prompt(self) -> str:
        """The text put to the model: question, options and how to answer."""
        return prompt_for({"kind": self.kind, "question": self.question, "choices": self.choices})


@dataclass(frozen=True)
class Benchmark:
    """A named list of items with distinct ids."""

    name: str
    items: tuple[Item, ...]

    def first(self, count: int | None) -> Benchmark:
        """The benchmark cut to its first `count` items; None keeps all."""
        return self if count is None else Benchmark(self.name, self.items[:count])


class _Line(BaseModel):
    """One line of `items.jsonl`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str
    kind: Kind
    question: str
    choices: dict[str, str] | None = None
    answer: str
    category: str
    image: str

    @model_validator(mode="after")
    def _answerable(self) -> _Line:
        if self.kind == "yesno":
            if self.choices:
                raise ValueError("a yesno item has no choices")
            if self.answer not in ("Yes", "No"):
                raise ValueError(f"answer {self.answer!r} must be Yes or No")
            return self
        if not self.choices:
            raise ValueError("an mcq item needs choices")
        bad = [letter for letter in self.choices if not (len(letter) == 1 and "A" <= letter <= "Z")]
        if bad:
            raise ValueError(f"choices {bad} are not single letters A to Z")
        if self.answer not in self.choices:
            raise ValueError(f"answer {self.answer!r} is none of the choices {list(self.choices)}")
        return self


def load_benchmark(folder: Path) -> Benchmark:
    """Read a benchmark; it is named after its folder.

    Pictures are looked up but not decoded. Raises GraceError naming file and line of every item
    that is malformed, occurs twice, or whose picture is missing or outside the folder.
    """
    file = folder / ITEMS_FILE
    if not file.is_file():
        raise GraceError(f"{file} does not exist; make the benchmark first, or mend its path")
    items: dict[str, Item] = {}
    problems: list[str] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = _read_line(line, folder)
        except ValueError as error:
            problems.append(f"{file}:{number}: {error}")
            continue
        if item.id in items:
            problems.append(f"{file}:{number}: id {item.id!r} stands twice")
        items[item.id] = item
    if problems:
        raise GraceError("\n".join(["unusable benchmark items; mend or remove them:", *problems]))
    if not items:
        raise GraceError(f"{file} holds no items")
    return Benchmark(folder.name, tuple(items.values()))


def _read_line(line: str, folder: Path) -> Item:
    """Raises ValueError saying what is wrong with the line."""
    try:
        read = _Line.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except ValidationError as error:
        raise ValueError("; ".join(_explain(detail) for detail in error.errors())) from None
    image = folder / read.image
    if not image.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"picture {read.image} lies outside the benchmark's folder")
    if not image.is_file():
        raise ValueError(f"picture {read.image} does not exist")
    return Item(read.id, read.kind, read.question, read.choices, read.answer, read.category, image)


def _explain(detail: object) -> str:
    assert isinstance(detail, dict)
    key = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
