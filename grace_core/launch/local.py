"""Back-end `local`: torchrun on this machine, as one child group."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from grace_core.config.launch import Launch
from grace_core.launch.backend import Program, rank_environment
from grace_core.launch.output import new_attempt, stream
from grace_core.launch.process_group import run_process_group
from grace_core.locks import wait_for_ranks


class LocalBackend:
    """Runs programs in `launch.processes` ranks below this process."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def run(
        self,
        program: Program,
        *,
        on_poll: Callable[[], None],
        on_line: Callable[[str], None] = stream,
    ) -> None:
        launch = self._launch
        wait_for_ranks(program.work)
        run_process_group(
            torchrun_command(
                program.module,
                program.arguments,
                processes=launch.processes,
                ranks=new_attempt(program.logs),
            ),
            stage=program.stage,
            env=rank_environment(launch),
            log_folder=program.logs,
            grace_seconds=launch.grace_seconds,
            timeout_seconds=None if launch.timeout_hours is None else 3600 * launch.timeout_hours,
            on_poll=on_poll,
            on_line=on_line,
        )


def torchrun_command(
    module: str, arguments: Sequence[str], *, processes: int, ranks: Path
) -> list[str]:
    """Command that runs `python -m module arguments` in `processes` ranks on this machine.

    Each rank's output is kept below `ranks` and repeated by the agent with the rank in
    front (`[default0]:`), which is how `run_process_group` tells the ranks apart.
    """
    return [
        sys.executable,
        "-m",
        "grace_core.launch.local_agent",
        "--standalone",
        f"--nproc-per-node={processes}",
        f"--log-dir={ranks}",
        "--redirects=3",
        "--tee=3",
        "-m",
        module,
        *arguments,
    ]
