"""From responses to a percentage that can be trusted, or to none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from grace_core.errors import GraceError
from grace_core.evaluation.declaration import Benchmark, Marked, Metric, Metrics, Reading
from grace_core.evaluation.items import Gold, Prediction


@dataclass(frozen=True)
class ItemScore:
    """What came of one item under the headline's rule."""

    gold: Gold
    prediction: Prediction | None
    reading: Reading | None
    """None without a response to judge."""

    def to_dict(self) -> dict[str, Any]:
        """`{"id", "response", "error", "answer", "correct"}`; None where there is no such thing."""
        return {
            "id": self.gold.id,
            "response": None if self.prediction is None else self.prediction.response,
            "error": None if self.prediction is None else self.prediction.error,
            "answer": None if self.reading is None else self.reading.answer,
            "correct": None if self.reading is None else self.reading.correct,
        }


@dataclass(frozen=True)
class BenchmarkScore:
    """Score of one model on one benchmark. Counts are items."""

    benchmark: Benchmark
    items: tuple[ItemScore, ...]
    metrics: Metrics
    """Of every rule, each name with the rule's before it; of the judged items, if some miss."""

    headline_refused: str | None
    """Why no number may stand for the benchmark."""

    @property
    def total(self) -> int:
        return len(self.items)

    @property
    def answered(self) -> int:
        """Items with a response; the rest were never asked or ended in an error."""
        return sum(item.reading is not None for item in self.items)

    @property
    def errors(self) -> int:
        """Items that ended in an exception; they count as not answered, not as wrong."""
        return sum(
            item.prediction is not None and item.prediction.error is not None for item in self.items
        )

    @property
    def missing(self) -> int:
        """Items without any prediction."""
        return self.total - self.answered - self.errors

    @property
    def parse_failures(self) -> int:
        """Responses that the headline's rule reads nothing from; they count as wrong."""
        return sum(item.reading is not None and not item.reading.answer for item in self.items)

    @property
    def headline(self) -> tuple[str, Metric] | None:
        """The metric that stands for the benchmark, and its value; None where it is refused."""
        if self.headline_refused is not None:
            return None
        return next(
            (name, self.metrics[name]) for name in self.benchmark.headline if name in self.metrics
        )

    @property
    def accuracy(self) -> float | None:
        """The headline in percent; None where it is refused."""
        return None if self.headline is None else self.headline[1].percent

    @property
    def coverage(self) -> str:
        """For reports: "600 of 600 answered, 2 unreadable"."""
        parts = [f"{self.answered} of {self.total} answered"]
        counts = {"unreadable": self.parse_failures, "errors": self.errors, "missing": self.missing}
        parts += [f"{count} {what}" for what, count in counts.items() if count]
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, without the items."""
        headline = None
        if self.headline is not None:
            headline = {"metric": self.headline[0], "percent": self.headline[1].percent}
        return {
            "benchmark": self.benchmark.name,
            "rules": {rule.name: rule.source for rule in self.benchmark.rules},
            "total": self.total,
            "answered": self.answered,
            "errors": self.errors,
            "missing": self.missing,
            "parse_failures": self.parse_failures,
            "headline": headline,
            "headline_refused": self.headline_refused,
            "metrics": {name: vars(metric) for name, metric in self.metrics.items()},
        }


def score(
    benchmark: Benchmark, golds: Sequence[Gold], predictions: Iterable[Prediction]
) -> BenchmarkScore:
    """Judge predictions by every rule of the benchmark.

    Raises GraceError when an item has two predictions or a prediction has no item, which happens
    when files of different runs are mixed.
    """
    known = {gold.id for gold in golds}
    found: dict[str, Prediction] = {}
    for prediction in predictions:
        if prediction.item_id not in known or prediction.item_id in found:
            what = "stands twice" if prediction.item_id in found else "is of no item"
            raise GraceError(
                f"{benchmark.name}: prediction {prediction.item_id!r} {what}; score the "
                "predictions of one run of this very benchmark"
            )
        found[prediction.item_id] = prediction
    metrics: Metrics = {}
    items: tuple[ItemScore, ...] = ()
    for rule in benchmark.rules:
        marked = []
        for gold in golds:
            said = found.get(gold.id)
            if said is None or said.error is not None:
                marked.append(Marked(gold, None))
            else:
                marked.append(Marked(gold, rule.read(gold, said.response)))
        metrics |= {f"{rule.name}.{name}": m for name, m in benchmark.metrics(marked).items()}
        if benchmark.headline[0].startswith(f"{rule.name}."):
            items = tuple(
                ItemScore(each.gold, found.get(each.gold.id), each.reading) for each in marked
            )
    unjudged = sum(item.reading is None for item in items)
    refused = f"{unjudged} of {len(items)} items have no answer" if unjudged else None
    return BenchmarkScore(benchmark, items, metrics, refused)
