"""What a pipeline run is doing, while it does it: stages from Prefect, steps from metric files."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from demo.prefect_api import FINAL, PrefectApi, RunState
from grace_core.config import GraceConfig
from grace_core.events import Event, EventReader
from grace_core.progress import RunMeter, clock, left_text, measured_text, position_text
from grace_core.training.job import METRICS

_LOOK_SECONDS = 1.0
_QUIET_SECONDS = 15.0  # between lines of progress where the output is a file
_MARKS = {"COMPLETED": "[green]done[/]", "FAILED": "[red]failed[/]", "CRASHED": "[red]crashed[/]"}


def follow(api: PrefectApi, flow_run_id: str, config: GraceConfig, console: Console) -> RunState:
    """Show a run of the whole pipeline until it has ended; returns its final state."""
    meter = RunMeter(config, "publish")
    metrics = _NewEvents(config.run_dir / "work")
    newest: Event | None = None
    shown: set[str] = set()
    started = last_line = time.monotonic()
    with console.status("waiting for the worker") as status:
        while True:
            flow_run = api.flow_run(flow_run_id)
            tasks = api.task_runs(flow_run_id)
            for task in tasks:
                if task.type in FINAL and task.id not in shown:
                    shown.add(task.id)
                    meter.ended(task.name)
                    console.print(_ended(task), soft_wrap=True)
            if flow_run.is_final:
                return flow_run
            running = [task.name for task in tasks if task.type == "RUNNING"]
            if running and meter.stage != running[0]:
                meter.started(running[0])
                newest = None
            for event in metrics.poll():
                if event.stage == meter.stage:
                    meter.take(event)
                    newest = event
            line = f"{clock(time.monotonic() - started)}  {', '.join(running) or flow_run.state}"
            if (progress := meter.progress) is not None:
                line += f" ({position_text(progress)})"
                if newest is not None:
                    line += f"  {measured_text(newest)}  {left_text(progress.stage.seconds_left)}"
            status.update(line)
            if not console.is_terminal and time.monotonic() - last_line >= _QUIET_SECONDS:
                console.print(f"  {line}", soft_wrap=True)
                last_line = time.monotonic()
            time.sleep(_LOOK_SECONDS)


class _NewEvents:
    """Metric events of all stages at work, leaving out what was there before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._readers: dict[Path, EventReader] = {
            file: EventReader(file, file.stat().st_size) for file in self._files()
        }

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"*/{METRICS}"))

    def poll(self) -> list[Event]:
        """Those that came since the last call."""
        return [
            event
            for file in self._files()
            for event in self._readers.setdefault(file, EventReader(file)).poll()
        ]


def _ended(task: RunState) -> str:
    mark = "[cyan]kept[/]" if task.state == "Cached" else _MARKS.get(task.type, task.state)
    line = f"{mark}  {task.name}  {clock(task.seconds)}"
    return line if task.type == "COMPLETED" else f"{line}\n{task.message}"
