"""Commands for recorded responses: score them again, and try the readers on cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from grace_core.cli.app import app, console
from grace_core.errors import GraceError
from grace_core.whole_files import write_whole

if TYPE_CHECKING:
    from grace_core.evaluation.score import BenchmarkScore

_PANEL = "Scoring"
_BREAK_DOWN = ".by_", "_by_"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command(
    rich_help_panel=_PANEL,
    epilog="Examples:\n\n"
    "grace score mmstar --items items.jsonl --responses responses.jsonl\n\n"
    "grace score mmmu --items items.jsonl --responses responses.jsonl --json --output scored.jsonl",
)
def score(
    benchmark: Annotated[
        str,
        typer.Argument(
            help="Name of the benchmark, such as mmstar; `grace benchmark list` shows them all.",
            show_default=False,
        ),
    ],
    items: Annotated[
        Path,
        typer.Option(
            help="The benchmark's rows, JSON Lines with the data set's own columns; question and "
            "pictures may be absent.",
            show_default=False,
        ),
    ],
    responses: Annotated[
        Path,
        typer.Option(
            help='Lines of {"id", "response"}, with "error" where an item ended in one.',
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Show the break-downs by category too.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write what was read from each response, and whether it is right, to this file.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Score recorded responses as the benchmark's authors do ("official...") and by one rule that
    all benchmarks share ("policy...").

    A response from which no answer can be read is wrong, and counted. An error is not an answer.
    Where items have no response there is no headline number, and the reason is given.
    """
    from grace_core.evaluation.benchmarks import find_benchmark
    from grace_core.evaluation.recorded import read_items, read_responses
    from grace_core.evaluation.score import score as judge

    declared = find_benchmark(benchmark)
    if output is not None and not output.parent.is_dir():
        raise GraceError(f"the folder of {output} does not exist; make it, or name another file")
    recorded = read_items(declared, items)
    result = judge(declared, recorded.golds, read_responses(responses), recorded.aside)
    if output is not None:
        lines = (json.dumps(item.to_dict(), ensure_ascii=False) + "\n" for item in result.items)
        write_whole(output, "".join(lines))
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
    else:
        _show(result, everything)


def _show(result: BenchmarkScore, everything: bool) -> None:
    table = Table(title=result.benchmark.title)
    for heading in ("Metric", "Right", "Of", "Percent"):
        table.add_column(heading, justify="left" if heading == "Metric" else "right")
    hidden = 0
    for name, metric in result.metrics.items():
        if not everything and any(mark in name for mark in _BREAK_DOWN):
            hidden += 1
            continue
        counts = ["" if count is None else str(count) for count in (metric.correct, metric.total)]
        table.add_row(name, *counts, f"{metric.percent:.2f}")
    console.print(table)
    if hidden:
        console.print(f"{hidden} break-downs more with --all", highlight=False)
    for rule in result.rules:
        unread = f"{len(rule.parse_failures)} unreadable"
        console.print(
            f"{rule.rule.name} ({unread}): {rule.rule.source}", markup=False, highlight=False
        )
    console.print(f"\nCoverage: {result.coverage}", highlight=False)
    for name, metric in result.headlines.items():
        console.print(f"Headline: {metric.percent:.2f} % ({name})", highlight=False)
    if result.headline_refused is not None:
        console.print(f"No headline: {result.headline_refused}", highlight=False)


@app.command(rich_help_panel=_PANEL, epilog="Example: grace extract --cases answer_cases.json")
def extract(
    cases: Annotated[
        Path,
        typer.Option(
            help="A list of objects with kind (mcq, yesno, open), response, expected, and choices "
            "or gold.",
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Read answers from recorded cases: how many come out as expected, and every one that differs.

    Letters are read by the rule that all benchmarks share, or by MMMU's own parser where the case's
    "authority" is MMMU. A case is right when it equals "expected", or "policy_expected" where it
    has that.
    """
    from grace_core.evaluation.agreement import read_cases

    found = read_cases(cases).to_dict()
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for name, counts in [*found["kinds"].items(), ("all", found)]:
        console.print(f"{name}: {_of(counts)}", highlight=False)
    if found["unanimous"]["cases"]:
        unanimous = _of(found["unanimous"])
        console.print(f"of those that all implementations agree on: {unanimous}", highlight=False)
    for case in found["differing"]:
        console.print(
            f"\n{case.get('id', '')} ({case['kind']}): {case['found']!r} instead of "
            f"{case['expected']!r}\n  {case['response']!r}",
            markup=False,
            highlight=False,
        )


def _of(counts: dict[str, Any]) -> str:
    return f"{counts['right']} of {counts['cases']} as expected ({counts['percent']:.1f} %)"
