"""A SLURM cluster as its submitting machine sees it; that machine's own GPUs say nothing."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable, Iterator

from grace_core.config.launch import Launch, SlurmLaunch
from grace_core.doctor.findings import Finding, ok, problem, unchecked, warning

AREA = "slurm"

_COMMANDS = ("sbatch", "squeue", "scontrol", "scancel")
_SECONDS = 20.0


def check_slurm(launch: Launch, slurm: SlurmLaunch) -> Iterator[Finding]:
    """The commands are here, the controller answers, the partition is up and takes such jobs.

    Only slurmctld knows what accounts and QOS allow: the watch ends where a job of theirs can never
    start.
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
            ["sinfo", "--noheader", "--noconvert", "--format=%P %a %D %l %s"],
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
    yield from _partition(launch, slurm, rows)


def _partition(launch: Launch, slurm: SlurmLaunch, rows: list[list[str]]) -> Iterator[Finding]:
    """rows: name (a default one with `*`), availability, number of nodes, time limit, job sizes."""
    names = sorted({row[0].rstrip("*") for row in rows})
    wanted = slurm.partition
    chosen = [row for row in rows if row[0].rstrip("*") == wanted or (not wanted and "*" in row[0])]
    if not chosen:
        yield problem(
            AREA,
            f"partition {wanted or 'the default one'} does not exist; there are "
            f"{', '.join(names) or 'none'}",
            "name one of them in launch.backend.partition",
        )
        return
    name = chosen[0][0].rstrip("*")
    if all(row[1] != "up" for row in chosen):
        yield warning(
            AREA,
            f"partition {name} is {chosen[0][1]}",
            "jobs wait until an administrator sets it up; choose another one",
        )
    nodes = sum(int(row[2]) for row in chosen)
    limits = [*_beyond_limits(launch, slurm, f"partition {name}", nodes, *chosen[0][3:])]
    yield from limits
    if not limits and chosen[0][1] == "up":
        yield ok(AREA, f"partition {name} is up, {nodes} nodes")


def _beyond_limits(
    launch: Launch, slurm: SlurmLaunch, partition: str, nodes: int, time: str, sizes: str
) -> Iterator[Finding]:
    """slurmctld takes a job beyond its partition's limits, and lets it wait for ever.

    time and sizes: as sinfo shows them, such as `1-00:00:00` and `1-4`, or `infinite`.
    """
    if launch.nodes > nodes:
        yield problem(
            AREA,
            f"{partition} has {nodes} nodes, launch.nodes is {launch.nodes}: a job would wait for "
            "ever",
            "lower launch.nodes or choose another launch.backend.partition",
        )
        return
    # There are QOS that lift these two.
    says = problem if slurm.qos is None else warning
    least, _, most = sizes.partition("-")
    if launch.nodes < int(least) or launch.nodes > _limit(most or least, int):
        yield says(
            AREA,
            f"{partition} takes jobs of {sizes} nodes, launch.nodes is {launch.nodes}: a job would "
            "wait for ever",
            "change launch.nodes or choose another launch.backend.partition",
        )
    minutes = slurm.time_limit_minutes
    if minutes is not None and minutes > _limit(time, _minutes):
        yield says(
            AREA,
            f"{partition} takes jobs of at most {time}, launch.backend.time_limit_minutes is "
            f"{minutes}: a job would wait for ever",
            "lower it (a training goes on in the next start) or choose another "
            "launch.backend.partition",
        )


def _limit(shown: str, number: Callable[[str], float]) -> float:
    return math.inf if shown == "infinite" else number(shown)


def _minutes(shown: str) -> float:
    """Of a time as SLURM shows it: [days-][[hours:]minutes:]seconds."""
    days, _, rest = shown.rpartition("-")
    seconds = 0
    for part in rest.split(":"):
        seconds = seconds * 60 + int(part)
    return int(days or 0) * 1440 + seconds / 60
