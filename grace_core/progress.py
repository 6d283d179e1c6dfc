"""How far a stage and a run are, and how long they still take: one computation for every display.

The terminal, Prefect and MLflow show what is said here. Nothing is guessed: where no honest
estimate exists, the time left is None and shown as unknown.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grace_core.config.tree import GraceConfig
from grace_core.events import Event
from grace_core.plan import Goal, earlier_seconds, planned_stages

_RECENT = 20
"""Reports whose median speed counts: long enough to pass over a slow one, short enough to notice
that the machine has become slower."""

_COUNTS_SHOWN = 3


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is; in optimizer steps, records, bytes or questions."""

    stage: str
    done: float = 0.0
    total: float | None = None
    seconds_left: float | None = None

    @property
    def fraction(self) -> float | None:
        """In [0, 1]; None while the stage has not said how much it has to do."""
        return None if not self.total else min(1.0, self.done / self.total)


class StageMeter:
    """The progress of one stage, from its events in their order.

    since: seconds since the epoch; earlier events say how far the stage is, not how fast: they are
    of an attempt that ended.
    """

    def __init__(self, stage: str, since: float = 0.0) -> None:
        self._stage = stage
        self._since = since
        self._done = 0.0
        self._total: float | None = None
        self._forget()

    def take(self, event: Event) -> None:
        """Learn from an event; kinds that say nothing of progress are passed over."""
        values = event.values
        if event.kind == "train":
            self._reached(event.time, event.step, values.get("steps"))
        elif event.kind == "progress" and "done" in values:
            self._reached(event.time, values["done"], values.get("total"))
        elif event.kind == "checkpoint" and event.time >= self._since:
            self._pause += values["seconds"]
            self._in_checkpoints += values["seconds"]
        elif event.kind == "resume":
            # Another machine may be at work now: what earlier attempts took says nothing.
            self._forget()
            self._done, self._total = event.step, values.get("steps", self._total)

    @property
    def progress(self) -> StageProgress:
        return StageProgress(self._stage, self._done, self._total, self._seconds_left())

    def _forget(self) -> None:
        self._last: tuple[float, float] | None = None
        self._speeds: deque[float] = deque(maxlen=_RECENT)  # seconds for one unit of work
        self._made = self._pause = self._in_checkpoints = 0.0

    def _reached(self, moment: float, done: float, total: float | None) -> None:
        if self._last is not None and done <= self._last[1]:
            self._forget()  # the work began anew
        if self._last is not None:
            before, done_before = self._last
            seconds = max(0.0, moment - before - self._pause)
            self._speeds.append(seconds / (done - done_before))
            self._made += done - done_before
        self._last = (moment, done) if moment >= self._since else None
        self._pause = 0.0
        self._done, self._total = done, total

    def _seconds_left(self) -> float | None:
        """The median of recent times a unit, and the checkpoints' share, for what is left."""
        if self._total is None or not self._speeds:
            return None
        a_unit = statistics.median(self._speeds) + self._in_checkpoints / self._made
        return max(0.0, self._total - self._done) * a_unit


@dataclass(frozen=True)
class RunProgress:
    """Where a run is: stage `number` of `of`, and how far within it."""

    stage: StageProgress
    number: int
    of: int | None
    """None where the way is not known."""
    seconds_left: float | None
    """Of the whole run; None unless every stage to come has run before with the same work."""

    @property
    def fraction(self) -> float | None:
        """Stages done, and the share of the current one, over all stages; in [0, 1]."""
        if self.of is None:
            return None
        return (self.number - 1 + (self.stage.fraction or 0.0)) / self.of


class RunMeter:
    """The progress of a run, from the beginnings, ends and events of its stages."""

    def __init__(
        self,
        config: GraceConfig | None = None,
        goal: Goal | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Without `goal`, the number of stages stays unknown."""
        self.finished: list[str] = []
        self.stage: str | None = None
        """The stage at work, or the one that was when the run ended."""
        self.values: Mapping[str, float] = {}
        """What the stage at work measured last."""
        self._plan: list[str] = []
        self._before: dict[str, float | None] = {}
        if config is not None and goal is not None:
            self._plan = planned_stages(config, goal)
            self._before = {stage: earlier_seconds(config, stage) for stage in self._plan}
        self._now = now
        self.stage_began = now()
        """Seconds since the epoch."""
        self._meter = StageMeter("")

    def started(self, stage: str) -> None:
        self.stage, self.values = stage, {}
        self.stage_began = self._now()
        self._meter = StageMeter(stage, self.stage_began)

    def ended(self, stage: str) -> None:
        self.finished.append(stage)
        if stage == self.stage:
            self.stage = None

    def take(self, event: Event) -> None:
        self._meter.take(event)
        if event.kind in ("train", "progress"):
            self.values = event.values

    @property
    def progress(self) -> RunProgress | None:
        """None between two stages."""
        if self.stage is None:
            return None
        stage = self._meter.progress
        if self.stage not in self._plan:
            return RunProgress(stage, len(self.finished) + 1, None, None)
        index = self._plan.index(self.stage)
        return RunProgress(stage, index + 1, len(self._plan), self._run_left(stage, index))

    def _run_left(self, stage: StageProgress, index: int) -> float | None:
        now = stage.seconds_left
        if now is None and (before := self._before[stage.stage]) is not None:
            now = before - (self._now() - self.stage_began)
            if now < 0:  # slower than it was, so what it was says no more
                return None
        parts = [now, *(self._before[name] for name in self._plan[index + 1 :])]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None


def position_text(progress: RunProgress) -> str:
    """Such as `stage 5 of 15`."""
    return f"stage {progress.number}" + ("" if progress.of is None else f" of {progress.of}")


def left_text(seconds: float | None) -> str:
    """Such as `4:05 left`."""
    return "time left unknown" if seconds is None else f"{clock(seconds)} left"


def clock(seconds: float) -> str:
    """Such as 0:07, 12:30 or 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def measured_text(event: Event) -> str:
    """What an event says, in a few words: how far, and the losses of a training."""
    values = event.values
    if event.kind == "train":
        terms = ("cross_entropy", "distillation", "relational", "beta")
        losses = [f"{name} {values[name]:.3f}" for name in terms if name in values]
        of = f"/{values['steps']:.0f}" if "steps" in values else ""
        return "  ".join([f"step {event.step}{of}", *losses])
    if event.kind == "checkpoint":
        return f"step {event.step}  checkpoint written in {values['seconds']:.1f} s"
    if event.kind == "resume":
        return f"continuing after step {event.step}"
    share = f"{100 * values['done'] / values['total']:.0f} %" if values.get("total") else ""
    counts = [f"{name} {value:.0f}" for name, value in values.items()]
    return "  ".join([share, *counts[:_COUNTS_SHOWN]]).strip()
