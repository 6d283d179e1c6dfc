"""One child process group: started, watched, and ended whatever happens.

A training runs as an agent (torchrun) with its ranks below it, each rank in a session of its own.
Killing the agent alone would orphan the ranks, and signalling its group would not reach them.
So an end always goes the same way: note every descendant, ask the agent with SIGTERM (torchrun
forwards it, ranks save and leave), wait, SIGKILL whoever is still there.

When this process itself is killed, the kernel sends the agent SIGTERM (PR_SET_PDEATHSIG). Linux
sends it when the *thread* that forked ends; `run_process_group` forks and waits in one thread,
which therefore outlives the child. Whoever misses that signal ends as `grace_core.orphans` says.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from grace_core.errors import GraceError
from grace_core.events import LineReader
from grace_core.launch.output import Shown, first_failure, lines_of_rank, stream

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded before any fork: the child must not import
_SHOWN_LINES = 20
_KILL_SECONDS = 10.0  # only a process stuck in a driver or a file system outlives SIGKILL so long

TOOK_TOO_LONG = "raise launch.timeout_hours, or resume: finished steps are kept in checkpoints"
FAILED = "mend what it says and run again: training resumes from its last checkpoint"
"""What a user does next."""


class ProcessesFailed(GraceError):
    """A process group ended with an error or did not end in time.

    exit_code: the agent's, negative for a signal; None when the time ran out. lines: all error
    output of the rank that failed first, where the agent named one; else all there is.
    """

    def __init__(self, message: str, exit_code: int | None, lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.lines = lines


def run_process_group(
    command: Sequence[str],
    *,
    stage: str,
    env: Mapping[str, str],
    log_folder: Path,
    grace_seconds: float = 20.0,
    timeout_seconds: float | None = None,
    on_poll: Callable[[], None] | None = None,
    on_line: Callable[[str], None] = stream,
    poll_seconds: float = 0.5,
) -> None:
    """Run `command` to its end, leaving no process behind however it ends.

    `env` is the child's whole environment. Output goes to `stdout.log` and `stderr.log` in
    `log_folder` (appended); `on_line` also gets rank 0's lines, all lines where no rank is
    marked, and those in which another rank warns or fails. `on_poll` is called every
    `poll_seconds` and once after the end. `grace_seconds` lie between SIGTERM and SIGKILL when this
    call is interrupted, fails or runs out of time.

    Raises ProcessesFailed on a non-zero exit code or after `timeout_seconds`; any exception
    that interrupts the wait (a cancellation, Ctrl-C, an error of `on_poll`) is raised again once
    the group is gone.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    out, err = log_folder / "stdout.log", log_folder / "stderr.log"
    followed = [
        LineReader(file, file.stat().st_size if file.exists() else 0) for file in (out, err)
    ]
    earlier = followed[1].offset
    with out.open("ab") as out_stream, err.open("ab") as err_stream:
        agent = start_process_group(command, env=env, stdout=out_stream, stderr=err_stream)
    started = time.monotonic()
    group: set[psutil.Process] = set()
    shown = Shown()

    def look() -> None:
        group.update(_descendants(agent))
        for reader in followed:
            for line in reader.poll():
                if line in shown:
                    on_line(line)
        if on_poll is not None:
            on_poll()

    try:
        while True:
            try:
                exit_code: int | None = agent.wait(poll_seconds)
                break
            except subprocess.TimeoutExpired:
                look()
            if timeout_seconds is not None and time.monotonic() - started > timeout_seconds:
                exit_code = None
                break
    finally:
        end_process_group(agent, group, grace_seconds)
    look()
    if exit_code == 0:
        return
    if exit_code is None:
        problem, remedy = f"did not end within {timeout_seconds:g} s and was stopped", TOOK_TOO_LONG
    else:
        problem = f"ended with {describe_exit(exit_code)}"
        remedy = FAILED
    lines = LineReader(err, earlier).poll()
    if (failed := first_failure(lines)) is not None:
        rank, code = failed
        problem += f" (rank {rank} failed first, with {describe_exit(code)})"
        lines = lines_of_rank(lines, rank) or lines
    raise processes_failed(
        f"stage {stage}: its processes {problem}; {remedy}", log_folder, exit_code, lines
    )


def processes_failed(
    summary: str, log_folder: Path, exit_code: int | None, lines: Sequence[str]
) -> ProcessesFailed:
    """The error with what a user looks at next: the output's folder and its last lines."""
    shown = lines[-_SHOWN_LINES:] or ["(nothing was written)"]
    return ProcessesFailed(
        f"{summary}.\nFull output: {log_folder}\nLast lines of the error output:\n"
        + "\n".join(f"  {line}" for line in shown),
        exit_code,
        lines,
    )


def start_process_group(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    stdout: IO[bytes],
    stderr: IO[bytes],
    folder: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own; it gets SIGTERM when the calling thread ends.

    `env` is its whole environment, `folder` its working directory (this process's where None).
    End it with `end_process_group`.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=dict(env),
        cwd=folder,
        start_new_session=True,
        preexec_fn=_end_with_parent(os.getpid()),
    )


def _end_with_parent(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # the parent died between fork and prctl: no signal would come
            os._exit(1)

    return prepare


def _descendants(agent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(agent.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def end_process_group(
    agent: subprocess.Popen[bytes], known: set[psutil.Process], grace_seconds: float
) -> None:
    """End the agent and all its descendants; returns when none is left.

    known: descendants seen earlier, which an agent that has ended can no longer name. psutil
    identifies a process by id and start time, so a reused id is never signalled.
    """
    try:
        known.update(_descendants(agent))
        if agent.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                agent.terminate()
        else:  # nobody is left to forward the signal
            _signal(known, signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while time.monotonic() < deadline and (agent.poll() is None or _alive(known)):
            known.update(_descendants(agent))
            time.sleep(0.05)
    finally:  # also when a second interruption cuts the grace short
        known.update(_descendants(agent))
        if agent.poll() is None:
            agent.kill()
        _signal(known, signal.SIGKILL)
        agent.wait()
        deadline = time.monotonic() + _KILL_SECONDS
        while (left := _alive(known)) and time.monotonic() < deadline:
            time.sleep(0.02)
        if left:
            logger.error("processes %s survived SIGKILL: end them by hand", [p.pid for p in left])


def _alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in _alive(processes):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def describe_exit(exit_code: int) -> str:
    """An exit code in words; a signal's is negative."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = " (often: out of memory)" if name == "SIGKILL" else ""
    return f"signal {name}{hint}"
