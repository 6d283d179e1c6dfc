"""Processes of a training leave when the process that started them is gone.

A launcher that is killed can end nobody, and one that is told to end may miss it. So each process
below a flow run looks itself whether its parent still lives: the agent watches the flow's process,
the ranks watch the agent. No signal has to arrive anywhere for everything to be over within
2 * (LOOK_SECONDS + LEAVE_SECONDS) of the flow's death.
"""

from __future__ import annotations

import os
import signal
import threading
import time

LOOK_SECONDS = 0.5
LEAVE_SECONDS = 15.0
"""From when an orphan knows to the SIGKILL that it sends itself."""

_PARENT = "GRACE_PARENT_PID"


def be_parent() -> None:
    """Make this process the one whose end its children notice, also before they first look."""
    os.environ[_PARENT] = str(os.getpid())


def leave_with_parent() -> None:
    """From now on this process ends itself once its parent is gone: SIGTERM, later SIGKILL.

    The parent is the one that called `be_parent`, else the present one.
    """
    parent = int(os.environ.get(_PARENT, os.getppid()))
    _start_watch(parent, signal.SIGTERM)


def end_after_parent() -> None:
    """From now on this process is killed some time after its parent is gone.

    For one that the kernel asks to leave (PR_SET_PDEATHSIG), and that must not be asked twice.
    """
    _start_watch(os.getppid(), None)


def _start_watch(parent: int, ask: signal.Signals | None) -> None:
    threading.Thread(target=_watch, args=(parent, ask), name="orphan", daemon=True).start()


def _watch(parent: int, ask: signal.Signals | None) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    if ask is not None:
        os.kill(os.getpid(), ask)
    time.sleep(LEAVE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
