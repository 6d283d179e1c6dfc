"""`grace report`: recorded evaluations side by side, without evaluating anything again."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from grace_core.cli.app import app, console


@app.command(
    rich_help_panel="Whole pipeline",
    epilog="Examples:\n\n"
    "grace report runs/demo --open                  one run as a page\n\n"
    "grace report runs/demo --card-table            the results table of the model card\n\n"
    "grace report runs/first runs/second --out both two runs side by side",
)
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="A run's folder, an evaluation's folder or its results.json; repeatable.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write. Without: report/ in the run's folder, or here.",
            show_default=False,
        ),
    ] = None,
    open_page: Annotated[
        bool, typer.Option("--open", help="Show the page in the browser.")
    ] = False,
    card_table: Annotated[
        bool,
        typer.Option(
            "--card-table", help="Only print the results table of the model card, as Markdown."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Only print everything that is computed, as JSON.")
    ] = False,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
) -> None:
    """Compare evaluated models: tables with intervals, verdicts, plots and the worst items.

    Everything comes from the answers that were recorded, in seconds. Written are index.html, which
    needs no other file, report.md, report.json, table.md and the plots.
    """
    from grace_core.errors import GraceError
    from grace_core.evaluation.report.document import make_report
    from grace_core.evaluation.report.files import FOLDER, as_json_text, write_report
    from grace_core.evaluation.report.recorded import find_recorded
    from grace_core.stages.reporting import find_items

    if card_table and as_json:
        raise GraceError("--card-table and --json each print alone; give one of them")
    models = find_recorded(results)
    names = [model.run_config.get("publish", {}).get("name") for model in models]
    heading = title or " and ".join(dict.fromkeys(filter(None, names))) or "Evaluation"
    printed = card_table or as_json
    made = make_report(models, title=heading, seed=seed, find_items=None if printed else find_items)
    if card_table:
        typer.echo(made.table().to_markdown())
    elif as_json:
        typer.echo(as_json_text(made), nl=False)
    else:
        # An evaluation's own folder is an artifact, to which nothing may be added.
        one_run = len(results) == 1 and (results[0] / "artifacts").is_dir()
        folder = out or (results[0] / FOLDER if one_run else Path(FOLDER))
        page = write_report(made, folder).absolute()
        console.print(made.table().to_rich())
        console.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)
        if open_page:
            webbrowser.open(page.as_uri())
