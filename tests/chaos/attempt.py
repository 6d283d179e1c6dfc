"""One flow run with its faults, watched from its start until nothing of it is left."""

from __future__ import annotations

import random
import time
import urllib.error
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.faults import Fault, Scene, ballast
from tests.chaos.servers import Servers
from tests.chaos.view import (
    STAGES,
    START,
    flow_process,
    partials,
    processes_of,
    stage_at_work,
)
from tests.waiting import wait_until

SURVIVAL = 40.0  # seconds after the flow process's end by which all its processes must be gone
ZOMBIE = 150.0  # seconds after a machine's death by which its run must not be Running any more
_LONGEST = 420.0  # seconds; an attempt that takes longer is stuck
_SERVER_BACK = 60.0  # seconds within which a server that was started again takes requests
_LOOK = 0.1
_ASK = 0.7  # seconds between two questions to Prefect
_DEPLOYMENT = "grace/full-pipeline"


@dataclass(frozen=True)
class Planned:
    """A fault to be injected `delay` seconds after `stage` (or a later one) was seen at work."""

    fault: Fault
    stage: str
    delay: float


@dataclass
class Injected:
    """A fault that happened."""

    fault: str
    stage: str
    second: float
    """Since the attempt began."""


@dataclass
class Attempt:
    """What happened in one flow run."""

    flow_run_id: str = ""
    injected: list[Injected] = field(default_factory=list)
    state: str = ""
    expected: tuple[str, ...] = ("COMPLETED",)
    message: str = ""
    seconds: float = 0.0
    ended_after: float | None = None
    """Seconds from the last fault to the end of the run, as Prefect sees it."""

    last_process_after: float = 0.0
    """Seconds from the end of the flow process to that of its last process."""

    problems: list[str] = field(default_factory=list)

    def judge(self) -> None:
        """Compare the end with the one that must have come."""
        if self.state not in self.expected:
            self.problems.append(
                f"ended {self.state or 'nowhere'}, not {' or '.join(self.expected)}: "
                f"{self.message[:300]}"
            )


def run_attempt(
    servers: Servers,
    config: str,
    run_dir: Path,
    plan: Sequence[Planned],
    chance: random.Random,
) -> Attempt:
    """Start a flow run, inject the faults of `plan` as far as it gets, wait for its end."""
    attempt = Attempt()
    started = time.monotonic()
    left_behind = partials(run_dir)
    attempt.flow_run_id = _start(servers, config, run_dir)
    scene = Scene(servers, attempt.flow_run_id, run_dir, chance)
    waiting, due = list(plan), {}
    last_fault = asked = started
    flow: psutil.Process | None = None
    flow_ended: float | None = None
    gone: float | None = None
    working = False
    while True:
        now = time.monotonic()
        if flow is None:
            flow = flow_process(scene.processes()) if now - asked >= _ASK else None
        elif flow_ended is None and not _lives(flow):
            flow_ended = now
        for moment, action in [item for item in scene.later if item[0] <= now]:
            scene.later.remove((moment, action))
            action()
        stage = stage_at_work(run_dir, left_behind)
        working = working or stage is not None
        if not working and flow is not None:
            stage = START
        for planned in list(waiting):
            if planned not in due and stage is not None and _reached(stage, planned.stage):
                due[planned] = now + planned.delay
            if due.get(planned, now + 1.0) <= now and _can(planned.fault, stage):
                if planned.fault.inject(scene):
                    waiting.remove(planned)
                    last_fault = time.monotonic()
                    attempt.injected.append(
                        Injected(
                            planned.fault.name, stage or "between stages", last_fault - started
                        )
                    )
                    if planned.fault.ends is not None:
                        attempt.expected = (planned.fault.ends,)
                        waiting.clear()  # what would come after the end cannot happen
                        break
                    if planned.fault.may_crash:
                        attempt.expected = ("COMPLETED", "CRASHED")
        if now - asked >= _ASK:
            asked = now
            if flow_ended is not None and gone is None and not scene.processes():
                gone = now
            if not servers.worker.alive and not scene.later:
                servers.worker.start()  # as a service manager does
            if _ended(attempt, servers):
                break
            if now - started > _LONGEST:
                attempt.problems.append(f"stuck in {attempt.state} after {_LONGEST:g} s")
                break
        time.sleep(_LOOK)
    attempt.seconds = time.monotonic() - started
    if attempt.injected:
        attempt.ended_after = time.monotonic() - last_fault
    _settle(scene)
    _check_processes(attempt, flow_ended or time.monotonic(), gone)
    ballast(run_dir).unlink(missing_ok=True)
    return attempt


def _start(servers: Servers, config: str, run_dir: Path) -> str:
    """Start a flow run; a server that is on its way back is asked again."""
    deadline = time.monotonic() + _SERVER_BACK
    while True:
        try:
            return servers.deployed.start(
                _DEPLOYMENT, config=config, overrides=[f"run_dir={run_dir}"]
            )
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _reached(stage: str, planned: str) -> bool:
    return STAGES.index(stage) >= STAGES.index(planned) if stage in STAGES else False


def _can(fault: Fault, stage: str | None) -> bool:
    return stage is None or stage in fault.stages


def _ended(attempt: Attempt, servers: Servers) -> bool:
    try:
        run = servers.api.flow_run(attempt.flow_run_id)
        if run.is_final:  # a run that cancelled itself is crashed until it has told why
            time.sleep(1.0)
            run = servers.api.flow_run(attempt.flow_run_id)
    except (urllib.error.URLError, OSError):  # it is being killed or kept away: ask again
        return False
    attempt.state, attempt.message = run.type, run.message
    return run.is_final


def _settle(scene: Scene) -> None:
    """Bring back what a fault took away and the run did not wait for."""
    for moment, action in sorted(scene.later, key=lambda item: item[0]):
        time.sleep(max(0.0, moment - time.monotonic()) if moment - time.monotonic() < 6 else 0.0)
        action()
    scene.later.clear()
    for service in (scene.servers.prefect, scene.servers.mlflow):
        service.wait()
    if not scene.servers.worker.alive:
        scene.servers.worker.start()


def _check_processes(attempt: Attempt, flow_ended: float, gone: float | None) -> None:
    """gone: when its last process was seen to be gone, where that was before the run's end."""
    if gone is not None:
        attempt.last_process_after = gone - flow_ended
        if attempt.last_process_after > SURVIVAL:
            attempt.problems.append(
                f"its last process lived {attempt.last_process_after:.0f} s longer than the flow"
            )
    left = flow_ended + SURVIVAL - time.monotonic()
    if not wait_until(lambda: not processes_of(attempt.flow_run_id), max(left, 0.0)):
        found = [
            f"{process.pid} {' '.join(process.cmdline())[:80]}"
            for process in processes_of(attempt.flow_run_id)
        ]
        attempt.problems.append(f"alive {SURVIVAL:g} s after the flow's end: {found}")
        for process in processes_of(attempt.flow_run_id):
            process.kill()
    if gone is None:
        attempt.last_process_after = max(0.0, time.monotonic() - flow_ended)
    machine_died = attempt.state == "CRASHED" and any(
        "worker" in item.fault for item in attempt.injected
    )
    if machine_died and (attempt.ended_after or 0.0) > ZOMBIE:
        attempt.problems.append(
            f"ended {attempt.ended_after:.0f} s after its machine, not {ZOMBIE:g}"
        )
