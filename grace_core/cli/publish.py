"""`grace publish`: send the finished models to their destination, or see what that would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from grace_core.cli.app import (
    STAGE_PANEL,
    ConfigFile,
    Settings,
    app,
    console,
    running,
    show_releases,
)

if TYPE_CHECKING:
    from grace_core.publish.preview import Preview


@app.command(
    rich_help_panel=STAGE_PANEL,
    epilog="Examples:\n\n"
    "grace publish configs/toy.yaml --dry-run        what would change at the destination?\n\n"
    "grace publish configs/toy.yaml --approved-by me",
)
def publish(
    config: ConfigFile,
    settings: Settings = None,
    approved_by: Annotated[
        str | None,
        typer.Option(
            help="Who has looked at the results; needed where publish.approval is true.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; show what would be changed.")
    ] = False,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="On the Hub: do not wait for another publication that may be under way.",
        ),
    ] = False,
) -> None:
    """Send the releases with their model cards to a directory or the Hugging Face Hub.

    All models go out as one release: each is sent and verified before the first
    one is switched. Interrupted, the same command completes it. For the Hub, the
    environment variable HF_TOKEN holds the token. See docs/publishing.md.
    """
    from grace_core.publish.approval import Approval
    from grace_core.publish.release_set import HubAccess

    access = HubAccess(take_over=take_over)
    if dry_run:
        with running(config, settings, "publish", finished_only=True) as chain:
            seen = chain.preview(access)
        _show_preview(seen)
        return
    approval = Approval.now(approved_by) if approved_by else None
    with running(config, settings, "publish") as chain:
        published = chain.publication(approval, access)
    show_releases(published)


def _show_preview(seen: Preview) -> None:
    from grace_core.export.amounts import in_bytes

    table = Table(title="What would be published")
    for name in ("Destination", "Now", "Then"):
        table.add_column(name, overflow="fold")
    table.add_column("To send", justify="right")
    for model in seen.models:
        table.add_row(model.location, model.now, model.then, in_bytes(model.bytes))
    console.print(table)
    for note in seen.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    for problem in seen.problems:
        console.print(f"would stop: {problem}", style="red", markup=False, soft_wrap=True)
    console.print("Nothing was changed.")
    if seen.problems:
        raise typer.Exit(1)
