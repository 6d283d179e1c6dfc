"""The one interface of all launch back-ends, and which one a configuration chooses."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from grace_core.config.launch import Launch
from grace_core.launch.output import stream
from grace_core.secrets import is_secret


@dataclass(frozen=True)
class Program:
    """A Python module to be run in every rank of a training."""

    stage: str
    """Artifact stage, such as bf16; names the program in messages."""

    module: str
    arguments: Sequence[str]
    work: Path
    """Folder of this training alone, seen by all its nodes; output goes below its `logs`."""

    @property
    def logs(self) -> Path:
        return self.work / "logs"


class Backend(Protocol):
    """Runs programs in the ranks that a configuration asks for."""

    def run(
        self,
        program: Program,
        *,
        on_poll: Callable[[], None],
        on_line: Callable[[str], None] = stream,
    ) -> None:
        """Run `program` to its end, leaving no process behind however it ends.

        on_poll: called every so often while it runs, and once after the end; on_line: gets the
        output of rank 0 as it comes, and what other ranks warn of. The output of every rank is kept
        below `program.logs`.

        Raises ProcessesFailed when the program failed. Whatever interrupts the wait (a
        cancellation, Ctrl-C, an error of `on_poll`) is raised again once the processes are ended;
        a SLURM job is not ended by an error, but left to be found by the next run.
        """


def backend_of(launch: Launch) -> Backend:
    """The back-end that the configuration chooses."""
    if launch.backend.kind == "slurm":
        from grace_core.launch.slurm import SlurmBackend

        return SlurmBackend(launch)
    from grace_core.launch.local import LocalBackend

    return LocalBackend(launch)


def rank_environment(launch: Launch) -> Mapping[str, str]:
    """Environment of every rank: this process's, without secrets, which no rank needs."""
    kept = {name: value for name, value in os.environ.items() if not is_secret(name)}
    return {**kept, **rank_settings(launch)}


def rank_settings(launch: Launch) -> Mapping[str, str]:
    """Variables that every rank is given, wherever it runs."""
    return {
        "OMP_NUM_THREADS": str(launch.threads_per_process),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
