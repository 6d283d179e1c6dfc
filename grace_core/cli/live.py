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
    TimeRemainingColumn,
)

from grace_core.artifacts import MANIFEST, Artifact
from grace_core.events import Event

_QUIET_SECONDS = 15.0  # between lines of progress where the output is a file


class LiveProgress:
    """An `Observer` that writes to a terminal, or plain lines to a file."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
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
        self._task = self._progress.add_task(stage, total=None, note="")

    def ended(self, stage: str, artifact: Artifact) -> None:
        assert self._task is not None
        self._progress.remove_task(self._task)
        made = (artifact.path / MANIFEST).stat().st_mtime >= self._started_at
        mark = "[green]done[/]" if made else "[cyan]kept[/]"
        seconds = _clock(time.monotonic() - self._started) if made else ""
        self._console.print(
            f"{mark}  {stage:17}{seconds:>6}  {escape(str(artifact.path))}",
            highlight=False,
            soft_wrap=True,
        )

    def on_event(self, event: Event) -> None:
        assert self._task is not None
        done, total, note = _measured(event)
        self._progress.update(self._task, completed=done, total=total, note=note)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line >= _QUIET_SECONDS:
            self._last_line = now
            self._console.print(
                f"      {self._stage:17}{_clock(now - self._started):>6}  {note}",
                highlight=False,
                soft_wrap=True,
            )


def _measured(event: Event) -> tuple[float, float | None, str]:
    """How much is done, of how much (None: unknown), and in words."""
    values = event.values
    if event.kind == "train":
        terms = ("cross_entropy", "distillation", "relational", "beta")
        losses = "  ".join(f"{name} {values[name]:.3f}" for name in terms if name in values)
        total = values.get("steps")
        of = "" if total is None else f"/{total:.0f}"
        return event.step, total, f"step {event.step}{of}  {losses}"
    totals = [name for name in values if name.endswith("/total")]
    if totals:
        name = totals[0].removesuffix("/total")
        done, total = values[f"{name}/done"], values[totals[0]]
        return done, total, f"{name} {done:.0f}/{total:.0f}"
    return event.step, None, "  ".join(f"{name} {value:.0f}" for name, value in values.items())


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
