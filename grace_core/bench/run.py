"""Running the bench: each row in turn, so that one that fails leaves the others' results."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from grace_core.artifacts import environment
from grace_core.bench.cases import Case, Goal, Prepared, cases
from grace_core.bench.floors import Ceilings
from grace_core.bench.measure import Measured, Meter, Runner
from grace_core.bench.shapes import SHAPES, ShapesName
from grace_core.bench.table import GOALS_ARE_FOR, BenchTable, Floor, Line
from grace_core.bench.training_step import training_step
from grace_core.bench.workbench import Workbench
from grace_core.errors import GraceError
from grace_core.hardware import hardware

log = logging.getLogger(__name__)

TRAINING_STEP = "training-step"
_PROFILED_KERNELS = 40
_SHOWN_OF_A_FAILURE = 300


class Bench:
    """One bench on one device."""

    def __init__(
        self,
        shapes: ShapesName,
        device: torch.device,
        folder: Path,
        *,
        repeats: int,
        recompute: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """folder: an empty one for small files; `recompute` as `Workbench` takes it."""
        self.device = device
        self._meter = Meter(device, repeats=repeats)
        self._work = Workbench(SHAPES[shapes], device, folder, dtype=dtype, recompute=recompute)
        whole = Case(
            TRAINING_STEP,
            f"training step with ZeRO-2 and AdamW, {self._work.shapes.step_rows} packed rows of "
            f"{self._work.shapes.samples} samples a process",
            Goal(),
            lambda work: training_step(work, folder / TRAINING_STEP),
        )
        self.cases = [*cases(self._work), whole]

    @property
    def names(self) -> list[str]:
        """Of all rows."""
        return [case.name for case in self.cases]

    def run(self, names: Sequence[str]) -> Iterator[BenchTable]:
        """Measure the rows named, in the table's order; yields the table after each of them.

        Raises:
            GraceError: there is no such row.
        """
        self._check(names)
        ceilings = self._meter.ceilings()
        table = BenchTable(
            shapes=self._work.shapes.name,
            device=self._device_name,
            environment=environment(),
            processes=int(os.environ.get("WORLD_SIZE", "1")),
            recomputed_layers=self._work.recomputed_layers(self._work.shapes.samples),
            ceilings=ceilings,
            lines=[],
        )
        for case in self.cases:
            if case.name in names:
                table = replace(table, lines=[*table.lines, self._line(case, ceilings)])
                yield table

    def profile(self, name: str) -> str:
        """A table of what one run of a row spends its time on, longest first."""
        self._check([name])
        (case,) = (case for case in self.cases if case.name == name)
        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with case.prepare(self._work) as prepared:
            runner = prepared.ours
            run = runner.warm_up or runner.run
            for _ in range(2):
                runner.reset()
                run()
            runner.reset()
            with profile(activities=activities) as profiler:
                run()
                if cuda:
                    torch.cuda.synchronize(self.device)
            runner.reset()
        sorted_by = "self_device_time_total" if cuda else "self_cpu_time_total"
        table: str = profiler.key_averages().table(sort_by=sorted_by, row_limit=_PROFILED_KERNELS)
        return table

    def _check(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise GraceError(f"no row {', '.join(unknown)}; the rows are {', '.join(self.names)}")

    @property
    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return hardware()["cpu"]

    def _line(self, case: Case, ceilings: Ceilings) -> Line:
        goal = case.goal if GOALS_ARE_FOR in self._device_name else None
        if self._work.shapes.name != "real":
            goal = None
        log.info("%s", case.name)
        failures: list[str] = []
        try:
            with case.prepare(self._work) as prepared:
                line = self._measured(case, goal, prepared, ceilings, failures)
        except Exception as error:  # whatever it is, the other rows are worth having
            log.warning("%s: %s", case.name, _told(error), exc_info=True)
            failures.append(_told(error))
            line = Line(case.name, case.title, goal, failures=tuple(failures))
        self._meter.clear()
        return line

    def _measured(
        self,
        case: Case,
        goal: Goal | None,
        prepared: Prepared,
        ceilings: Ceilings,
        failures: list[str],
    ) -> Line:
        work, upper = prepared.work, prepared.upper_work
        return Line(
            case.name,
            case.title,
            goal,
            floor=Floor(
                milliseconds=ceilings.milliseconds(work),
                upper=None if upper is None else ceilings.milliseconds(upper),
                operations=work.operations,
                moved=work.moved,
            ),
            ours=self._attempt("ours", prepared.ours, failures),
            plain=self._attempt("plain", prepared.plain, failures),
            failures=tuple(failures),
            tokens=prepared.tokens,
        )

    def _attempt(self, which: str, runner: Runner, failures: list[str]) -> Measured | None:
        try:
            return self._meter.measure(runner)
        except Exception as error:  # whatever it is, the other implementation is measured too
            log.warning("%s: %s", which, _told(error), exc_info=True)
            failures.append(f"{which}: {_told(error)}")
        # The traceback, gone by now, held on to tensors.
        runner.reset()
        self._meter.clear()
        return None


def _told(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:_SHOWN_OF_A_FAILURE]}"
