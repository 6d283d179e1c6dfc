"""`grace doctor`: everything that a run needs, looked at before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grace_core.cli.app import ConfigFile, Settings, app
from grace_core.config import GraceConfig, load_config
from grace_core.doctor.findings import Finding, Severity, as_rows, problems, summary

if TYPE_CHECKING:
    from grace_core.plan import Goal

_STYLES = {
    Severity.OK: "green",
    Severity.INFORMATION: "dim",
    Severity.WARNING: "yellow",
    Severity.UNCHECKED: "magenta",
    Severity.PROBLEM: "bold red",
}


def examine_all(config: GraceConfig, goal: Goal = "publish") -> list[Finding]:
    """The checks of the core, and those of the servers that are configured."""
    from grace_core.doctor.examination import examine
    from operations.check_mlflow import check_mlflow
    from operations.check_prefect import check_prefect
    from operations.publishing_rights import check_token

    return [*examine(config, goal, check_token), *check_prefect(), *check_mlflow()]


@app.command(
    rich_help_panel="Whole pipeline",
    epilog="Example: grace doctor configs/toy.yaml --set run_dir=/data/runs/first",
)
def doctor(
    config: ConfigFile,
    settings: Settings = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON list of findings instead of a table.")
    ] = False,
) -> None:
    """Check machine, disk, packages, data, models, servers and Hub for a run of this configuration.

    Loads no weights and downloads nothing. Every finding comes with its remedy; ends with exit code
    1 when there is a problem, which would stop the run. Flows and commands check the same first.
    """
    import json

    findings = examine_all(load_config(config, settings or []))
    if as_json:
        typer.echo(json.dumps(as_rows(findings), indent=1))
    else:
        _show(findings, Console())
    if problems(findings):
        raise typer.Exit(1)


def _show(findings: Sequence[Finding], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", "result", "finding", "remedy"):
        table.add_column(column, overflow="fold", ratio={"finding": 3, "remedy": 2}.get(column))
    for finding in findings:
        style = _STYLES[finding.severity]
        table.add_row(
            finding.area,
            f"[{style}]{finding.severity}[/]",
            escape(finding.text),
            escape(finding.remedy),
        )
    console.print(table)
    console.print(summary(findings), highlight=False)
