"""What a running command shows: a line for each stage, and a bar for the one at work."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from grace_core.artifacts import MANIFEST, Artifact
from grace_core.events import Event
from grace_core.progress import RunMeter, clock, left_text, measured_text, position_text

_QUIET_SECONDS = 15.0  # between lines of progress where the output is a file


class LiveProgress:
    """An `Observer` that writes to a terminal, or plain lines to a file."""

    def __init__(self, console: Console, meter: RunMeter) -> None:
        self._console = console
        self._meter = meter
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._started = self._started_at = self._last_line = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def started(self, stage: str) -> None:
        self._stage = stage
        self._started = self._last_line = time.monotonic()
        self._started_at = time.time()
        self._meter.started(stage)
        progress = self._meter.progress
        assert progress is not None
        self._task = self._progress.add_task(
            f"{stage} ({position_text(progress)})", total=None, note="", left=""
        )

    def ended(self, stage: str, artifact: Artifact) -> None:
        assert self._task is not None
        self._meter.ended(stage)
        self._progress.remove_task(self._task)
        made = (artifact.path / MANIFEST).stat().st_mtime >= self._started_at
        mark = "[green]done[/]" if made else "[cyan]kept[/]"
        seconds = clock(time.monotonic() - self._started) if made else ""
        self._console.print(
            f"{mark}  {stage:17}{seconds:>6}  {escape(str(artifact.path))}",
            highlight=False,
            soft_wrap=True,
        )

    def on_event(self, event: Event) -> None:
        assert self._task is not None
        self._meter.take(event)
        progress = self._meter.progress
        assert progress is not None
        stage, note = progress.stage, measured_text(event)
        left = left_text(stage.seconds_left)
        if progress.seconds_left is not None and progress.of is not None:
            left += f" (run {left_text(progress.seconds_left)})"
        self._progress.update(
            self._task, completed=stage.done, total=stage.total, note=note, left=left
        )
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line >= _QUIET_SECONDS:
            self._last_line = now
            self._console.print(
                f"      {self._stage:17}{clock(now - self._started):>6}  {note}  {left}",
                highlight=False,
                soft_wrap=True,
            )
