"""Times, spreads and memory of what a row of the table runs, and what the device can do at best."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from grace_core.bench.floors import Ceilings

GIB = 2.0**30
_BUDGET_SECONDS = 5.0
"""Of a row's repeats: what takes longer is repeated less often, at least twice."""

_SHORT_SECONDS = 1.0
"""What is shorter is warmed up more than once."""

_CEILING_REPEATS = 20


@dataclass(frozen=True)
class Runner:
    """Something to time."""

    run: Callable[[], Tensor | None]
    """One run; what it returns is its loss. Gradients it leaves are dropped between runs."""

    reset: Callable[[], None]
    """Puts things back before each run; not timed."""

    micro_batches: int = 1
    """How many a run holds: its time is divided by them."""

    warm_up: Callable[[], Tensor | None] | None = None
    """Something shorter that warms up as well."""

    held_bytes: int = 0
    """Taken before the first run and counted as its memory all the same."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one implementation."""

    milliseconds: float
    """Median of the repeats, for one micro-batch."""

    fastest: float
    slowest: float
    repeats: int
    memory_gib: float | None
    """Peak of allocated GPU memory above what was there before: weights, inputs. None on a CPU."""

    loss: float | None
    """Of the first run, or of its warm-up."""


class Meter:
    """Measures on one device."""

    def __init__(self, device: torch.device, *, repeats: int) -> None:
        self.device = device
        self.repeats = repeats
        self._cuda = device.type == "cuda"

    def ceilings(self) -> Ceilings:
        """Rates of a large matrix product and of a large copy, the best of several.

        Random numbers: a product of zeros is faster than any real one.
        """
        ceilings = Ceilings(self._product_rate(), self._copy_rate())
        self.clear()
        return ceilings

    def measure(self, runner: Runner) -> Measured:
        """Warm up, repeat, and take the median."""
        started = time.perf_counter()
        runner.reset()
        loss = (runner.warm_up or runner.run)()
        value = None if loss is None else float(loss)
        self._wait()
        if self._agreed(time.perf_counter() - started < _SHORT_SECONDS):
            for _ in range(2):
                runner.reset()
                (runner.warm_up or runner.run)()
        del loss
        self.clear()
        runner.reset()
        self._wait()
        before = 0
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        seconds: list[float] = []
        while len(seconds) < 2 or self._agreed(
            len(seconds) < self.repeats and sum(seconds) + seconds[-1] < _BUDGET_SECONDS
        ):
            runner.reset()
            seconds.append(self._timed(runner.run))
        peak = None
        if self._cuda:
            peak = (torch.cuda.max_memory_allocated(self.device) - before + runner.held_bytes) / GIB
        runner.reset()
        scaled = [1e3 * taken / runner.micro_batches for taken in seconds]
        return Measured(
            statistics.median(scaled), min(scaled), max(scaled), len(scaled), peak, value
        )

    def clear(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()

    def _product_rate(self) -> float:
        side, dtype = (8192, torch.bfloat16) if self._cuda else (1024, torch.float32)
        left, right = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(left)
        return 2.0 * side**3 / self._best(lambda: torch.mm(left, right, out=product))

    def _copy_rate(self) -> float:
        size = 2**32 if self._cuda else 2**27
        source = torch.randint(0, 127, (size,), device=self.device, dtype=torch.int8)
        target = torch.empty_like(source)
        return 2.0 * size / self._best(lambda: target.copy_(source))

    def _timed(self, run: Callable[[], object]) -> float:
        """Seconds of one run."""
        if not self._cuda:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._wait()
        begin.record()
        run()
        end.record()
        self._wait()
        return begin.elapsed_time(end) / 1e3

    def _best(self, run: Callable[[], object]) -> float:
        for _ in range(3):
            run()
        return min(self._timed(run) for _ in range(_CEILING_REPEATS))

    def _agreed(self, decision: bool) -> bool:
        """The first rank's: steps that reduce over ranks are taken by all or by none."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return decision
        of_first = torch.tensor(int(decision), device=self.device)
        dist.broadcast(of_first, src=0)
        return bool(of_first)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self.device)
