"""The report: what was recorded, and everything that is computed from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from grace_core.evaluation.gate import GateVerdict
from grace_core.evaluation.report.comparison import AVERAGE, Comparison, compare
from grace_core.evaluation.report.mistakes import FindItems, Mistakes, find_mistakes
from grace_core.evaluation.report.published import Published, published_for
from grace_core.evaluation.report.recorded import MetricRecord, RecordedModel
from grace_core.evaluation.report.resampling import LEVEL, RESAMPLES
from grace_core.evaluation.table import ResultRow, ResultsTable, results_table

_BY = re.compile(r"(?P<of>.+?)[._]by_(?P<kind>\w+)\.(?P<value>.+)")
"""The name of a metric that is one value of a break-down."""


@dataclass(frozen=True)
class Report:
    """Models side by side."""

    title: str
    models: Sequence[RecordedModel]
    comparison: Comparison
    mistakes: Sequence[Mistakes]
    published: Published | None
    seed: int
    """Of the bootstrap."""

    gate: GateVerdict | None = None

    @property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(name for model in self.models for name in model.scores))

    def heading(self, benchmark: str) -> str:
        """Its name, and what was asked of it where that is a part."""
        found = (model.scores[benchmark].part for model in self.models if benchmark in model.scores)
        parts = dict.fromkeys(part for part in found if part is not None)
        return f"{benchmark} ({'; '.join(parts)})" if parts else benchmark

    def table(self) -> ResultsTable:
        """Raises GraceError where the models were not scored on the same benchmarks."""
        return table_of_models(self.models, self.published)

    def categories(self, benchmark: str) -> dict[str, dict[str, dict[str, MetricRecord]]]:
        """Break-down by the headline's rule: "category" -> value -> model -> metric."""
        found: dict[str, dict[str, dict[str, MetricRecord]]] = {}
        for model in self.models:
            score = model.scores.get(benchmark)
            if score is None:
                continue
            headline = score.headline.metric if score.headline else next(iter(score.metrics), "")
            for name, metric in score.metrics.items():
                parts = _BY.fullmatch(name)
                # What stands before it is the headline's rule, or its variant of that rule.
                if parts is not None and headline.startswith(parts["of"]):
                    values = found.setdefault(parts["kind"], {})
                    values.setdefault(parts["value"], {})[model.key] = metric
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; pictures and questions are in the page alone."""
        models = [
            {
                "model": model.key,
                "label": model.label,
                "folder": str(model.folder),
                "digest": None if model.manifest is None else model.manifest.digest,
                "model_bytes": model.model_bytes,
                "pixels": model.pixels,
                "questions_per_second": model.questions_per_second,
                "hardware": model.hardware,
                "held_out_loss": model.held_out_loss,
                "scores": {name: score.model_dump() for name, score in model.scores.items()},
            }
            for model in self.models
        ]
        mistakes = [
            {
                "right": pair.right,
                "wrong": pair.wrong,
                "counts": dict(pair.counts),
                "items": [
                    {
                        "benchmark": item.benchmark,
                        "id": item.id,
                        "gold": list(item.gold),
                        "right": item.right.response,
                        "wrong": item.wrong.response,
                    }
                    for item in pair.items
                ],
            }
            for pair in self.mistakes
        ]
        return {
            "format": 1,
            "title": self.title,
            "headings": {name: self.heading(name) for name in self.benchmarks},
            "bootstrap": {"resamples": RESAMPLES, "level_percent": LEVEL, "seed": self.seed},
            "models": models,
            "comparison": asdict(self.comparison),
            "mistakes": mistakes,
            "published": None if self.published is None else asdict(self.published),
            "gate": None if self.gate is None else self.gate.model_dump(mode="json"),
        }


def make_report(
    models: Sequence[RecordedModel],
    *,
    title: str,
    seed: int = 0,
    find_items: FindItems | None = None,
    comparison: Comparison | None = None,
    gate: GateVerdict | None = None,
) -> Report:
    """Compute a report.

    find_items: where the questions of the worst items come from.
    comparison: what `compare` made of the very same models and seed, where it is there already.
    """
    return Report(
        title=title,
        models=models,
        comparison=compare(models, seed=seed) if comparison is None else comparison,
        mistakes=find_mistakes(models, find_items),
        published=published_beside(models),
        seed=seed,
        gate=gate,
    )


def published_beside(models: Sequence[RecordedModel]) -> Published | None:
    """Published figures for the base model of these; None where they have several, or none."""
    bases = {model.run_config.get("publish", {}).get("base_model") for model in models}
    # A published figure is of the whole benchmark.
    names = {name for model in models for name in model.scores}
    names -= {name for model in models for name, score in model.scores.items() if score.part}
    return published_for(bases.pop(), names) if len(bases) == 1 else None


def table_of_models(
    models: Sequence[RecordedModel], published: Published | None = None
) -> ResultsTable:
    """The results table from what was recorded, published figures below each row."""
    rows = [
        ResultRow(
            label=model.label,
            scores={name: score.percent for name, score in model.scores.items()},
            held_out_loss=model.held_out_loss,
            title=model.key,
            parts={name: score.part for name, score in model.scores.items() if score.part},
            published=_published_row(model, published),
        )
        for model in models
    ]
    return results_table(rows)


def _published_row(
    model: RecordedModel, published: Published | None
) -> Mapping[str, float | None] | None:
    if published is None:
        return None
    scores = published.scores.get(model.label, {})
    average = published.averages.get(model.label)
    if not scores and average is None:
        return None
    return {**{name: scores.get(name) for name in model.scores}, AVERAGE: average}
