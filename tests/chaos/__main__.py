"""`python -m tests.chaos`: the failure matrix, with a table at its end."""

from __future__ import annotations

import secrets
import signal
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tests.chaos.report import report, write_report
from tests.chaos.rounds import Campaign
from tests.chaos.servers import servers

CONFIG = "tests/chaos/chaos.yaml"
console = Console()


def main(
    seed: Annotated[
        int | None, typer.Option(help="Of kinds, places and moments; printed when not given.")
    ] = None,
    faults: Annotated[int, typer.Option(min=1, help="How many to inject.")] = 60,
    minutes: Annotated[float, typer.Option(min=1, help="After them no fault is planned.")] = 36.0,
    folder: Annotated[
        Path, typer.Option(help="Where runs, databases, logs and the report go.")
    ] = Path("runs/chaos"),
) -> None:
    """Run the pipeline while things fail, and say whether it came through.

    Ends with exit code 1 when something that must hold did not, when there was no time for as many
    faults as asked, or when a kind of them, or a part of a run, was left out.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers and disks are put away
    seed = secrets.randbelow(10**6) if seed is None else seed
    started = time.monotonic()
    place = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}"
    place.mkdir(parents=True)
    console.print(f"seed {seed}; everything goes to {place}", highlight=False)
    with servers(place.absolute() / "services") as running:
        campaign = Campaign(
            running,
            CONFIG,
            place,
            seed,
            lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )
        campaign.run(faults, started + 60 * minutes)
    found = report(campaign, seed, time.monotonic() - started)
    write_report(found, place)
    console.print(found.table())
    console.print(found.verdict(), highlight=False, markup=False, soft_wrap=True)
    held = campaign.faults >= faults and not found.problems and not found.not_shown
    raise typer.Exit(0 if held else 1)


if __name__ == "__main__":
    typer.run(main)
