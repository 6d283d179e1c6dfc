"""What a pipeline run is doing, while it does it: stages from Prefect, steps from metric files."""

from __future__ import annotations

import math
import time
from pathlib import Path

from rich.console import Console

from demo.prefect_api import FINAL, PrefectApi, RunState
from grace_core.events import Event, EventReader

_LOOK_SECONDS = 1.0
_QUIET_SECONDS = 15.0  # between lines of progress where the output is a file
_MARKS = {"COMPLETED": "[green]done[/]", "FAILED": "[red]failed[/]", "CRASHED": "[red]crashed[/]"}


def follow(api: PrefectApi, flow_run_id: str, run_dir: Path, console: Console) -> RunState:
    """Show a flow run until it has ended; returns its final state."""
    metrics = _NewestEvents(run_dir / "work")
    shown: set[str] = set()
    started = last_line = time.monotonic()
    with console.status("waiting for the worker") as status:
        while True:
            flow_run = api.flow_run(flow_run_id)
            tasks = api.task_runs(flow_run_id)
            for task in tasks:
                if task.type in FINAL and task.id not in shown:
                    shown.add(task.id)
                    console.print(_ended(task), soft_wrap=True)
            if flow_run.is_final:
                return flow_run
            running = [task.name for task in tasks if task.type == "RUNNING"]
            line = f"{_clock(time.monotonic() - started)}  {', '.join(running) or flow_run.state}"
            event = metrics.newest()
            if event is not None and event.stage in running:
                line += f"  {_measured(event)}"
            status.update(line)
            if not console.is_terminal and time.monotonic() - last_line >= _QUIET_SECONDS:
                console.print(f"  {line}", soft_wrap=True)
                last_line = time.monotonic()
            time.sleep(_LOOK_SECONDS)


class _NewestEvents:
    """The latest metric event of all stages at work, leaving out what was there before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._readers: dict[Path, EventReader] = {
            file: EventReader(file, file.stat().st_size) for file in self._files()
        }
        self._newest: Event | None = None

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*/metrics.jsonl"))

    def newest(self) -> Event | None:
        for file in self._files():
            reader = self._readers.setdefault(file, EventReader(file))
            if file.stat().st_size < reader.offset:  # cut by a resume
                reader = self._readers[file] = EventReader(file)
            for event in reader.poll():
                if self._newest is None or event.time >= self._newest.time:
                    self._newest = event
        return self._newest


def _ended(task: RunState) -> str:
    mark = "[cyan]kept[/]" if task.state == "Cached" else _MARKS.get(task.type, task.state)
    line = f"{mark}  {task.name}  {_clock(task.seconds)}"
    return line if task.type == "COMPLETED" else f"{line}\n{task.message}"


def _measured(event: Event) -> str:
    """How far the stage is, the time its remaining steps will take, and its losses."""
    values = dict(event.values)
    steps, seconds = values.pop("steps", None), values.get("seconds")
    text = f"step {event.step}" if steps is None else f"step {event.step}/{steps:.0f}"
    if steps is not None and seconds is not None:
        text += f"  {_clock((steps - event.step) * seconds)} left"
    losses = [
        f"{name} {value:.4g}" for name, value in list(values.items())[:3] if not math.isnan(value)
    ]
    return "  ".join([text, *losses])


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
