"""Tables of what was measured: results, coverage, categories, every metric."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from grace_core.evaluation.report.comparison import AVERAGE, Estimate
from grace_core.evaluation.report.document import Report
from grace_core.evaluation.report.html.parts import ends, table
from grace_core.evaluation.report.plots import COLOURS
from grace_core.evaluation.report.recorded import RecordedModel


def results(report: Report) -> str:
    columns = [*report.benchmarks, AVERAGE]
    has_loss = any(model.held_out_loss is not None for model in report.models)
    named = [report.heading(name) for name in report.benchmarks]
    heads = ["Model", *named, AVERAGE, *(["held-out loss"] if has_loss else [])]
    best = {column: _best(report, column) for column in columns}
    rows = []
    for model in report.models:
        cells = [_model_cell(model)]
        for column in columns:
            estimate = report.comparison.estimates[model.key].get(column)
            kind = "best" if model.key in best[column] else ""
            cells.append(_estimate_cell(model, column, estimate, kind))
        if has_loss:
            loss = model.held_out_loss
            shown = "–" if loss is None else f"{loss:.3f}"
            value = "" if loss is None else f"{loss:.6f}"
            cells.append(f'<td data-value="{value}">{shown}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
        rows += _published_row(report, model, columns, extra=has_loss)
    caption = (
        "Scores in percent and their intervals; the best student of each column is bold. "
        "A head sorts its column."
    )
    note = ""
    if report.published is not None:
        note = (
            f'<p class="soft">In italics: published figures, <a href="'
            f'{escape(report.published.address)}">{escape(report.published.title)}</a>; '
            f"{escape(report.published.protocol)}.</p>"
        )
    return table(heads, rows, caption, sortable=True) + note


def _model_cell(model: RecordedModel) -> str:
    dot = f'<span class="dot" style="background:{COLOURS[model.label]}"></span>'
    return f'<th scope="row" data-value="{escape(model.key)}">{dot}{escape(model.key)}</th>'


def _estimate_cell(model: RecordedModel, column: str, estimate: Estimate | None, kind: str) -> str:
    if estimate is None:
        refused = model.scores[column].headline_refused if column in model.scores else None
        why = f"<small>{escape(refused)}</small>" if refused else ""
        return f'<td data-value="">–{why}</td>'
    within = f"<small>{ends(estimate.interval)}</small>" if estimate.interval else ""
    return f'<td class="{kind}" data-value="{estimate.value:.6f}">{estimate.value:.1f}{within}</td>'


def _best(report: Report, column: str) -> list[str]:
    values = {
        model.key: report.comparison.estimates[model.key][column].value
        for model in report.models
        if model.label != "teacher" and column in report.comparison.estimates[model.key]
    }
    return [key for key, value in values.items() if value == max(values.values())]


def _published_row(
    report: Report, model: RecordedModel, columns: Sequence[str], *, extra: bool
) -> list[str]:
    published = report.published
    if published is None:
        return []
    figures = {**published.scores.get(model.label, {})}
    if model.label in published.averages:
        figures[AVERAGE] = published.averages[model.label]
    if not figures:
        return []
    cells = [
        f"<td>{figures[name]:.1f}</td>" if name in figures else "<td></td>" for name in columns
    ]
    empty = "<td></td>" if extra else ""
    return [f'<tr class="published"><th scope="row">published</th>{"".join(cells)}{empty}</tr>']


def coverage(report: Report) -> str:
    rows = []
    for model in report.models:
        for name, score in model.scores.items():
            part = "" if score.part is None else f"a part: {score.part}"
            notes = "; ".join(filter(None, (score.headline_refused, part)))
            counts = (
                score.answered,
                score.total,
                score.parse_failures,
                score.cut_off,
                score.errors,
                score.missing,
            )
            cells = "".join(
                f'<td class="{"worse" if at > 1 and count else ""}">{count:,}</td>'
                for at, count in enumerate(counts)
            )
            rows.append(
                f'<tr><th scope="row">{escape(model.key)}</th><td>{escape(name)}</td>{cells}'
                f"<td>{escape(notes)}</td></tr>"
            )
    counted = ("answered", "of", "unreadable", "of these cut off", "errors", "missing")
    heads = ["Model", "benchmark", *counted, ""]
    caption = (
        "An unreadable answer counts as wrong; one that was cut off had no tokens left. Errors and "
        "missing items are not answers: where there are any, no number stands for the benchmark."
    )
    return table(heads, rows, caption)


def categories(report: Report) -> str:
    parts = []
    for name in report.benchmarks:
        for kind, values in report.categories(name).items():
            heads = [kind.replace("_", " "), *(model.key for model in report.models), "items"]
            rows = []
            for value, metrics in values.items():
                shares = [metrics.get(model.key) for model in report.models]
                cells = "".join(
                    f'<td data-value="{share.percent:.6f}">{share.percent:.1f}</td>'
                    if share
                    else '<td data-value="">–</td>'
                    for share in shares
                )
                totals = {share.total for share in shares if share and share.total}
                total = f"{totals.pop():,}" if len(totals) == 1 else ""
                number = total.replace(",", "")
                rows.append(
                    f'<tr><th scope="row" data-value="{escape(value)}">{escape(value)}</th>{cells}'
                    f'<td data-value="{number}">{total}</td></tr>'
                )
            parts.append(
                f"<h3>{escape(name)}</h3>" + table(heads, rows, "Per cent right.", sortable=True)
            )
    return "".join(parts)


def metrics(report: Report) -> str:
    parts = []
    for name in report.benchmarks:
        names: dict[str, None] = {}
        for model in report.models:
            if name in model.scores:
                names |= dict.fromkeys(model.scores[name].metrics)
        rows = []
        for metric in names:
            cells = []
            for model in report.models:
                found = model.scores[name].metrics.get(metric) if name in model.scores else None
                counts = ""
                if found is not None and found.correct is not None:
                    counts = f"<small>{found.correct:,} / {found.total:,}</small>"
                cells.append(
                    "<td>–</td>" if found is None else f"<td>{found.percent:.2f}{counts}</td>"
                )
            rows.append(
                f'<tr><th scope="row"><code>{escape(metric)}</code></th>{"".join(cells)}</tr>'
            )
        rules: dict[str, str] = {}
        for model in report.models:
            if name in model.scores:
                rules |= {key: each.rule for key, each in model.scores[name].rules.items()}
        listed = "".join(
            f"<li><code>{escape(rule)}</code>: {escape(words)}</li>"
            for rule, words in rules.items()
        )
        shown = table(["metric", *(model.key for model in report.models)], rows)
        parts.append(
            f"<details><summary>{escape(name)}: {len(names)} metrics</summary>"
            f"<ul>{listed}</ul>{shown}</details>"
        )
    return "".join(parts)
