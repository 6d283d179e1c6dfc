"""SLURM's own commands, and whether a failed one means no or not now."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grace_core.errors import GraceError

_ANSWER_SECONDS = 120.0
_NOT_NOW = re.compile(
    r"unable to contact|timed out|timeout|connection refused|connection reset|zero bytes|"
    r"temporarily|try again|communication|no route to host|standby",
    re.IGNORECASE,
)
_UNKNOWN_JOB = "Invalid job id"
_FINAL = frozenset(
    "COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL OUT_OF_MEMORY PREEMPTED BOOT_FAIL DEADLINE "
    "REVOKED".split()
)


class SlurmAway(Exception):
    """slurmctld did not answer, which it may well do later."""


@dataclass(frozen=True)
class JobInfo:
    """A job as slurmctld knows it."""

    id: int
    state: str
    reason: str
    restarts: int
    exit_code: int

    @property
    def ended(self) -> bool:
        return self.state in _FINAL


def submit(script: Path, environment: Mapping[str, str]) -> int:
    """Submit a batch script whose job gets `environment`; returns the job's id.

    Raises SlurmAway when it is not known whether the job exists, GraceError when it was refused.
    """
    done = _run(["sbatch", "--parsable", str(script)], environment)
    if done.returncode == 0:
        return int(done.stdout.strip().splitlines()[-1].split(";")[0])
    if _NOT_NOW.search(done.stderr):
        raise SlurmAway(done.stderr.strip())
    raise GraceError(
        f"SLURM refused the job: {done.stderr.strip()}; mend launch.backend in the configuration "
        f"(the script is {script})"
    )


def find_job(name: str) -> int | None:
    """Id of this user's newest pending or running job of that name. Raises SlurmAway."""
    done = _run(["squeue", "--me", f"--name={name}", "--noheader", "--format=%A"])
    if done.returncode:
        raise SlurmAway(done.stderr.strip())
    return max(map(int, done.stdout.split()), default=None)


def job_info(job: int) -> JobInfo | None:
    """What slurmctld knows of a job; None when it knows no such job. Raises SlurmAway."""
    done = _run(["scontrol", "--oneliner", "show", "job", str(job)])
    if done.returncode:
        if _UNKNOWN_JOB in done.stderr + done.stdout:
            return None
        raise SlurmAway(done.stderr.strip())
    text = done.stdout
    return JobInfo(
        job,
        state=_field(text, "JobState"),
        reason=_field(text, "Reason"),
        restarts=int(_field(text, "Restarts")),
        exit_code=int(_field(text, "ExitCode").split(":")[0]),
    )


def cancel(job: int) -> None:
    """Ask for the end of a job; one that has ended already is fine. Raises SlurmAway."""
    done = _run(["scancel", str(job)])
    if done.returncode and _UNKNOWN_JOB not in done.stderr:
        raise SlurmAway(done.stderr.strip())


def _field(text: str, name: str) -> str:
    found = re.search(rf"(?:^| ){name}=(\S*)", text)
    assert found is not None, f"scontrol shows no {name}: {text}"
    return found[1]


def _run(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=without_slurm(environment or os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ANSWER_SECONDS,
            start_new_session=True,  # Ctrl-C is ours to handle: a submission must not be cut
            check=False,
        )
    except FileNotFoundError as error:
        raise GraceError(
            f"launch.backend is slurm, but {command[0]} is not on the PATH; run where jobs are "
            "submitted from, or choose another launch.backend"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmAway(f"{command[0]} did not answer within {_ANSWER_SECONDS:g} s") from error


def without_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what SLURM set for a job around this process, or a user for others.

    Its variables win over a script's options; the configuration alone is to decide.
    """
    ours = re.compile(r"(SLURM|SBATCH|SRUN|SQUEUE|SCANCEL|SCONTROL)_")
    kept = ("SLURM_CONF", "SLURM_CONF_SERVER")
    return {n: v for n, v in environment.items() if n in kept or not ours.match(n)}
