"""Several independent processes on this machine: one that dies costs the others nothing.

For work that processes share through files, as an evaluation's questions. Ranks of a training
depend on one another and are torchrun's (`local`).
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from grace_core.events import LineReader
from grace_core.launch.process_group import (
    FAILED,
    TOOK_TOO_LONG,
    describe_exit,
    end_process_group,
    processes_failed,
    start_process_group,
)

logger = logging.getLogger(__name__)


@dataclass
class _Member:
    number: int
    agent: subprocess.Popen[bytes]
    errors: LineReader
    told: bool = False


def run_crew(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    *,
    stage: str,
    log_folder: Path,
    grace_seconds: float = 20.0,
    timeout_seconds: float | None = None,
    on_poll: Callable[[], None] = lambda: None,
    poll_seconds: float = 0.2,
) -> None:
    """Run `command` once in each environment, to the end of all; none is left behind.

    Output goes to `crew-<number>.out` and `.err` in `log_folder` (appended). `on_poll` is called
    every `poll_seconds` and once after the end. A process that fails while another goes on is a
    warning.

    Raises ProcessesFailed when none has succeeded, or after `timeout_seconds`; whatever interrupts
    the wait (a cancellation, Ctrl-C, an error of `on_poll`) is raised again once all are ended.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    members: list[_Member] = []
    late = False
    with ExitStack() as streams:
        try:
            for number, environment in enumerate(environments):
                members.append(_start(number, command, environment, log_folder, streams))
            while any(member.agent.poll() is None for member in members) and not late:
                time.sleep(poll_seconds)
                _tell_of_deaths(members, stage, log_folder)
                on_poll()
                late = timeout_seconds is not None and time.monotonic() - started > timeout_seconds
        finally:
            for member in members:
                end_process_group(member.agent, set(), grace_seconds)
    on_poll()
    if late:
        problem = f"did not end within {timeout_seconds:g} s and were stopped; {TOOK_TOO_LONG}"
    elif any(member.agent.returncode == 0 for member in members):
        return
    else:
        codes = ", ".join(describe_exit(member.agent.returncode) for member in members)
        problem = f"ended with {codes}; {FAILED}"
    first = members[0]
    raise processes_failed(
        f"stage {stage}: its processes {problem}",
        log_folder,
        None if late else first.agent.returncode,
        first.errors.poll(),
    )


def _start(
    number: int,
    command: Sequence[str],
    environment: Mapping[str, str],
    log_folder: Path,
    streams: ExitStack,
) -> _Member:
    out, err = (log_folder / f"crew-{number}.{kind}" for kind in ("out", "err"))
    errors = LineReader(err, err.stat().st_size if err.exists() else 0)
    agent = start_process_group(
        command,
        env=environment,
        stdout=streams.enter_context(out.open("ab")),
        stderr=streams.enter_context(err.open("ab")),
    )
    return _Member(number, agent, errors)


def _tell_of_deaths(members: Sequence[_Member], stage: str, log_folder: Path) -> None:
    others = any(member.agent.poll() is None for member in members)
    for member in members:
        if member.agent.poll() and not member.told and others:
            member.told = True
            logger.warning(
                "stage %s: process %d ended with %s; the others take over what it had (its output: "
                "%s)",
                stage,
                member.number,
                describe_exit(member.agent.returncode),
                log_folder / f"crew-{member.number}.err",
            )
