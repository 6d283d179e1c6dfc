"""The model zoo as one HTML file: no script from elsewhere, no font, no request."""

from __future__ import annotations

from html import escape

from grace_core.export.amounts import in_bytes
from grace_core.lineage.picture import picture
from grace_core.publish.zoo import (
    BITS_SHOWN,
    Zoo,
    ZooModel,
    identity,
    score,
    speed,
    titled,
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5d6778; --line: #dfe3ea; --page: #f6f7f9;
  --card: #ffffff; --bf16: #3a6ea5; --w8: #3c7d42; --w4: #b45f24; --best: #1d2430; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #313947;
  --page: #12161d; --card: #1a202a; --bf16: #7fb0e3; --w8: #7cc283; --w4: #e79a63; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .8rem; }
p.lead { margin: 0 0 1.6rem; color: var(--soft); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .6rem .65rem; text-align: right; white-space: nowrap; }
th { font-size: .78rem; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line);
  vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--card); }
th:nth-child(2), td:nth-child(2) { text-align: left; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: 3px; }
.badge { display: inline-block; min-width: 3.3em; text-align: center; padding: 0 .55em;
  border: 1px solid currentColor; border-radius: 99px; font-size: .8rem; font-weight: 600; }
.bf16 { color: var(--bf16); } .w8 { color: var(--w8); } .w4 { color: var(--w4); }
.under { display: block; font-size: .78rem; color: var(--soft); }
.bar { display: block; height: 4px; margin-top: 4px; border-radius: 2px; background: var(--line);
  min-width: 4.5rem; }
.bar i { display: block; height: 100%; border-radius: 2px; background: currentColor; }
.best { font-weight: 700; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin-bottom: .6rem; }
summary { cursor: pointer; padding: .7rem 1rem; }
summary code { color: var(--soft); font-size: .82rem; margin-left: .6rem; }
.picture { overflow-x: auto; background: #ffffff; color: #1d2430; padding: 1rem;
  border-radius: 0 0 10px 10px; }
footer { margin-top: 2rem; color: var(--soft); font-size: .85rem; }
"""


def to_html(zoo: Zoo) -> str:
    """The whole document."""
    backbones = sorted({model.backbone for model in zoo.models})
    lead = f"{len(zoo.models)} released models from {', '.join(backbones)}, found in {zoo.source}."
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Model zoo: {escape(zoo.source)}</title><style>{_STYLE}</style></head><body><main>",
        f'<h1>Model zoo</h1><p class="lead">{escape(lead)}</p>',
        f'<div class="scroll" tabindex="0" role="region" aria-label="Models">{_table(zoo)}</div>',
        "<h2>Where they came from</h2>",
        *(_lineage(model) for model in zoo.models if not model.form == "awq"),
        f"<footer>{escape(_notes(zoo))}</footer></main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(zoo: Zoo) -> str:
    head = ["Model", "Weights", "Group", "Size", "Average", "of BF16"]
    head += ["Tokens/s", "Memory"] if zoo.has_speed else []
    head += [titled(name) for name in zoo.benchmarks]
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    best = {name: _best(zoo, name) for name in zoo.benchmarks}
    largest = max(model.size for model in zoo.models)
    rows = [_row(zoo, model, best, largest) for model in zoo.models]
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(zoo: Zoo, model: ZooModel, best: dict[str, float | None], largest: int) -> str:
    name = escape(model.name)
    if (model.where or "").startswith("http"):
        name = f'<a href="{escape(str(model.where))}">{name}</a>'
    under = f'<span class="under">{escape(model.backbone)}</span>'
    _, group, form, _ = identity(model)
    badge = f'<span class="badge {model.precision}">{BITS_SHOWN[model.precision]}</span>'
    size = f"{in_bytes(model.size)}{_bar(model.precision, model.size / largest)}"
    cells = [
        f"<td>{name}{under}</td>",
        f'<td>{badge}<span class="under">{escape(form)}</span></td>',
        f"<td>{group or '–'}</td>",
        f"<td>{size}</td>",
    ]
    average = model.average
    bar = "" if average is None else _bar(model.precision, average / 100)
    cells.append(f"<td>{score(average)}{bar}</td>")
    cells.append(f"<td>{score(zoo.kept(model), ' %')}</td>")
    if zoo.has_speed:
        cells += [f"<td>{text}</td>" for text in speed(model)]
    for benchmark in zoo.benchmarks:
        value = model.scores.get(benchmark)
        mark = ' class="best"' if value is not None and value == best[benchmark] else ""
        cells.append(f"<td{mark}>{score(value)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _best(zoo: Zoo, benchmark: str) -> float | None:
    known = [model.scores.get(benchmark) for model in zoo.models]
    found = [value for value in known if value is not None]
    return max(found) if len(found) > 1 else None


def _bar(kind: str, share: float) -> str:
    width = 100 * min(1.0, max(0.0, share))
    return f'<span class="bar {kind}" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>'


def _lineage(model: ZooModel) -> str:
    if model.lineage is None:
        return ""
    # One document, several drawings: the arrow head's name must be each one's own.
    drawing = picture(model.lineage).replace('"head"', f'"head-{model.digest[:12]}"')
    drawing = drawing.replace("url(#head)", f"url(#head-{model.digest[:12]})")
    return (
        f"<details><summary>{escape(model.name)}<code>{model.digest[:12]}</code></summary>"
        f'<div class="picture">{drawing}</div></details>'
    )


def _notes(zoo: Zoo) -> str:
    notes = [
        "Scores in percent; the highest of each benchmark in bold.",
        "Sizes are those on disk.",
    ]
    devices = sorted({model.measured_on for model in zoo.models if model.measured_on})
    if devices:
        notes.append(f"Tokens/s: one sequence, decoded on {', '.join(devices)}.")
    return " ".join(notes)
