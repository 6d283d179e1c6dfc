"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

from grace_core.evaluation.report.comparison import AVERAGE
from grace_core.evaluation.report.document import Report
from grace_core.evaluation.report.html.items import mistakes
from grace_core.evaluation.report.html.parts import table
from grace_core.evaluation.report.html.scores import categories, coverage, metrics, results
from grace_core.evaluation.report.html.verdicts import differences, gate, retention
from grace_core.evaluation.report.plots import Plot
from grace_core.evaluation.report.resampling import LEVEL, RESAMPLES


def page(report: Report, plots: Sequence[Plot]) -> str:
    """The whole document."""
    sections = {
        "results": ("Results", results(report)),
        "plots": ("Plots", _figures(plots)),
        "differences": ("Differences", differences(report)),
        "retention": ("Retention", retention(report)),
        "gate": ("Regression gate", gate(report)),
        "coverage": ("Coverage", coverage(report)),
        "categories": ("By category", categories(report)),
        "items": ("Worst items", mistakes(report)),
        "metrics": ("All metrics", metrics(report)),
        "sources": ("How it was made", _sources(report)),
    }
    shown = {key: each for key, each in sections.items() if each[1]}
    links = "".join(f'<a href="#{key}">{name}</a>' for key, (name, _) in shown.items())
    body = "\n".join(
        f'<section id="{key}"><h2>{name}</h2>\n{text}\n</section>'
        for key, (name, text) in shown.items()
    )
    title = escape(report.title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1>\n{_introduction(report)}<nav>{links}</nav></header>\n<main>\n"
        f"{_tiles(report)}\n{body}\n</main>\n<script>\n{_asset('page.js')}</script>\n"
        "</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _introduction(report: Report) -> str:
    models, benchmarks = len(report.models), report.benchmarks
    dates = [model.manifest.created[:10] for model in report.models if model.manifest]
    date = f", evaluated {max(dates)}" if dates else ""
    return (
        f'<p class="soft">{models} models on {escape(", ".join(benchmarks))}{date}. Intervals hold '
        f"{LEVEL:g} % of {RESAMPLES:,} paired bootstrap resamples.</p>\n"
    )


def _tiles(report: Report) -> str:
    tiles = []
    estimates = report.comparison.estimates
    kept = {each.model: f", keeps {each.value:.1f} %" for each in report.comparison.retention}
    for model in report.models:
        average = estimates[model.key].get(AVERAGE)
        if model.label in ("bf16", "w8", "w4"):
            value = "–" if average is None else f"{average.value:.1f} %"
            tiles.append((value, f"{model.key}{kept.get(model.key, '')}", ""))
    if report.gate is not None and report.gate.checks:
        failed = len(report.gate.shortfalls)
        words = f"{len(report.gate.checks) - failed} of {len(report.gate.checks)} checks passed"
        state = ("open", "good") if not failed else ("closed", "bad")
        if failed and report.gate.override is not None:
            state = ("overridden", "bad")
        tiles.append((state[0], f"regression gate: {words}", state[1]))
    shown = "".join(
        f'<div class="tile"><b class="{kind}">{escape(value)}</b><span>{escape(words)}</span></div>'
        for value, words, kind in tiles
    )
    return f'<div class="tiles">{shown}</div>' if shown else ""


def _figures(plots: Sequence[Plot]) -> str:
    figures = [
        f'<figure role="img" aria-label="{escape(plot.title)}. {escape(plot.words)}">'
        f"<figcaption>{escape(plot.title)}</figcaption>{plot.svg}</figure>"
        for plot in plots
    ]
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _sources(report: Report) -> str:
    rows = []
    for model in report.models:
        digest = "" if model.manifest is None else model.manifest.digest[:12]
        size = "" if model.model_bytes is None else f"{model.model_bytes / 1e6:,.1f} MB"
        pixels = "" if model.pixels is None else "{:,} to {:,}".format(*model.pixels)
        speed = model.questions_per_second
        shown = "" if speed is None else f"{speed:,.1f}"
        rows.append(
            f'<tr><th scope="row">{escape(model.key)}</th><td>{size}</td><td>{pixels}</td>'
            f"<td>{shown}</td><td>{escape(model.hardware)}</td><td><code>{digest}</code></td>"
            f"<td><code>{escape(str(model.folder))}</code></td></tr>"
        )
    heads = ["Model", "weights", "pixels a picture", "questions a second", "on", "digest", "folder"]
    return table(heads, rows) + (
        '<p class="soft">Every number is computed from the recorded answers in these folders: '
        f"items are drawn with replacement, those about one picture together, the "
        f"same for all models, {RESAMPLES:,} times, seed {report.seed}; the average weighs all "
        "benchmarks alike. An interval says how far other questions of the same kind could move a "
        "score; not what another training run would give.</p>"
    )
