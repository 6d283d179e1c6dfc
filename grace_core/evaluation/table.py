"""The results table: teacher, baseline and the released models on every benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rich.table import Table

from grace_core.errors import GraceError

Label = Literal["teacher", "baseline", "bf16", "w8", "w4"]

TITLES: dict[Label, str] = {
    "teacher": "Teacher",
    "baseline": "Baseline",
    "bf16": "GRACE BF16",
    "w8": "GRACE W8G128",
    "w4": "GRACE W4G128",
}


@dataclass(frozen=True)
class ResultRow:
    """Scores of one model."""

    label: Label
    scores: Mapping[str, float | None]
    """Benchmark -> percent, in the table's order; None where items were missing or failed."""

    held_out_loss: float | None = None
    """Cross-entropy on held-out captions, nats a token; shown beside, never averaged."""

    title: str = ""
    """What the row is called; empty: the label's title."""

    parts: Mapping[str, str] = field(default_factory=dict)
    """What was asked of the benchmarks that were not asked whole: "50 of 1,500 items"."""

    published: Mapping[str, float | None] | None = None
    """Figures published for such a model, by benchmark and for "average"; a row below."""

    @property
    def name(self) -> str:
        return self.title or TITLES[self.label]

    @property
    def average(self) -> float | None:
        """Unweighted mean over the benchmarks; None unless every one has a score."""
        known = [score for score in self.scores.values() if score is not None]
        return sum(known) / len(known) if known and len(known) == len(self.scores) else None


@dataclass(frozen=True)
class ResultsTable:
    """Rows over the same benchmarks; made by `results_table`."""

    rows: tuple[ResultRow, ...]

    @property
    def benchmarks(self) -> list[str]:
        return list(self.rows[0].scores)

    def part(self, benchmark: str) -> str | None:
        """What was asked of a benchmark that was not asked whole."""
        found = dict.fromkeys(row.parts[benchmark] for row in self.rows if benchmark in row.parts)
        return "; ".join(found) or None

    def gain(self, row: ResultRow) -> float | None:
        """Percentage points of the average above the baseline's."""
        baseline = self._average("baseline")
        if row.average is None or baseline is None or row.label == "baseline":
            return None
        return row.average - baseline

    def kept(self, row: ResultRow) -> float | None:
        """Percent of the BF16 model's average that a quantized model keeps; None for others."""
        bf16 = self._average("bf16")
        if row.label not in ("w8", "w4") or row.average is None or not bf16:
            return None
        return 100.0 * row.average / bf16

    def to_dict(self) -> dict[str, Any]:
        """`{"rows": {label: {benchmark: percent, ..., "average": percent}}}`, not rounded.

        `held_out_loss` is added to the rows that have it, `parts` (benchmark -> what was asked of
        it) where benchmarks were not asked whole.
        """
        rows: dict[str, dict[str, float | None]] = {}
        for row in self.rows:
            rows[row.label] = {**row.scores, "average": row.average}
            if row.held_out_loss is not None:
                rows[row.label]["held_out_loss"] = row.held_out_loss
        parts = {name: part for name in self.benchmarks if (part := self.part(name))}
        return {"rows": rows, "parts": parts} if parts else {"rows": rows}

    def to_markdown(self) -> str:
        """A table in GitHub's Markdown; the best released model of each column in bold."""
        header, *body = self._cells()
        best = self._best_rows()
        lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        for number, cells in enumerate(body):
            marked = [
                f"**{cell}**" if number in best.get(column, ()) else cell
                for column, cell in enumerate(cells)
            ]
            lines.append("| " + " | ".join(marked) + " |")
            published = self._published_cells(self.rows[number])
            if published is not None:
                shown = [f"*{cell}*" for cell in published]
                shown += [""] * (len(header) - len(published))
                lines.append("| " + " | ".join(shown) + " |")
        return "\n".join(lines)

    def to_rich(self) -> Table:
        """The same table for a terminal."""
        header, *body = self._cells()
        table = Table(title="Scores in percent")
        table.add_column(header[0])
        for name in header[1:]:
            table.add_column(name, justify="right")
        for row, cells in zip(self.rows, body, strict=True):
            table.add_row(*cells)
            published = self._published_cells(row)
            if published is not None:
                table.add_row(*published, style="dim")
        return table

    def _average(self, label: Label) -> float | None:
        """None where no row has the label, or several have."""
        averages = [row.average for row in self.rows if row.label == label]
        return averages[0] if len(averages) == 1 else None

    def _cells(self) -> list[list[str]]:
        has_loss = any(row.held_out_loss is not None for row in self.rows)
        loss = ["Held-out loss"] if has_loss else []
        heads = [
            f"{name} ({part})" if (part := self.part(name)) else name for name in self.benchmarks
        ]
        cells = [["Model", *heads, "Average", "vs baseline", "of BF16", *loss]]
        for row in self.rows:
            values = [_show(score) for score in [*row.scores.values(), row.average]]
            values += [_show(self.gain(row), "+.1f"), _show(self.kept(row), ".1f", " %")]
            values += [_show(row.held_out_loss, ".3f")] if has_loss else []
            cells.append([row.name, *values])
        return cells

    def _published_cells(self, row: ResultRow) -> list[str] | None:
        if row.published is None:
            return None
        figures = [_show(row.published.get(name)) for name in (*self.benchmarks, "average")]
        return [f"{row.name}, published", *figures]

    def _best_rows(self) -> dict[int, list[int]]:
        """Column of `_cells` -> rows with its highest score; the teacher is only a reference."""
        best: dict[int, list[int]] = {}
        for column, name in enumerate([*self.benchmarks, "average"], start=1):
            scores = {
                number: row.average if name == "average" else row.scores[name]
                for number, row in enumerate(self.rows)
                if row.label != "teacher"
            }
            known = {number: score for number, score in scores.items() if score is not None}
            if len(known) > 1:
                top = max(known.values())
                best[column] = [number for number, score in known.items() if score == top]
        return best


def results_table(rows: Sequence[ResultRow]) -> ResultsTable:
    """Put rows in the table's order.

    Raises GraceError when there is no row, two rows share a name, or the rows were not scored on
    the same benchmarks, since their averages could not be compared.
    """
    if not rows:
        raise GraceError("the results table has no row; evaluate at least one model")
    names = [row.name for row in rows]
    if len(set(names)) != len(names):
        raise GraceError(f"two rows share a name: {', '.join(names)}")
    order = list(rows[0].scores)
    for row in rows:
        if set(row.scores) != set(order):
            raise GraceError(
                f"{row.name} was scored on {sorted(row.scores)}, {rows[0].name} on "
                f"{sorted(order)}; evaluate all models on the same benchmarks"
            )
    labels = list(TITLES)
    return ResultsTable(
        tuple(
            replace(row, scores={name: row.scores[name] for name in order})
            for row in sorted(rows, key=lambda row: labels.index(row.label))
        )
    )


def _show(value: float | None, form: str = ".1f", unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
