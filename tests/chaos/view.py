"""What is going on in a run: its processes, and the stage at work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_MARK = "PREFECT__FLOW_RUN_ID"
_RANK = "grace_core.training.worker"
_AGENT = "grace_core.launch.local_agent"
START = "start"
"""From the start of the flow's process to its first stage."""

STAGES = (
    *(START, "benchmarks", "world", "data", "bf16", "w8", "w4"),
    *("release-bf16", "release-w8", "release-w4"),
    *("evaluate-teacher", "evaluate-baseline", "evaluate-bf16", "evaluate-w8", "evaluate-w4"),
    *("report", "publish"),
)
TRAININGS = ("bf16", "w8", "w4")


def processes_of(flow_run_id: str) -> list[psutil.Process]:
    """Every living process that a flow run started, its own included, at whatever depth."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(_MARK) == flow_run_id:
                found.append(process)
    return found


def flow_process(processes: Iterable[psutil.Process]) -> psutil.Process | None:
    """The process that runs the flow itself: the outermost one that bears the mark."""
    known = {process.pid for process in processes}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.ppid() not in known:
                return process
    return None


def agents(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The launchers of a training."""
    return [process for process, words in _commands(processes) if _AGENT in words]


def ranks(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The training processes below a launcher."""
    return [
        process for process, words in _commands(processes) if _RANK in words and _AGENT not in words
    ]


def _commands(
    processes: Iterable[psutil.Process],
) -> Iterator[tuple[psutil.Process, list[str]]]:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            yield process, process.cmdline()


def partials(run_dir: Path) -> set[Path]:
    """Folders of artifacts that are being made, or were when their process was killed."""
    return set((run_dir / "artifacts").glob(".*.partial-*"))


def stage_at_work(run_dir: Path, left_behind: set[Path]) -> str | None:
    """The stage whose artifact is being made; None between two.

    left_behind: `partials` that were there before.
    """
    found = []
    for folder in partials(run_dir) - left_behind:
        with suppress(FileNotFoundError):
            found.append((folder.stat().st_mtime, folder.name))
    return _stage_of(max(found)[1].lstrip(".")) if found else None


def finished_stages(run_dir: Path) -> set[str]:
    """Stages whose artifact has its final name."""
    return {_stage_of(folder.name) for folder in artifacts(run_dir)}


def artifacts(run_dir: Path) -> list[Path]:
    """Folders with the final name of an artifact."""
    found = (run_dir / "artifacts").glob("[!.]*")
    return sorted(folder for folder in found if folder.is_dir())


def _stage_of(name: str) -> str:
    """`release-w4-0123456789ab` and `release-w4-0123456789ab.partial-01234567` are of one stage."""
    return name.partition(".")[0].rpartition("-")[0]
