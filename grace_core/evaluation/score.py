"""From responses to a percentage that can be trusted, or to none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from grace_core.errors import GraceError
from grace_core.evaluation.benchmarks import Benchmark, Item
from grace_core.evaluation.extract import extract_letter, extract_yes_no
from grace_core.evaluation.generate import Prediction


@dataclass(frozen=True)
class CategoryResult:
    """Right answers among all items of a category, missing and failed ones included."""

    correct: int
    total: int


@dataclass(frozen=True)
class BenchmarkResult:
    """Score of one model on one benchmark. Counts are items."""

    name: str
    total: int
    answered: int
    """Items with a response; the rest were never asked or ended in an error."""

    correct: int
    parse_failures: int
    """Responses that no answer could be read from; they count as wrong."""

    errors: int
    """Items that ended in an exception; they count as not answered, not as wrong."""

    categories: dict[str, CategoryResult]

    @property
    def missing(self) -> int:
        """Items without any prediction."""
        return self.total - self.answered - self.errors

    @property
    def accuracy(self) -> float | None:
        """Percent of all items; None, hence no headline, unless every item was answered."""
        return 100.0 * self.correct / self.total if self.answered == self.total else None

    @property
    def coverage(self) -> str:
        """For reports: "600 of 600 answered, 2 unreadable"."""
        parts = [f"{self.answered} of {self.total} answered"]
        counts = {"unreadable": self.parse_failures, "errors": self.errors, "missing": self.missing}
        parts += [f"{count} {what}" for what, count in counts.items() if count]
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, the derived values included."""
        return {**asdict(self), "missing": self.missing, "accuracy": self.accuracy}


def read_answer(item: Item, response: str) -> str:
    """The answer that a response gives to its item; "" is a parse failure."""
    if item.kind == "mcq":
        assert item.choices is not None
        return extract_letter(response, item.choices)
    said = extract_yes_no(response)
    return "" if said == "Unknown" else said


def score(benchmark: Benchmark, predictions: Iterable[Prediction]) -> BenchmarkResult:
    """Compare predictions with the benchmark's answers.

    Raises GraceError when an item has two predictions or a prediction has no item, which happens
    when files of different runs are mixed.
    """
    items = {item.id: item for item in benchmark.items}
    seen: set[str] = set()
    correct: Counter[str] = Counter()
    parse_failures = errors = 0
    for prediction in predictions:
        if prediction.item_id not in items or prediction.item_id in seen:
            what = "stands twice" if prediction.item_id in seen else "is of no item"
            raise GraceError(
                f"{benchmark.name}: prediction {prediction.item_id!r} {what}; score the "
                "predictions of one run of this very benchmark"
            )
        seen.add(prediction.item_id)
        if prediction.error is not None:
            errors += 1
            continue
        item = items[prediction.item_id]
        answer = read_answer(item, prediction.response)
        parse_failures += not answer
        correct[item.category] += answer == item.answer
    totals = Counter(item.category for item in benchmark.items)
    return BenchmarkResult(
        name=benchmark.name,
        total=len(items),
        answered=len(seen) - errors,
        correct=correct.total(),
        parse_failures=parse_failures,
        errors=errors,
        categories={
            name: CategoryResult(correct[name], count) for name, count in sorted(totals.items())
        },
    )
