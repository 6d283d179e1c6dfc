"""The faults, one function each, and how a flow run that they hit must end.

A fault that finds nothing to hit (no rank runs yet) returns False and is tried again.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
import urllib.error
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.servers import Servers
from tests.chaos.view import STAGES, START, TRAININGS, agents, flow_process, processes_of, ranks

OUTAGE = 60.0  # seconds that a server does not answer
_BEGUN = STAGES[1:]  # all but the start
_SPARE = 4 << 20  # bytes at most left on a full disk; a checkpoint has more than three times that


@dataclass
class Scene:
    """Where a fault happens."""

    servers: Servers
    flow_run_id: str
    run_dir: Path
    chance: random.Random
    later: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    """What is to be done when (time.monotonic()), such as starting a server again."""

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.later.append((time.monotonic() + seconds, action))

    def processes(self) -> list[psutil.Process]:
        return processes_of(self.flow_run_id)


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    name: str
    inject: Callable[[Scene], bool]
    ends: str | None
    """Type of the state that the flow run ends in; None where it must go on to the end."""

    stages: tuple[str, ...] = STAGES
    """Where it can happen."""

    may_crash: bool = False
    """Whether a run may also end as Crashed: one that has not begun gives up a server that it has
    never reached, and goes with the worker that is starting it."""

    weight: int = 1
    """How often it is chosen, against the others, once each was; those that last are rare."""


def _kill_one(found: list[psutil.Process], scene: Scene, number: signal.Signals) -> bool:
    if not found:
        return False
    with suppress(psutil.NoSuchProcess):
        scene.chance.choice(found).send_signal(number)
        return True
    return False


def _kill_rank(scene: Scene) -> bool:
    return _kill_one(ranks(scene.processes()), scene, signal.SIGKILL)


def _terminate_rank(scene: Scene) -> bool:
    return _kill_one(ranks(scene.processes()), scene, signal.SIGTERM)


def _kill_launcher(scene: Scene) -> bool:
    return _kill_one(agents(scene.processes()), scene, signal.SIGKILL)


def _signal_flow(scene: Scene, number: signal.Signals) -> bool:
    found = flow_process(scene.processes())
    return _kill_one([found] if found else [], scene, number)


def _kill_flow(scene: Scene) -> bool:
    return _signal_flow(scene, signal.SIGKILL)


def _terminate_flow(scene: Scene) -> bool:
    return _signal_flow(scene, signal.SIGTERM)


def _cancel(scene: Scene) -> bool:
    try:
        scene.servers.api.cancel(scene.flow_run_id)
    except TimeoutError:
        return _heard_of_it(scene)
    except urllib.error.URLError:  # the server is busy, or on its way back
        return False
    return True


def _heard_of_it(scene: Scene) -> bool:
    """Whether a server that was away while it was asked to cancel has done so since.

    The request waits in its socket and is worked on some time after the server is back.
    """
    back_until = time.monotonic() + 90.0
    asked_until: float | None = None
    while time.monotonic() < (asked_until or back_until):
        try:
            run = scene.servers.api.flow_run(scene.flow_run_id)
        except OSError:
            time.sleep(0.5)
            continue
        if run.type in ("CANCELLING", "CANCELLED"):
            return True
        asked_until = asked_until or time.monotonic() + 10.0
        time.sleep(0.5)
    return False


def _kill_worker(scene: Scene) -> bool:
    worker = scene.servers.worker
    worker.kill_alone()
    scene.after(scene.chance.uniform(0.0, 5.0), worker.start)
    return True


def _kill_worker_and_flow(scene: Scene) -> bool:
    """As when a machine dies: nobody is left to report it, only heartbeats stop."""
    found = flow_process(scene.processes())
    if found is None:
        return False
    scene.servers.worker.kill_alone()
    with suppress(psutil.NoSuchProcess):
        found.kill()
    scene.after(scene.chance.uniform(0.0, 5.0), scene.servers.worker.start)
    return True


def _kill_prefect(scene: Scene) -> bool:
    scene.servers.prefect.kill()
    scene.after(scene.chance.uniform(0.0, 5.0), scene.servers.prefect.start)
    return True


def _kill_mlflow(scene: Scene) -> bool:
    scene.servers.mlflow.kill()
    scene.after(scene.chance.uniform(0.0, 5.0), scene.servers.mlflow.start)
    return True


def _lose_prefect(scene: Scene) -> bool:
    scene.servers.prefect.pause()
    scene.after(OUTAGE, scene.servers.prefect.resume)
    return True


def _lose_mlflow(scene: Scene) -> bool:
    scene.servers.mlflow.pause()
    scene.after(OUTAGE, scene.servers.mlflow.resume)
    return True


def _fill_disk(scene: Scene) -> bool:
    """Take the space away while a training runs, so that its next checkpoint does not fit."""
    if not ranks(scene.processes()) or not _writes_another_checkpoint(scene.run_dir):
        return False
    spare = scene.chance.randrange(_SPARE)
    with ballast(scene.run_dir).open("wb") as stream:
        for _ in range(100):
            free = os.statvfs(scene.run_dir)
            try:
                os.posix_fallocate(
                    stream.fileno(), 0, max(free.f_bavail * free.f_frsize - spare, 1)
                )
                break
            except OSError as error:  # a checkpoint being written took some of it meanwhile
                if error.errno != errno.ENOSPC:
                    raise
    if _writes_another_checkpoint(scene.run_dir):
        return True
    # The last one was written meanwhile. What comes after it is small enough to fit.
    ballast(scene.run_dir).unlink()
    return False


def _writes_another_checkpoint(run_dir: Path) -> bool:
    """Whether the training at work has written a checkpoint, and not yet the last one.

    There is one after each step but the last.
    """
    for folder in (run_dir / "work").glob("*/checkpoints"):
        steps = [int(state.parent.name[5:]) for state in folder.glob("step-*/state.json")]
        job = json.loads((folder.parent / "job.json").read_text())
        if steps:
            return max(steps) + 1 < job["training"]["steps"]
    return False


def ballast(run_dir: Path) -> Path:
    """The file that fills the disk; the operator who makes room removes it."""
    return run_dir / "ballast"


FAULTS: tuple[Fault, ...] = (
    Fault("SIGKILL a rank", _kill_rank, "FAILED", TRAININGS, weight=6),
    Fault("SIGTERM a rank", _terminate_rank, "FAILED", TRAININGS, weight=4),
    Fault("SIGKILL the launcher", _kill_launcher, "FAILED", TRAININGS, weight=6),
    Fault("disk full in a checkpoint", _fill_disk, "FAILED", TRAININGS, weight=6),
    Fault("SIGKILL the flow", _kill_flow, "CRASHED", weight=8),
    Fault("SIGTERM the flow", _terminate_flow, "CRASHED", weight=6),
    Fault("cancel from the API", _cancel, "CANCELLED", weight=8),
    Fault("SIGKILL worker and flow", _kill_worker_and_flow, "CRASHED", weight=1),
    Fault("SIGKILL the worker", _kill_worker, None, _BEGUN, weight=12),
    Fault("SIGKILL Prefect", _kill_prefect, None, _BEGUN, weight=12),
    Fault("SIGKILL MLflow", _kill_mlflow, None, weight=12),
    Fault("Prefect away for a minute", _lose_prefect, None, _BEGUN, weight=1),
    Fault("MLflow away for a minute", _lose_mlflow, None, weight=1),
    Fault("SIGKILL the starting worker", _kill_worker, None, (START,), may_crash=True, weight=1),
    Fault("SIGKILL Prefect at a start", _kill_prefect, None, (START,), may_crash=True, weight=4),
)


def damage(file: Path, chance: random.Random) -> str:
    """Cut a file short, or flip one of its bits; returns which, in words."""
    content = bytearray(file.read_bytes())
    if chance.random() < 0.5:
        file.write_bytes(content[: chance.randrange(len(content))])
        return f"truncated {file.name}"
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return f"bit flipped in {file.name}"
