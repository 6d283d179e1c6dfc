"""The items to look at first: right by one model and wrong by the other."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from PIL import Image

from grace_core.errors import GraceError
from grace_core.evaluation.items import Item, Picture
from grace_core.evaluation.report.recorded import ItemRecord, RecordedModel
from grace_core.evaluation.table import Label

log = logging.getLogger(__name__)

SHOWN = 6
"""Items of each pair of models that are shown."""

_PAIRS: tuple[tuple[Label, Label], ...] = (
    ("bf16", "w4"),
    ("bf16", "w8"),
    ("teacher", "bf16"),
    ("baseline", "bf16"),
)
_THUMBNAIL = 320  # pixels of the longer side

FindItems = Callable[[RecordedModel, str, Collection[str]], Mapping[str, Item]]
"""(model, benchmark, ids) -> the items as they were asked. Raises GraceError where they are gone"""


@dataclass(frozen=True)
class Thumbnail:
    """A picture made small, encoded."""

    data: bytes
    format: str
    """png or jpeg."""

    width: int
    height: int

    @property
    def address(self) -> str:
        """As a `data:` address for a page that needs no other file."""
        return f"data:image/{self.format};base64,{base64.b64encode(self.data).decode('ascii')}"


@dataclass(frozen=True)
class Mistake:
    """One item that `right` answered and `wrong` did not."""

    benchmark: str
    id: str
    right: ItemRecord
    wrong: ItemRecord
    others_right: int
    """Of all models of the report, how many have it right."""

    content: tuple[str | Thumbnail, ...]
    """The question as it was put; empty where `Mistakes.without_questions` says why."""

    choices: Mapping[str, str]
    gold: tuple[str, ...]


@dataclass(frozen=True)
class Mistakes:
    """Items that the model `right` has right and `wrong` wrong."""

    right: str
    wrong: str
    counts: Mapping[str, int]
    """By benchmark."""

    items: Sequence[Mistake]
    """At most `SHOWN`, benchmarks in turn, those first that most models have right."""

    without_questions: str | None


def find_mistakes(models: Sequence[RecordedModel], find_items: FindItems | None) -> list[Mistakes]:
    """For each pair worth looking at that evaluated the same items.

    find_items: None where questions and pictures are not to be had.
    """
    found = []
    for first, second in _PAIRS:
        for wrong in models:
            beside = [
                model
                for model in models
                if model.label == first and model.folder.parent == wrong.folder.parent
            ]
            if wrong.label == second and len(beside) == 1:
                found.append(_mistakes_of(beside[0], wrong, models, find_items))
    return found


def _mistakes_of(
    right: RecordedModel,
    wrong: RecordedModel,
    models: Sequence[RecordedModel],
    find_items: FindItems | None,
) -> Mistakes:
    counts: dict[str, int] = {}
    ranked: list[list[tuple[str, ItemRecord, ItemRecord, int]]] = []
    for name, records in wrong.items.items():
        theirs = {record.id: record for record in right.items.get(name, ())}
        solved = _times_right(models, name)
        pairs = [
            (name, theirs[record.id], record, solved[record.id])
            for record in records
            if record.correct is False and record.id in theirs and theirs[record.id].correct
        ]
        counts[name] = len(pairs)
        ranked.append(sorted(pairs, key=lambda pair: -pair[3]))  # stable: else in item order
    in_turn = [pair for row in zip_longest(*ranked) for pair in row if pair is not None][:SHOWN]
    questions, without = _questions(wrong, in_turn, find_items)
    items = []
    for name, one, other, solved_by in in_turn:
        item = questions.get((name, other.id))
        gold = None if item is None else item.gold
        items.append(
            Mistake(
                benchmark=name,
                id=other.id,
                right=one,
                wrong=other,
                others_right=solved_by,
                content=() if item is None else tuple(map(_small, item.question.content)),
                choices={} if gold is None else dict(gold.choices or {}),
                gold=() if gold is None else gold.answers,
            )
        )
    return Mistakes(right.key, wrong.key, counts, items, without)


def _times_right(models: Sequence[RecordedModel], name: str) -> dict[str, int]:
    times: dict[str, int] = {}
    for model in models:
        for record in model.items.get(name, ()):
            times[record.id] = times.get(record.id, 0) + bool(record.correct)
    return times


def _questions(
    model: RecordedModel,
    pairs: Sequence[tuple[str, ItemRecord, ItemRecord, int]],
    find_items: FindItems | None,
) -> tuple[dict[tuple[str, str], Item], str | None]:
    """Items by benchmark and id, and why some are not there."""
    if find_items is None:
        return {}, "the questions are not at hand"
    found: dict[tuple[str, str], Item] = {}
    problem = None
    for name in dict.fromkeys(pair[0] for pair in pairs):
        ids = {pair[2].id for pair in pairs if pair[0] == name}
        try:
            found |= {(name, key): item for key, item in find_items(model, name, ids).items()}
        except GraceError as error:
            problem = f"the questions of {name} are not at hand: {error}"
            log.warning("%s", problem)
    return found, problem


def _small(part: str | Picture) -> str | Thumbnail:
    """A part of a question, its picture small; a picture that cannot be read is a text saying so"""
    if isinstance(part, str):
        return part
    try:
        picture = part.open()
    except (GraceError, OSError, ValueError) as error:
        return f"[a picture that cannot be shown: {error}]"
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    encoded = {name: _encoded(picture, name) for name in ("png", "jpeg")}
    name = min(encoded, key=lambda kind: len(encoded[kind]))
    return Thumbnail(encoded[name], name, *picture.size)


def _encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 80} if kind == "jpeg" else {"optimize": True}))
    return file.getvalue()
