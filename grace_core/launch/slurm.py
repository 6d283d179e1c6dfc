"""Back-end `slurm`: a batch job, submitted and watched from a machine that does not train.

The job outlives whoever watches it. It is found again by its recorded id, or by its name where the
watcher died before it could record one, and is then watched on instead of submitted twice. Only a
wish to end it (a cancellation, Ctrl-C, the time out) cancels the job, and that it can never start;
an error of the watch, such as a full disk, leaves it alone.

slurmctld being away is no failure: the job goes on without it. What the job writes of its own end
counts also when slurmctld has forgotten the job.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from grace_core.config.launch import Launch, SlurmLaunch
from grace_core.errors import GraceError
from grace_core.events import LineReader
from grace_core.launch import slurm_commands as commands
from grace_core.launch.backend import Program, rank_environment
from grace_core.launch.node_failure import first_node_failure
from grace_core.launch.output import Shown, last_attempt, stream
from grace_core.launch.process_group import (
    FAILED,
    TOOK_TOO_LONG,
    ProcessesFailed,
    describe_exit,
    processes_failed,
)
from grace_core.launch.slurm_commands import JobInfo, SlurmAway
from grace_core.launch.slurm_files import SlurmFiles
from grace_core.launch.slurm_script import batch_script, node_script
from grace_core.locks import wait_for_ranks
from grace_core.training.stopping import STOPPED

logger = logging.getLogger(__name__)

AWAY_SECONDS = 12 * 3600.0
"""How long slurmctld may be away before a watch gives up."""

_LOOK_SECONDS = 1.0
_LEAVING_SECONDS = 60.0  # from the job's own word of its end to slurmctld's
_LINES_EACH = 6
_SURE_LOOKS = 3
"""In a row, at which slurmctld says that a job can never start."""

_NEVER_STARTS = {
    "launch.nodes": "PartitionNodeLimit QOSMaxNodePerJobLimit AssocMaxNodePerJobLimit",
    "launch.backend.time_limit_minutes": "PartitionTimeLimit QOSMaxWallDurationPerJobLimit "
    "AssocMaxWallDurationPerJobLimit",
    "launch.processes or launch.threads_per_process": "QOSMaxCpuPerJobLimit AssocMaxCpuPerJobLimit",
    "launch.backend.gpus_per_node": "QOSMaxGRESPerJob AssocMaxGRESPerJob",
    "launch.backend.memory_gb": "QOSMaxMemoryPerJob AssocMaxMemPerJob",
    "launch.backend.constraint": "BadConstraints",
    "launch.backend.account": "AccountNotAllowed InvalidAccount",
    "launch.backend.qos": "QOSNotAllowed InvalidQOS",
}
"""Which setting is to be changed where a job is pending for one of these reasons, which no waiting
ends. Nodes that are down or taken have other ones."""

_REMEDIES = {
    "CANCELLED": "someone cancelled it; run again to continue from the last checkpoint",
    "TIMEOUT": "raise launch.backend.warning_seconds, so that it can save and be requeued in time, "
    "or time_limit_minutes; run again to continue from the last checkpoint",
    "OUT_OF_MEMORY": "raise launch.backend.memory_gb, or lower training.data_workers",
    "PREEMPTED": "the partition cancels what it preempts (PreemptMode=CANCEL); choose another, or "
    "run again to continue from the last checkpoint",
}
_T = TypeVar("_T")


class SlurmBackend:
    """Runs programs in `launch.nodes` times `launch.processes` ranks as jobs of SLURM."""

    def __init__(self, launch: Launch) -> None:
        assert isinstance(launch.backend, SlurmLaunch)
        self._launch = launch
        self._poll_seconds = launch.backend.poll_seconds

    def run(
        self,
        program: Program,
        *,
        on_poll: Callable[[], None],
        on_line: Callable[[str], None] = stream,
    ) -> None:
        files = SlurmFiles(program, self._launch.nodes)
        followed = [
            LineReader(file, file.stat().st_size if file.exists() else 0) for file in files.output()
        ]
        job: int | None = None
        shown = Shown()

        def look() -> None:
            for reader in followed:
                for line in reader.poll():
                    if line in shown:
                        on_line(line)
            on_poll()

        try:
            job = self._job_left_behind(files) or self._submit(program, files)
            files.record_job(job)
            exit_code, state = self._watch(job, program, files, look)
        except Exception as error:  # of the watch, raised on; the job has no part in it
            if job is None or isinstance(error, ProcessesFailed | _GaveUp):
                raise
            raise _GaveUp(
                f"stage {program.stage}: watching its SLURM job {job} ended with "
                f"{type(error).__name__}: {error}. The job itself is left alone; mend the cause "
                "and run again: the job is found and watched on"
            ) from error
        except BaseException:  # someone wants this to end
            self._cancel(job, files)  # by name where a submission has not been answered
            raise
        os.scandir(program.work).close()  # NFS keeps for a while that a file was not there
        look()
        if exit_code != 0:
            raise _failed(program, job, files, exit_code, state)

    def _job_left_behind(self, files: SlurmFiles) -> int | None:
        """The job of an earlier watch, where it still waits or runs."""
        job = self._ask(lambda: commands.find_job(files.job_name))
        if job is None:
            return None
        while (info := self._ask(lambda: commands.job_info(job))) is not None and not info.ended:
            if info.state != "COMPLETING":
                logger.warning(
                    "SLURM job %d (%s) is there already, %s; it is watched, and no other submitted",
                    *(job, files.job_name, info.state.lower()),
                )
                return job
            time.sleep(_LOOK_SECONDS)  # it ends, or waits again after a requeue
        return None

    def _submit(self, program: Program, files: SlurmFiles) -> int:
        wait_for_ranks(program.work)
        files.write_scripts(
            batch_script(self._launch, files, last_attempt(program.logs) + 1),
            node_script(self._launch, program),
        )

        def once() -> int:
            found = commands.find_job(files.job_name)  # an earlier try may have come through
            return found or commands.submit(files.batch_script, job_environment(self._launch))

        job = self._ask(once)
        logger.info("stage %s: SLURM job %d (%s) submitted", program.stage, job, files.job_name)
        return job

    def _ask(self, question: Callable[[], _T]) -> _T:
        """The answer of slurmctld, waiting for it while it is away."""
        away = _Absence()
        while True:
            try:
                return question()
            except SlurmAway as error:
                away.note(error)
                time.sleep(self._poll_seconds)

    def _watch(
        self, job: int, program: Program, files: SlurmFiles, look: Callable[[], None]
    ) -> tuple[int, str]:
        """Wait for the job's end: its exit code and its last state."""
        hours = self._launch.timeout_hours
        deadline = None if hours is None else time.monotonic() + 3600 * hours
        away, shown, never_looks = _Absence(), "", 0
        next_question = time.monotonic()
        end_seen: float | None = None
        while True:
            look()
            now = time.monotonic()
            if deadline is not None and now > deadline:
                self._cancel(job, files)
                raise processes_failed(
                    f"stage {program.stage}: its SLURM job {job} did not end within {hours:g} h "
                    f"and was cancelled; {TOOK_TOO_LONG}",
                    files.logs,
                    None,
                    _last_lines(files),
                )
            end = files.end_of(job)
            if end is not None and end_seen is None:
                end_seen = next_question = now
            if end is not None and end_seen is not None and now - end_seen > _LEAVING_SECONDS:
                return end.exit_code, "unknown to SLURM"
            if now >= next_question:
                next_question = now + (self._poll_seconds if end is None else _LOOK_SECONDS)
                try:
                    info = commands.job_info(job)
                except SlurmAway as error:
                    away.note(error)
                else:
                    away = _Absence()
                    if info is None:
                        return (1 if end is None else end.exit_code), "unknown to SLURM"
                    shown = _tell(info, shown)
                    never_looks = never_looks + 1 if _setting_to_change(info) else 0
                    if never_looks == _SURE_LOOKS:
                        self._cancel(job, files)  # or the next run would find and watch it
                        raise _never_starts(program, info)
                    if info.ended:
                        return _exit_code(info, None if end is None else end.exit_code), info.state
            time.sleep(min(_LOOK_SECONDS, self._poll_seconds))

    def _cancel(self, job: int | None, files: SlurmFiles) -> None:
        """Ask SLURM to end the job, and wait until it is gone, `grace_seconds` at most."""
        deadline = time.monotonic() + self._launch.grace_seconds
        problem = "it is still ending"
        while time.monotonic() < deadline:
            try:
                job = job or commands.find_job(files.job_name)
                if job is None:
                    return
                files.mark_cancelled(job)
                info = commands.job_info(job)
                if info is None or info.ended:
                    return
                if info.state != "COMPLETING":
                    commands.cancel(job)
            except SlurmAway as error:
                problem = f"slurmctld does not answer ({error})"
            time.sleep(_LOOK_SECONDS / 2)
        logger.error(
            "SLURM job %s is not gone after %g s: %s; make sure with: scancel --name=%s",
            *(job, self._launch.grace_seconds, problem, files.job_name),
        )


class _GaveUp(GraceError):
    """The watch ends before the job does; says what became of the job."""


class _Absence:
    """How long slurmctld has been away; told once."""

    def __init__(self) -> None:
        self._since: float | None = None

    def note(self, error: SlurmAway) -> None:
        """Raises _GaveUp after `AWAY_SECONDS`."""
        if self._since is None:
            self._since = time.monotonic()
            logger.warning("slurmctld does not answer, jobs go on without it: %s", error)
        elif time.monotonic() - self._since > AWAY_SECONDS:
            raise _GaveUp(
                f"slurmctld has not answered for {AWAY_SECONDS / 3600:g} h ({error}); run again "
                "when it is back: a job that is still there is found and watched on"
            ) from error


def job_environment(launch: Launch) -> Mapping[str, str]:
    """Environment of a job: that of every rank, without what is true of this machine alone."""
    kept = commands.without_slurm(rank_environment(launch))
    kept.pop("CUDA_VISIBLE_DEVICES", None)
    return kept


def _tell(info: JobInfo, shown: str) -> str:
    """Log the state when it is another than `shown`; returns it."""
    state = info.state.lower() + (f" ({info.reason})" if info.reason != "None" else "")
    if info.restarts:
        state += f", requeued {info.restarts} times"
    if state != shown:
        level = logging.WARNING if "held" in state.lower() else logging.INFO
        logger.log(level, "SLURM job %d is %s", info.id, state)
    return state


def _setting_to_change(info: JobInfo) -> str | None:
    """The setting for which a job can never start; None where it may."""
    if info.state != "PENDING":
        return None
    return next((name for name, why in _NEVER_STARTS.items() if info.reason in why.split()), None)


def _never_starts(program: Program, info: JobInfo) -> _GaveUp:
    return _GaveUp(
        f"stage {program.stage}: its SLURM job {info.id} could never start ({info.reason}) and was "
        f"cancelled; change {_setting_to_change(info)} or launch.backend.partition to what the "
        f"cluster allows (`scontrol show job {info.id}`, `scontrol show partition`), and run again"
    )


def _exit_code(info: JobInfo, of_script: int | None) -> int:
    if of_script is not None:
        return of_script
    if info.state == "COMPLETED":
        return 0
    return info.exit_code or 1


def _failed(
    program: Program, job: int, files: SlurmFiles, exit_code: int, state: str
) -> GraceError:
    problem, remedy = f"its SLURM job {job} ({files.job_name}) ended as {state}", FAILED
    if exit_code == STOPPED and state == "FAILED":
        lines = _last_lines(files)
        problem += ", stopped once more"
        remedy = (
            "it was requeued as often as launch.backend.max_restarts allows, or could not be; run "
            "again to continue from the last checkpoint"
        )
    elif state not in _REMEDIES and (failed := first_node_failure(program.logs)) is not None:
        first, lines = failed
        exit_code = first.exit_code
        problem += (
            f" (rank {first.rank} on node {first.node} failed first, with "
            f"{describe_exit(exit_code)})"
        )
    else:
        lines = _last_lines(files)
        problem += f" with exit code {exit_code}"
        remedy = _REMEDIES.get(state, FAILED)
    return processes_failed(
        f"stage {program.stage}: {problem}; {remedy}", program.logs, exit_code, lines
    )


def _last_lines(files: SlurmFiles) -> list[str]:
    """What agents and batch shell wrote last, for where no rank is known to have failed."""
    errors = [files.node_log(node, "stderr") for node in range(files.nodes)]
    lines: list[str] = []
    for file in (*errors, files.job_log):
        lines += LineReader(file).poll()[-_LINES_EACH:]
    return lines
