"""Figures that were published for models made the same way, to stand beside one's own."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from grace_core.evaluation.table import Label


@dataclass(frozen=True)
class Published:
    """What one source says of the models made from one base model. Scores are percent."""

    title: str
    address: str
    protocol: str
    """How the numbers were made, where that differs from what is done here."""

    scores: Mapping[Label, Mapping[str, float]]
    """Benchmarks that were asked for alone."""

    averages: Mapping[Label, float]
    """Empty unless they are over the very benchmarks that were asked for."""


def published_for(base_model: str | None, benchmarks: Collection[str]) -> Published | None:
    """Published figures of students made from `base_model` (a Hub id); None without any.

    benchmarks: names of those that one has oneself.
    """
    entry = _data()["models"].get(base_model)
    if entry is None:
        return None
    known = entry["benchmarks"]
    scores = {
        label: {name: score for name, score in zip(known, row, strict=True) if name in benchmarks}
        for label, row in entry["scores"].items()
    }
    averages = entry["averages"] if set(known) == set(benchmarks) else {}
    scores = {label: row for label, row in scores.items() if row}
    if not scores and not averages:
        return None
    return Published(**_data()["sources"][entry["source"]], scores=scores, averages=averages)


@cache
def _data() -> dict[str, Any]:
    file = resources.files(__package__).joinpath("published.json")
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data
