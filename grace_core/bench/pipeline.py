"""Every stage of a configuration once, with what each takes: time, memory, disk."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from rich.table import Table

from grace_core.artifacts import Artifact
from grace_core.bench.markdown import markdown_table
from grace_core.bench.measure import GIB
from grace_core.events import Event

_COLUMNS = (
    "stage",
    "seconds",
    "GPU GiB",
    "GB on disk",
    "steps",
    "seconds a step",
    "tokens/s",
)


@dataclass
class StageCost:
    """What one stage took."""

    stage: str
    seconds: float = 0.0
    memory_gib: float | None = None
    """Peak of allocated GPU memory; None where no GPU computed."""

    bytes: int = 0
    """Of the files that the stage leaves."""

    steps: int = 0
    """Optimizer steps of a training."""

    step_seconds: list[float] = field(default_factory=list)
    """Of each of them, waiting for data included."""

    tokens_per_second: list[float] = field(default_factory=list)
    """Of the same steps, over all processes."""

    @property
    def typical_step(self) -> float | None:
        """Median without the first, which compiles and allocates."""
        return statistics.median(self.step_seconds[1:]) if len(self.step_seconds) > 1 else None

    @property
    def typical_rate(self) -> float | None:
        """Tokens per second, likewise."""
        rates = self.tokens_per_second[1:]
        return statistics.median(rates) if rates else None


class StageMeter:
    """Is told by a `Chain` what happens, and notes what each stage takes.

    Memory of trainings, which run in processes of their own, is what they report; that of other
    stages is this process's.
    """

    def __init__(self) -> None:
        self.costs: list[StageCost] = []
        self._began = 0.0

    @contextmanager
    def beside(self, what: str) -> Iterator[StageCost]:
        """Measures the block, as something that is no stage."""
        self.started(what)
        try:
            yield self.costs[-1]
        finally:
            self._note()

    def started(self, stage: str) -> None:
        """A stage begins."""
        self.costs.append(StageCost(stage))
        if torch.cuda.is_initialized():
            # What an earlier stage of this process kept for itself would be missing elsewhere.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._began = time.monotonic()

    def ended(self, stage: str, artifact: Artifact) -> None:
        """It is done."""
        cost = self.costs[-1]
        assert cost.stage == stage, "stages follow one another"
        self._note()
        files = (file for file in artifact.path.rglob("*") if file.is_file())
        cost.bytes = sum(file.stat().st_size for file in files)

    def on_event(self, event: Event) -> None:
        """The stage reports."""
        cost = self.costs[-1]
        if event.kind != "train":
            return
        cost.steps += 1
        for name, values in (
            ("seconds", cost.step_seconds),
            ("tokens_per_second", cost.tokens_per_second),
        ):
            if name in event.values:
                values.append(event.values[name])
        taken = event.values.get("memory_allocated_gib")
        if taken is not None:
            cost.memory_gib = max(taken, cost.memory_gib or 0.0)

    def _note(self) -> None:
        cost = self.costs[-1]
        cost.seconds = time.monotonic() - self._began
        if torch.cuda.is_initialized():
            own = torch.cuda.max_memory_allocated() / GIB
            cost.memory_gib = max(own, cost.memory_gib or 0.0)


@dataclass(frozen=True)
class PipelineCosts:
    """A whole run's, with what it ran on."""

    name: str
    environment: Mapping[str, str]
    stages: list[StageCost]

    def to_json(self) -> str:
        """Everything, for programs."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def to_markdown(self) -> str:
        """For documents."""
        return markdown_table(self._heading(), _COLUMNS, self._rows())

    def to_rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self._heading())
        for position, name in enumerate(_COLUMNS):
            table.add_column(name, justify="left" if position == 0 else "right")
        for row in self._rows():
            table.add_row(*row)
        return table

    def _heading(self) -> str:
        device = self.environment.get("gpu", self.environment["cpu"])
        return (
            f"{self.name} on {device}: {sum(cost.seconds for cost in self.stages):.0f} s, torch "
            f"{self.environment['torch']}, transformers {self.environment['transformers']}"
        )

    def _rows(self) -> Iterable[tuple[str, ...]]:
        for cost in self.stages:
            yield (
                cost.stage,
                f"{cost.seconds:.1f}",
                "" if cost.memory_gib is None else f"{cost.memory_gib:.1f}",
                f"{cost.bytes / 1e9:.2f}",
                str(cost.steps or ""),
                "" if cost.typical_step is None else f"{cost.typical_step:.2f}",
                "" if cost.typical_rate is None else f"{cost.typical_rate:,.0f}",
            )
