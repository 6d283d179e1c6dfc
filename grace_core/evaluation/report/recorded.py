"""Evaluations as the stage `evaluate-*` left them: `results.json` and a line for every item."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from grace_core.artifacts import MANIFEST, Manifest, read_artifact, stage_folders
from grace_core.errors import GraceError
from grace_core.evaluation.table import TITLES, Label

Record = TypeVar("Record", bound=BaseModel)

RESULTS = "results.json"
PREDICTIONS = "predictions"


class _Recorded(BaseModel):
    """Keys that a newer version adds do not matter here."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ItemRecord(_Recorded):
    """What came of one item under the headline's rule."""

    id: str
    response: str | None = None
    error: str | None = None
    answer: str | None = None
    """What was read from the response; "" is a parse failure, None is no response."""

    correct: bool | None = None
    credit: float | None = None
    """What a partly right answer counts, in [0, 1]; None: all or nothing."""

    group: str | None = None
    """Items of one group stand or fall together under the headline; None: the item alone."""

    counted: bool = True
    """Whether the headline counts the item."""

    cluster: str | None = None
    """Items of one cluster, such as those about one picture, are drawn together; None: alone."""

    @property
    def value(self) -> float:
        """What the answer counts, in [0, 1]."""
        return float(bool(self.correct)) if self.credit is None else self.credit


class MetricRecord(_Recorded):
    percent: float
    correct: int | None = None
    total: int | None = None


class RuleRecord(_Recorded):
    rule: str
    """Whose rule it is and what it says."""

    parse_failures: int


class HeadlineRecord(_Recorded):
    metric: str
    percent: float


class SourceRecord(_Recorded):
    """Where the items came from, and how they were worded; None where there is no such thing."""

    repository: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    prompt: str | None = None
    declared: bool = False
    """Whether it is the place that the benchmark declares."""


class ScoreRecord(_Recorded):
    """One model on one benchmark. Counts are items."""

    benchmark: str
    rules: dict[str, RuleRecord] = {}

    total: int
    answered: int
    errors: int
    missing: int
    parse_failures: int
    cut_off: int = 0
    """Of the parse failures, the responses that ended at their budget."""

    part_of: tuple[int, ...] = ()
    """Sizes that the whole benchmark has, where these items are a part; () where they are it."""

    source: SourceRecord | None = None
    """None where it was not recorded."""

    headline: HeadlineRecord | None
    headline_refused: str | None
    metrics: dict[str, MetricRecord]

    @property
    def percent(self) -> float | None:
        return None if self.headline is None else self.headline.percent

    @property
    def part(self) -> str | None:
        """ "50 of 1,500 items", where they are not the whole benchmark."""
        if not self.part_of:
            return None
        sizes = " or ".join(f"{size:,}" for size in self.part_of)
        between = "of" if self.total < min(self.part_of) else "instead of"
        return f"{self.total:,} {between} {sizes} items"


class _Summary(_Recorded):
    label: Label
    benchmarks: dict[str, ScoreRecord]
    held_out_loss: float | None = None
    model_bytes: int | None = None
    pixels: tuple[int, int] | None = None


@dataclass(frozen=True)
class RecordedModel:
    """All that was recorded of one model."""

    key: str
    """Its name in the report, unlike all others there."""

    label: Label
    folder: Path
    scores: Mapping[str, ScoreRecord]
    items: Mapping[str, Sequence[ItemRecord]] = field(repr=False)
    """Benchmark -> its items, in the order of the benchmark."""

    held_out_loss: float | None = None
    """Nats a supervised token."""

    model_bytes: int | None = None
    """Size of the weight files on disk."""

    pixels: tuple[int, int] | None = None
    """Fewest and most of a picture as the model saw it; None: all of one size, or unknown."""

    manifest: Manifest | None = None
    """None where the results lie outside of an artifact."""

    @property
    def questions_per_second(self) -> float | None:
        """Of the whole evaluation, loading included; None where it was not recorded."""
        if self.manifest is None or not self.manifest.seconds:
            return None
        return sum(score.answered for score in self.scores.values()) / self.manifest.seconds

    @property
    def hardware(self) -> str:
        """What it ran on, as the manifest says; "" where nothing says so."""
        environment = {} if self.manifest is None else self.manifest.environment
        return environment.get("gpu") or environment.get("cpu") or ""

    @property
    def run_config(self) -> Mapping[str, Any]:
        """The resolved configuration of the run that made it; empty where it is unknown."""
        return {} if self.manifest is None else self.manifest.run_config


def find_recorded(places: Sequence[Path]) -> list[RecordedModel]:
    """The evaluations at `places`, in the order of the results table.

    A place is a run's folder, an evaluation's folder or its `results.json`. Of several evaluations
    of one label in a run's folder the newest is taken.

    Raises GraceError where a place holds no evaluation or something is not as it was written.
    """
    found: list[tuple[str, RecordedModel]] = []
    for place in places:
        folders = _evaluations_at(place)
        run = place.name if len(folders) > 1 or not folders else folders[0].parent.parent.name
        found += [(run, read_recorded(folder)) for folder in folders]
    return _told_apart(found)


def read_recorded(folder: Path) -> RecordedModel:
    """One evaluation. Raises GraceError naming the file that is not as this version writes it."""
    file = folder / RESULTS
    summary = _validated(_Summary, file, _text(file))
    items = {}
    for name, score in summary.benchmarks.items():
        lines = folder / PREDICTIONS / f"{name}.jsonl"
        records = [
            _validated(ItemRecord, lines, line, number)
            for number, line in enumerate(_text(lines).splitlines(), start=1)
        ]
        if len(records) != score.total:
            raise GraceError(
                f"{lines} has {len(records)} items, {file} counts {score.total}; evaluate again"
            )
        items[name] = records
    return RecordedModel(
        key=TITLES[summary.label],
        label=summary.label,
        folder=folder,
        scores=summary.benchmarks,
        items=items,
        held_out_loss=summary.held_out_loss,
        model_bytes=summary.model_bytes,
        pixels=summary.pixels,
        manifest=read_artifact(folder).manifest if (folder / MANIFEST).is_file() else None,
    )


def _evaluations_at(place: Path) -> list[Path]:
    if place.name == RESULTS and place.is_file() and (place.parent / PREDICTIONS).is_dir():
        return [place.parent]
    if (place / PREDICTIONS).is_dir():
        return [place]
    newest = []
    for label in TITLES:
        folders = [
            folder
            for folder in stage_folders(place / "artifacts", f"evaluate-{label}")
            if (folder / MANIFEST).is_file()
        ]
        if folders:
            newest.append(max(folders, key=lambda f: (read_artifact(f).manifest.created, f.name)))
    if not newest:
        raise GraceError(
            f"{place} holds no evaluation; name a run's folder (with artifacts/evaluate-*), an "
            f"evaluation's folder or its {RESULTS}, or run `grace evaluate CONFIG` first"
        )
    return newest


def _told_apart(found: list[tuple[str, RecordedModel]]) -> list[RecordedModel]:
    """Models of one label get their run's name, and a number where that is the same too."""
    taken: dict[str, int] = {}
    models = []
    for run, model in found:
        key = model.key
        if sum(other.label == model.label for _, other in found) > 1:
            key = f"{key} ({run})"
        taken[key] = taken.get(key, 0) + 1
        if taken[key] > 1:
            key = f"{key} #{taken[key]}"
        models.append(RecordedModel(**{**vars(model), "key": key}))
    order = list(TITLES)
    return sorted(models, key=lambda model: order.index(model.label))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise GraceError(f"{file} does not exist; evaluate the model again") from None


def _validated(kind: type[Record], file: Path, text: str, line: int | None = None) -> Record:
    try:
        return kind.model_validate(json.loads(text))
    except (json.JSONDecodeError, ValidationError) as error:
        where = str(file) if line is None else f"{file}:{line}"
        raise GraceError(
            f"{where} is not as this version writes it ({error}); evaluate the model again"
        ) from None
