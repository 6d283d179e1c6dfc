"""From responses to a percentage that can be trusted, or to none."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grace_core.errors import GraceError
from grace_core.evaluation.declaration import Benchmark, Marked, Metric, Metrics, Reading, Rule
from grace_core.evaluation.items import Gold, Prediction

_NAMED = 5
"""Of a list of bad ids, how many a message names."""


@dataclass(frozen=True)
class ItemScore:
    """What came of one item under the headline's rule."""

    gold: Gold
    prediction: Prediction | None
    reading: Reading | None
    """None without a response to judge."""

    group: str | None = None
    """The item's group, where the headline counts whole groups."""

    counted: bool = True
    """Whether the headline counts the item."""

    cluster: str | None = None
    """What the item has in common with others that are drawn with it; None: nothing is known."""

    cut_off: bool = False
    """Whether the response ended at its budget."""

    def to_dict(self) -> dict[str, Any]:
        """`{"id", "response", "error", "answer", "correct"}`; None where there is no such thing.

        Where they say something: `credit`, what a partly right answer counts; `group`, of items
        that stand or fall together under the headline; `counted`, false for an item it leaves out;
        `cluster`, of items that are drawn together; `cut_off`, true for a response that ended at
        its budget.
        """
        judged = self.reading is not None and bool(self.gold.answers)
        record: dict[str, Any] = {
            "id": self.gold.id,
            "response": None if self.prediction is None else self.prediction.response,
            "error": None if self.prediction is None else self.prediction.error,
            "answer": None if self.reading is None else self.reading.answer,
            "correct": self.reading.correct if self.reading is not None and judged else None,
        }
        if self.reading is not None and self.reading.credit is not None:
            record["credit"] = self.reading.credit
        if self.group is not None:
            record["group"] = self.group
        if not self.counted:
            record["counted"] = False
        if self.cluster is not None:
            record["cluster"] = self.cluster
        if self.cut_off:
            record["cut_off"] = True
        return record


@dataclass(frozen=True)
class RuleScore:
    """How a rule fared with the responses."""

    rule: Rule
    parse_failures: tuple[str, ...]
    """Ids of the items whose response it reads nothing from; they count as wrong."""


@dataclass(frozen=True)
class BenchmarkScore:
    """Score of one model on one benchmark. Counts are items."""

    benchmark: Benchmark
    items: tuple[ItemScore, ...]
    metrics: Metrics
    """Of every rule, each name with the rule's before it; of the judged items, if some miss."""

    rules: tuple[RuleScore, ...]
    headline_refused: str | None
    """Why no number may stand for the benchmark."""

    part_of: tuple[int, ...] = ()
    """Sizes that the whole benchmark has, where these items are a part; () where they are it.

    A score of a part is no score of the benchmark, however complete.
    """

    @property
    def total(self) -> int:
        return len(self.items)

    @property
    def answered(self) -> int:
        """Items with a response; the rest were never asked or ended in an error."""
        return sum(item.reading is not None for item in self.items)

    @property
    def errors(self) -> int:
        """Items that cannot be asked as they are; they count as not answered, not as wrong."""
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
    def cut_off(self) -> int:
        """Of the parse failures, the responses that ended at their budget."""
        return sum(
            item.cut_off and item.reading is not None and not item.reading.answer
            for item in self.items
        )

    @property
    def headlines(self) -> Metrics:
        """The metrics that stand for the benchmark, the headline first; none where refused."""
        if self.headline_refused is not None:
            return {}
        return {
            name: self.metrics[name] for name in self.benchmark.headline if name in self.metrics
        }

    @property
    def headline(self) -> tuple[str, Metric] | None:
        """The metric that stands for the benchmark, and its value; None where it is refused."""
        return next(iter(self.headlines.items()), None)

    @property
    def accuracy(self) -> float | None:
        """The headline in percent; None where it is refused."""
        return None if self.headline is None else self.headline[1].percent

    @property
    def coverage(self) -> str:
        """For reports: "600 of 600 answered, 2 unreadable"."""
        parts = [f"{self.answered} of {self.total} answered"]
        if self.parse_failures:
            cut = f" ({self.cut_off} of them cut off)" if self.cut_off else ""
            parts.append(f"{self.parse_failures} unreadable{cut}")
        counts = {"errors": self.errors, "missing": self.missing}
        parts += [f"{count} {what}" for what, count in counts.items() if count]
        if self.part_of:
            parts.append(f"the benchmark has {' or '.join(map(str, self.part_of))}")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, without the items."""
        headlines = [
            {"metric": name, "percent": metric.percent} for name, metric in self.headlines.items()
        ]
        return {
            "benchmark": self.benchmark.name,
            "rules": {
                each.rule.name: {
                    "rule": each.rule.source,
                    "parse_failures": len(each.parse_failures),
                    "parse_failure_ids": list(each.parse_failures),
                }
                for each in self.rules
            },
            "total": self.total,
            "answered": self.answered,
            "errors": self.errors,
            "missing": self.missing,
            "parse_failures": self.parse_failures,
            "cut_off": self.cut_off,
            "part_of": list(self.part_of),
            "headline": headlines[0] if headlines else None,
            "further_headlines": headlines[1:],
            "headline_refused": self.headline_refused,
            "metrics": {name: metric.to_dict() for name, metric in self.metrics.items()},
        }


def score(
    benchmark: Benchmark,
    golds: Sequence[Gold],
    predictions: Iterable[Prediction],
    aside: Collection[str] = (),
    *,
    part: bool = False,
    declared: bool = False,
    budgets: Mapping[str, int] | None = None,
    pictures: Mapping[str, str] | None = None,
) -> BenchmarkScore:
    """Judge predictions by every rule of the benchmark.

    golds: of the rows, in order. aside: ids of those that the benchmark leaves out; where they were
        answered they have metrics of their own, but they are never expected.
    part: whether items were left out.
    declared: whether the items are of the place that the benchmark declares; otherwise their number
        tells too whether they are a part.
    budgets: tokens of a response at most, by kind, where they are known.
    pictures: the key of the first picture, by item, where pictures are known.

    Raises GraceError when an item has two predictions or a prediction has no item, which happens
    when files of different runs are mixed.
    """
    found = _by_id(benchmark, {gold.id for gold in golds}, predictions)
    grouped = [(gold, benchmark.group(gold) if benchmark.group else None) for gold in golds]
    metrics: Metrics = {}
    rules: list[RuleScore] = []
    items: tuple[ItemScore, ...] = ()
    for rule in benchmark.rules:
        readings = {
            gold.id: rule.read(gold, found[gold.id].response)
            for gold in golds
            if gold.id in found and found[gold.id].error is None
        }
        marked = [Marked(each, readings.get(each.id) if each.answers else None) for each in golds]
        metrics |= {f"{rule.name}.{name}": m for name, m in benchmark.metrics(marked).items()}
        scored = tuple(
            ItemScore(
                gold,
                found.get(gold.id),
                readings.get(gold.id),
                group,
                counted=benchmark.group is None or group is not None,
                cluster=benchmark.cluster(gold)
                if benchmark.cluster
                else (pictures or {}).get(gold.id),
                cut_off=_cut_off(found.get(gold.id), (budgets or {}).get(gold.kind)),
            )
            for gold, group in grouped
            if gold.id not in aside
        )
        unread = (each.gold.id for each in scored if each.reading and not each.reading.answer)
        rules.append(RuleScore(rule, tuple(unread)))
        if benchmark.headline[0].startswith(f"{rule.name}."):
            items = scored
    wanted = [gold for gold in golds if gold.id not in aside]
    part_of = _part_of(benchmark, wanted, part, declared)
    return BenchmarkScore(benchmark, items, metrics, tuple(rules), _refusal(items), part_of)


def _cut_off(prediction: Prediction | None, budget: int | None) -> bool:
    if prediction is None or prediction.tokens is None or budget is None:
        return False
    return prediction.tokens >= budget


def _part_of(
    benchmark: Benchmark, golds: Sequence[Gold], part: bool, declared: bool
) -> tuple[int, ...]:
    if benchmark.rows is None:
        return ()
    if declared:
        return (benchmark.rows,) if part else ()
    sizes = (benchmark.rows, *benchmark.other_sizes(golds))
    return sizes if part or len(golds) not in sizes else ()


def _by_id(
    benchmark: Benchmark, known: Collection[str], predictions: Iterable[Prediction]
) -> dict[str, Prediction]:
    found: dict[str, Prediction] = {}
    unknown: list[str] = []
    for prediction in predictions:
        if prediction.item_id in found:
            raise GraceError(
                f"{benchmark.name}: prediction {prediction.item_id!r} stands twice; score the "
                "predictions of one run"
            )
        if prediction.item_id not in known:
            unknown.append(prediction.item_id)
        found[prediction.item_id] = prediction
    if unknown:
        named = ", ".join(repr(each) for each in unknown[:_NAMED])
        count = f"{len(unknown)} predictions are" if len(unknown) > 1 else "a prediction is"
        raise GraceError(
            f"{benchmark.name}: {count} of no item ({named}{', ...' * (len(unknown) > _NAMED)}); "
            "score the predictions of one run of these very items"
        )
    return found


def _refusal(items: Sequence[ItemScore]) -> str | None:
    """Why no number may stand for the benchmark, or None."""
    if not items:
        return "there are no items"
    hidden = sum(not item.gold.answers for item in items)
    if hidden:
        return f"{hidden} of {len(items)} items have no public answer; hand in the responses"
    unjudged = sum(item.reading is None for item in items)
    return f"{unjudged} of {len(items)} items have no response" if unjudged else None
