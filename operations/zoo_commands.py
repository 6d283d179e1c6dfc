"""`grace zoo`: all released models in one table, from files or from MLflow's records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grace_core.cli.app import app, console
from grace_core.errors import GraceError


@app.command(
    rich_help_panel="Lineage",
    epilog="Examples:\n\n"
    "grace zoo runs/demo                                  models of a run, on the terminal\n\n"
    "grace zoo runs/demo/releases --out zoo               published models, as a page\n\n"
    "grace zoo runs --speed decode.json --out zoo         with what grace bench decode measured\n\n"
    "grace zoo --registry --out zoo                       what MLflow knows",
)
def zoo(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="A run's folder, one of several runs, or one of published models.",
            show_default=False,
        ),
    ] = None,
    registry: Annotated[
        bool,
        typer.Option("--registry", help="Ask the MLflow server at MLFLOW_TRACKING_URI instead."),
    ] = False,
    speed: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON file of `grace bench decode`: its speed and memory of each precision.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write zoo.md and index.html here; without, the table is printed as Markdown.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List all released models: size, bits, group, scores, speed, memory, lineage."""
    from grace_core.publish.zoo import find_zoo, to_markdown, with_speed
    from grace_core.publish.zoo_page import to_html
    from grace_core.whole_files import write_whole

    if (folder is None) == (not registry):
        raise GraceError("say which models: give a folder, or --registry, not both")
    if registry:
        from operations.mlflow_zoo import zoo_in_mlflow

        found = zoo_in_mlflow()
    else:
        assert folder is not None
        found = find_zoo(folder)
    if speed is not None:
        found = with_speed(found, speed)
    if out is None:
        typer.echo(to_markdown(found), nl=False)
        return
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "zoo.md", "# Model zoo\n\n" + to_markdown(found, beside=out))
    write_whole(out / "index.html", to_html(found))
    for name in ("zoo.md", "index.html"):
        console.print(str(out / name), markup=False, highlight=False, soft_wrap=True)
