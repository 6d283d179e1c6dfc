"""What a benchmark is: one small declaration of its rows, its prompt, its rules and its metrics.

Each stands in a file of its own in `grace_core/evaluation/benchmarks/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grace_core.evaluation.items import Gold, Item, Kind, Picture, Question
from grace_core.evaluation.prompts import PromptStyle

Row = Mapping[str, Any]
"""One row of a data set: column -> value, pictures as `Picture` where they were loaded."""

ColumnType = Literal[
    "text", "texts", "integer", "identifier", "picture", "pictures", "record", "records"
]
"""`identifier`: text or a whole number, read as text; `texts`: a list of texts, or text that looks
like one; `record`: a nested object; `records`: a list of them."""


@dataclass(frozen=True)
class Column:
    """A column that a benchmark reads."""

    type: ColumnType
    scores: bool = False
    """Needed to score recorded responses; the other columns are needed to ask only."""

    nullable: bool = False
    """May be null in a row."""

    otherwise: tuple[str, ...] = ()
    """Names that copies of the data set use for the column."""


@dataclass(frozen=True)
class Source:
    """Where the rows are on the Hugging Face Hub; a configuration may name another place."""

    repository: str
    split: str
    """One split, or several joined by "+", in this order."""

    config: str | None = None
    """The data set's configuration; None where there is only one, "*" for all, in order."""

    pictures: str | None = None
    """Configuration of a table of pictures by `id`, where a row's picture cell names one of it."""


@dataclass(frozen=True)
class Reading:
    """What a rule makes of a response."""

    answer: str
    """What it says, such as a letter; "" where nothing can be read, a parse failure."""

    correct: bool
    credit: float | None = None
    """What the answer counts, in [0, 1], where it may be partly right; None: all or nothing."""

    @property
    def counts(self) -> float:
        """In [0, 1]."""
        return float(self.correct) if self.credit is None else self.credit


@dataclass(frozen=True)
class Rule:
    """How responses are read and judged. A rule's name starts the names of its metrics."""

    name: str
    """ "official..." for the authors' own, "policy" for the one that all benchmarks share."""

    source: str
    """Whose rule it is and what it says, for the report."""

    read: Callable[[Gold, str], Reading]


@dataclass(frozen=True)
class Marked:
    """An item after a rule; `reading` is None where there is no response to judge."""

    gold: Gold
    reading: Reading | None


@dataclass(frozen=True)
class Metric:
    """A score in percent, with its counts where it is a share of something."""

    percent: float
    correct: int | None = None
    total: int | None = None
    points: float | None = None
    """What the authors report where that is no per cent."""

    def to_dict(self) -> dict[str, float | int | None]:
        """Percent and counts; points where there are any."""
        points = {} if self.points is None else {"points": self.points}
        return {"percent": self.percent, "correct": self.correct, "total": self.total, **points}


Metrics = dict[str, Metric]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: where its rows are, what is asked, and how answers are scored."""

    name: str
    """As in commands and configurations: lower-case letters, digits and hyphens."""

    title: str
    """As in tables and model cards."""

    source: Source | None
    """None: a local folder must be named."""

    columns: Mapping[str, Column]
    gold: Callable[[Row, str], Gold]
    """The gold of a row under the given id. Raises ValueError saying what is wrong with the row."""

    content: Callable[[Row, PromptStyle], tuple[str | Picture, ...]]
    """What is put to the model in a style's words, pictures included. Raises ValueError like
    `gold`."""

    identify: Callable[[Row, int], str]
    """The id of a row at a position from 0, before repetitions are told apart."""

    rules: tuple[Rule, ...]
    metrics: Callable[[Sequence[Marked]], Metrics]
    """Metrics of one rule; their names get the rule's before them."""

    headline: tuple[str, ...]
    """Metrics that stand for the benchmark; the first that the rows allow is the headline."""

    max_new_tokens: Mapping[Kind, int] = field(default_factory=dict)
    """Tokens of an answer at most, by kind."""

    metric_titles: Mapping[str, str] = field(default_factory=dict)
    """What the field calls the headlines that are no plain accuracy."""

    group: Callable[[Gold], str | None] | None = None
    """An item's group, where the headline counts groups of which every item is right, and None for
    an item that the headline leaves out. Without it every item counts for itself."""

    cluster: Callable[[Gold], str] | None = None
    """What items have in common, so that reports draw them together when they say how sure a number
    is; None: their first picture."""

    keep: Callable[[Row], bool] = lambda row: True
    """Whether a row belongs to the benchmark; the others are neither asked nor expected."""

    rows: int | None = None
    """Items of the declared source; None where they are generated."""

    other_sizes: Callable[[Sequence[Gold]], tuple[int, ...]] = lambda golds: ()
    """Items of the further splits and copies that golds such as these may be the whole of."""

    licence: str = ""
    """Of the data, as their authors name it."""

    def item(self, row: Row, item_id: str, style: PromptStyle) -> Item:
        """Raises ValueError saying what is wrong with the row."""
        gold = self.gold(row, item_id)
        return Item(Question(item_id, gold.kind, self.content(row, style)), gold)


def identified(benchmark: Benchmark, rows: Iterable[Row]) -> Iterable[tuple[str, Row]]:
    """Every row with its id, those that `keep` leaves out included.

    An id that stood before gets "#2", "#3", ... appended, so that a row's id depends on nothing but
    the rows before it.
    """
    seen: dict[str, int] = {}
    for position, row in enumerate(rows):
        name = benchmark.identify(row, position)
        seen[name] = seen.get(name, 0) + 1
        yield (name if seen[name] == 1 else f"{name}#{seen[name]}"), row
