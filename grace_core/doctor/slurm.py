"""A SLURM cluster as its submitting machine sees it; that machine's own GPUs say nothing."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from grace_core.doctor.findings import Finding, ok, problem, unchecked, warning

AREA = "slurm"

_COMMANDS = ("sbatch", "squeue", "scontrol", "scancel")
_SECONDS = 20.0


def check_slurm(partition: str | None) -> Iterator[Finding]:
    """The commands are here, the controller answers, and the partition exists and is up.

    partition: None for the cluster's default one.
    """
    missing = [command for command in _COMMANDS if shutil.which(command) is None]
    if missing:
        yield problem(
            AREA,
            f"launch.backend is slurm, but {', '.join(missing)} is not on the PATH here",
            "run where jobs are submitted from, or choose another launch.backend",
        )
        return
    if shutil.which("sinfo") is None:
        yield unchecked(AREA, "partitions: sinfo is not on the PATH", "install SLURM's clients")
        return
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%P %a %D"],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield problem(
            AREA, f"sinfo did not answer within {_SECONDS:g} s", "check that slurmctld runs"
        )
        return
    if done.returncode:
        said = done.stderr.strip().splitlines()
        yield problem(
            AREA,
            f"sinfo failed: {said[0] if said else f'exit code {done.returncode}'}",
            "check that slurmctld runs, and slurm.conf here",
        )
        return
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()]
    yield from _partition(partition, rows)


def _partition(partition: str | None, rows: list[list[str]]) -> Iterator[Finding]:
    """rows: name (a default one with `*`), availability, number of nodes."""
    names = sorted({row[0].rstrip("*") for row in rows})
    chosen = [
        row for row in rows if row[0].rstrip("*") == partition or (not partition and "*" in row[0])
    ]
    called = partition or "the default one"
    if not chosen:
        yield problem(
            AREA,
            f"partition {called} does not exist; there are {', '.join(names) or 'none'}",
            "name one of them in launch.backend.partition",
        )
    elif all(row[1] != "up" for row in chosen):
        yield warning(
            AREA,
            f"partition {chosen[0][0].rstrip('*')} is {chosen[0][1]}",
            "jobs wait until an administrator sets it up; choose another one",
        )
    else:
        nodes = sum(int(row[2]) for row in chosen)
        yield ok(AREA, f"partition {chosen[0][0].rstrip('*')} is up, {nodes} nodes")
