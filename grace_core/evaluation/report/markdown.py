"""The report as Markdown, for places that show no page."""

from __future__ import annotations

from grace_core.evaluation.report.comparison import AVERAGE, Difference
from grace_core.evaluation.report.document import Report
from grace_core.evaluation.report.resampling import LEVEL, RESAMPLES, Interval


def markdown(report: Report) -> str:
    """Results, differences, retention, gate, coverage and categories."""
    parts = [
        f"# {_plain(report.title)}",
        report.table().to_markdown(),
        _published(report),
        _section("Differences", _differences(report)),
        _section("Retention", _retention(report)),
        _section("Regression gate", _plain(report.gate.in_words) if report.gate else ""),
        _section("Coverage", _coverage(report)),
        _section("By category", _categories(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _published(report: Report) -> str:
    if report.published is None:
        return ""
    source = report.published
    return f"In italics: published figures, [{source.title}]({source.address}); {source.protocol}."


def _differences(report: Report) -> str:
    by_pair: dict[tuple[str, str], dict[str, Difference]] = {}
    for each in report.comparison.differences:
        by_pair.setdefault((each.first, each.second), {})[each.on] = each
    if not by_pair:
        return ""
    columns = [AVERAGE, *report.benchmarks]
    rows = [
        [f"{first} − {second}", *(_difference(found.get(name)) for name in columns)]
        for (first, second), found in by_pair.items()
    ]
    words = (
        f"Percentage points with {LEVEL:g} % intervals of {RESAMPLES:,} paired bootstrap "
        "resamples; ▲ better, ▼ worse, unmarked: no difference shown."
    )
    return f"{words}\n\n{_table(['First − second', *columns], rows)}"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    mark = {"better": "▲ ", "worse": "▼ "}.get(difference.verdict, "")
    return f"{mark}{difference.value:+.1f} [{_ends(difference.interval, '+.1f')}]"


def _retention(report: Report) -> str:
    rows = [
        [each.model, f"{each.value:.1f} %", _ends(each.interval) if each.interval else "–"]
        for each in report.comparison.retention
    ]
    return _table(["Model", "of BF16's average", f"{LEVEL:g} % interval"], rows) if rows else ""


def _coverage(report: Report) -> str:
    rows = [
        [
            model.key,
            name,
            f"{score.answered:,} of {score.total:,}",
            *(
                f"{count:,}"
                for count in (score.parse_failures, score.cut_off, score.errors, score.missing)
            ),
            score.part or "",
        ]
        for model in report.models
        for name, score in model.scores.items()
    ]
    counted = ["answered", "unreadable", "of these cut off", "errors", "missing", "a part"]
    heads = ["Model", "benchmark", *counted]
    return "\n\n".join(part for part in (_table(heads, rows), _pixels(report)) if part)


def _pixels(report: Report) -> str:
    by_limits: dict[tuple[int, int], list[str]] = {}
    for model in report.models:
        if model.pixels is not None:
            by_limits.setdefault(model.pixels, []).append(model.key)
    parts = [
        f"to between {low:,} and {high:,} pixels ({', '.join(keys)})"
        for (low, high), keys in by_limits.items()
    ]
    return f"Pictures were resized {'; '.join(parts)}." if parts else ""


def _categories(report: Report) -> str:
    parts = []
    for name in report.benchmarks:
        for kind, values in report.categories(name).items():
            rows = []
            for value, metrics in values.items():
                found = [metrics.get(model.key) for model in report.models]
                shares = ["–" if each is None else f"{each.percent:.1f}" for each in found]
                rows.append([value, *shares])
            heads = [f"{name}: {kind}", *(model.key for model in report.models)]
            parts.append(_table(heads, rows))
    return "\n\n".join(parts)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text of others as it is: no HTML, no cell ended early."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _ends(interval: Interval, form: str = ".1f") -> str:
    return f"{interval.low:{form}}, {interval.high:{form}}"
