"""The command line `grace`: the core's commands, and those that ask Prefect or MLflow.

Whatever is slow to import (both are) is imported when it is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grace_core.cli.app import app, console, main
from operations.doctor import doctor
from operations.lineage_commands import lineage, reproduce
from operations.zoo_commands import zoo

__all__ = ["app", "doctor", "lineage", "main", "reproduce", "zoo"]

_SERVERS = "Servers"


@app.command(
    rich_help_panel=_SERVERS,
    epilog="Examples:\n\n"
    "grace setup --dry-run                           what would it change?\n\n"
    "grace setup --gpus 2                            two trainings at a time\n\n"
    "grace setup --notify slack-webhook/operators    tell people of failures",
)
def setup(
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many runs of the GPU pool may go at once: its GPUs, divided by what one run "
            "takes (launch.processes). Without: as it is, 1 at first.",
            show_default=False,
        ),
    ] = None,
    notify: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE/NAME",
            help="Block in Prefect that sends messages; told of failed, crashed and timed out "
            "runs, with the stage and a link.",
            show_default=False,
        ),
    ] = None,
    notify_completed: Annotated[
        bool, typer.Option("--notify-completed", help="Tell of completed runs too.")
    ] = False,
    deploy: Annotated[
        bool, typer.Option("--deploy/--no-deploy", help="Register the deployments too.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; show what would be changed.")
    ] = False,
) -> None:
    """Make a Prefect server ready: work pools, queue limit, automations, deployments.

    Asks the server at PREFECT_API_URL; run it in the project's folder. Called
    again, it changes only what differs: after an update, or for another limit.
    Schedules stay switched on or off as they are.

    It makes the pools grace-gpu and grace-cpu from configs/work-pools, the queue
    grace-gpu/train whose limit shares out the GPUs, automations that end runs
    whose machine died, and the deployments of prefect.yaml. Then start a worker
    for each pool:

    prefect worker start --pool grace-gpu --type process
    """
    if notify_completed and notify is None:
        raise typer.BadParameter("--notify-completed needs --notify TYPE/NAME")
    from operations.prefect_setup import set_up

    changed = False
    for step in set_up(
        Path(),
        gpus=gpus,
        notify=notify,
        completed=notify_completed,
        deploy=deploy,
        dry_run=dry_run,
    ):
        changed = changed or step.change != "unchanged"
        verb = f"would be {step.change}" if dry_run and step.change != "unchanged" else step.change
        note = f"  ({step.note})" if step.note else ""
        console.print(f"{verb:10} {step.what}{note}", markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        console.print("Nothing was changed; deployments are compared when they are registered.")
    elif not changed:
        console.print("Everything was there already; nothing was changed.")
