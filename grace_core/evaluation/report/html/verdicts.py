"""Tables of what follows: differences, retention, the gate."""

from __future__ import annotations

from html import escape

from grace_core.evaluation.report.comparison import AVERAGE, Difference
from grace_core.evaluation.report.document import Report
from grace_core.evaluation.report.html.parts import ends, table

_MARKS = {"better": "▲ ", "worse": "▼ ", "no difference shown": ""}


def differences(report: Report) -> str:
    by_pair: dict[tuple[str, str], dict[str, Difference]] = {}
    for each in report.comparison.differences:
        by_pair.setdefault((each.first, each.second), {})[each.on] = each
    columns = [AVERAGE, *(name for name in report.benchmarks)]
    rows = []
    for (first, second), found in by_pair.items():
        cells = [f'<th scope="row">{escape(first)} − {escape(second)}</th>']
        for column in columns:
            cells.append(_difference_cell(found.get(column)))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    words = (
        "<p>Percentage points on the same items, and their interval. ▲ the first model is better, "
        "▼ it is worse: the interval leaves out 0. Otherwise no difference is shown, which is not "
        "the same as none. "
        "Each verdict stands alone; among twenty pairs of equal models, about one would differ by "
        "chance. In brackets: items that only the first, only the second has right.</p>"
    )
    refused = "".join(
        f'<p class="soft">{escape(name)} is left out: {escape(reason)}.</p>'
        for name, reason in report.comparison.unresampled.items()
    )
    if not rows:
        return refused
    return words + table(["First − second", *columns], rows) + refused


def _difference_cell(difference: Difference | None) -> str:
    if difference is None:
        return "<td>–</td>"
    kind = {"better": "better", "worse": "worse"}.get(difference.verdict, "")
    only = ""
    if difference.only_first is not None:
        only = f"<small>({difference.only_first} : {difference.only_second})</small>"
    return (
        f'<td class="{kind}" title="{difference.verdict}">{_MARKS[difference.verdict]}'
        f"{difference.value:+.1f}<small>{ends(difference.interval, '+.1f')}</small>{only}</td>"
    )


def retention(report: Report) -> str:
    rows = [
        f'<tr><th scope="row">{escape(each.model)}</th><td>{escape(each.of)}</td>'
        f"<td>{each.value:.1f} %</td><td>{ends(each.interval) if each.interval else '–'}</td></tr>"
        for each in report.comparison.retention
    ]
    if not rows:
        return ""
    return table(
        ["Quantized model", "beside", "keeps", "interval"],
        rows,
        "Per cent of the BF16 model's average over the benchmarks.",
    )


def gate(report: Report) -> str:
    gate = report.gate
    if gate is None:
        return ""
    kind = "notice open" if gate.passed else "notice"
    override = f"\nPublished all the same: {gate.override}" if gate.override else ""
    text = f'<p class="{kind}">{escape(gate.in_words)}{escape(override)}</p>'
    if not gate.checks:
        return text
    rows = []
    for check in gate.checks:
        found = "–" if check.found is None else f"{check.found:.2f}"
        side = "at most" if check.demand == "parse failures" else "at least"
        state = (
            '<td class="better">passed</td>' if check.passed else '<td class="worse">failed</td>'
        )
        rows.append(
            f'<tr><th scope="row">{escape(check.model)}</th><td>{check.demand}</td>'
            f"<td>{escape(check.on)}</td><td>{side} {check.needed:g} {escape(check.unit)}</td>"
            f"<td>{found}</td>{state}</tr>"
        )
    heads = ["Model", "demand", "on", "needed", "found", "verdict"]
    caption = f"Held against the demands: the {gate.decides.replace('_', ' ')}."
    shown = table(heads, rows, caption)
    return f"{text}<details><summary>All checks</summary>{shown}</details>"
