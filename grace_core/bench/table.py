"""The table: one line a row of the bench, for people (Markdown, the terminal) and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table

from grace_core.bench.cases import Goal
from grace_core.bench.floors import Ceilings
from grace_core.bench.markdown import markdown_table
from grace_core.bench.measure import Measured
from grace_core.errors import GraceError

GOALS_ARE_FOR = "H200"
"""Goals are stated for one device of this name and shown for no other."""

_TERMINAL = ("row", "ours ms", "plain ms", "floor ms", "goal", "met", "GiB")
"""Of the columns below, those that a terminal is wide enough for."""

_COLUMNS = (
    "row",
    "measured",
    "ours ms",
    "spread",
    "plain ms",
    "speed-up",
    "floor ms",
    "x floor",
    "goal",
    "met",
    "GiB",
    "plain GiB",
)


@dataclass(frozen=True)
class Floor:
    """The least time that one micro-batch can take on this device, and with what it is unavoidable.

    Milliseconds; parts are those of `milliseconds`, operations and bytes counted.
    """

    milliseconds: float
    upper: float | None
    operations: Mapping[str, float]
    moved: Mapping[str, float]


@dataclass(frozen=True)
class Line:
    """One row: what was measured, or why it could not be."""

    name: str
    title: str
    goal: Goal | None
    """None on a device that the goals are not for."""

    floor: Floor | None = None
    ours: Measured | None = None
    plain: Measured | None = None
    failures: tuple[str, ...] = ()
    tokens: int | None = None
    """Of one run on one process, where throughput is the point."""

    @property
    def speed_up(self) -> float | None:
        """How many times faster than plain."""
        if self.ours is None or self.plain is None:
            return None
        return self.plain.milliseconds / self.ours.milliseconds

    @property
    def of_floor(self) -> float | None:
        """Time over the floor."""
        if self.ours is None or self.floor is None:
            return None
        return self.ours.milliseconds / self.floor.milliseconds

    @property
    def tokens_per_second(self) -> float | None:
        """On each process."""
        if self.ours is None or self.tokens is None:
            return None
        return 1e3 * self.tokens / self.ours.milliseconds

    @property
    def loss_gap(self) -> float | None:
        """Relative difference of the two losses: the same work was done where it is small."""
        if self.ours is None or self.plain is None:
            return None
        if self.ours.loss is None or self.plain.loss is None:
            return None
        return abs(self.ours.loss - self.plain.loss) / abs(self.plain.loss)

    @property
    def met(self) -> bool | None:
        """Whether the goals are met; None without a goal or a measurement."""
        if self.goal is None or self.ours is None:
            return None
        found = ((self.ours.milliseconds, self.goal.milliseconds),) + (
            ((self.ours.memory_gib, self.goal.memory_gib),) if self.ours.memory_gib else ()
        )
        asked = [value <= goal for value, goal in found if goal is not None]
        return all(asked) if asked else None


@dataclass(frozen=True)
class BenchTable:
    """A whole bench."""

    shapes: str
    device: str
    environment: Mapping[str, str]
    processes: int
    recomputed_layers: int
    """Decoder layers of the student, in every row but the training step."""

    ceilings: Ceilings
    lines: Sequence[Line]
    one_gpu_tokens_per_second: float | None = None
    """Of the training step on one process, to compare several with."""

    @property
    def failed(self) -> bool:
        """Whether any implementation of any row could not be measured."""
        return any(line.failures for line in self.lines)

    def compared_with(self, one_gpu: Path) -> BenchTable:
        """The same beside the throughput of one process, as the JSON of its bench has it.

        Raises:
            GraceError: that file is no bench's, or has no training step.
        """
        try:
            lines = json.loads(one_gpu.read_text(encoding="utf-8"))["lines"]
            (rate,) = (line["tokens_per_second"] for line in lines if line["tokens_per_second"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GraceError(
                f"{one_gpu} holds no training step ({type(error).__name__}); give the bench.json "
                "of `grace bench --rows training-step` on one GPU"
            ) from error
        return replace(self, one_gpu_tokens_per_second=rate)

    def to_json(self) -> str:
        """Everything, for programs."""
        lines = [
            asdict(line)
            | {
                name: getattr(line, name)
                for name in ("speed_up", "of_floor", "loss_gap", "met", "tokens_per_second")
            }
            for line in self.lines
        ]
        return json.dumps(asdict(self) | {"lines": lines}, indent=1) + "\n"

    def to_markdown(self) -> str:
        """For documents."""
        return markdown_table(self.heading(), _COLUMNS, map(_cells, self.lines), self._notes())

    def to_rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.heading(), caption="\n".join(self._notes()))
        for position, name in enumerate(_TERMINAL):
            table.add_column(name, justify="left" if position == 0 else "right")
        for line in self.lines:
            cells = dict(zip(_COLUMNS, _cells(line), strict=True))
            table.add_row(*(cells[name] for name in _TERMINAL))
        return table

    def heading(self) -> str:
        """Device, versions and what the device reaches at best."""
        versions = ", ".join(
            f"{name} {self.environment[name]}"
            for name in ("driver", "torch", "transformers", "deepspeed")
            if name in self.environment
        )
        rate = self.ceilings.operations_per_second / 1e12
        bandwidth = self.ceilings.bytes_per_second / 1e12
        return (
            f"{self.device}, {self.processes} process(es), {self.shapes} shapes; {versions}; "
            f"matrix product {rate:.3g} TFLOP/s, copy {bandwidth:.3g} TB/s; "
            f"{self.recomputed_layers} decoder layers recomputed in the longer rows"
        )

    def _notes(self) -> list[str]:
        notes = []
        for line in self.lines:
            if line.tokens_per_second is not None:
                note = f"{line.name}: {line.tokens_per_second:,.0f} tokens/s a process"
                if self.one_gpu_tokens_per_second is not None:
                    share = line.tokens_per_second / self.one_gpu_tokens_per_second
                    note += f", {100 * share:.1f} % of one process's"
                notes.append(note)
            notes += [f"{line.name} failed: {failure}" for failure in line.failures]
        return notes


def _cells(line: Line) -> tuple[str, ...]:
    ours, plain, floor, goal = line.ours, line.plain, line.floor, line.goal
    floors = "" if floor is None else f"{floor.milliseconds:.3g}"
    if floor is not None and floor.upper is not None:
        floors += f" to {floor.upper:.3g}"
    goals = []
    if goal is not None and goal.milliseconds is not None:
        goals.append(f"{goal.milliseconds:g} ms")
    if goal is not None and goal.memory_gib is not None:
        goals.append(f"{goal.memory_gib:g} GiB")
    return (
        line.name,
        line.title,
        "failed" if ours is None else f"{ours.milliseconds:.4g}",
        "" if ours is None else f"{ours.fastest:.4g} to {ours.slowest:.4g}",
        "failed" if plain is None else f"{plain.milliseconds:.4g}",
        "" if line.speed_up is None else f"{line.speed_up:.2f}",
        floors,
        "" if line.of_floor is None else f"{line.of_floor:.2f}",
        ", ".join(goals),
        {None: "", True: "yes", False: "no"}[line.met],
        _gib(ours),
        _gib(plain),
    )


def _gib(measured: Measured | None) -> str:
    if measured is None or measured.memory_gib is None:
        return ""
    return f"{measured.memory_gib:.2f}"
