"""What a training says of itself while it runs: an event a step, a checkpoint and a resume."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch
from torch import distributed as dist

from grace_core.events import Event, EventWriter, truncate_after
from grace_core.training.job import TrainingJob
from grace_core.training.saved import STEP_PREFIX

_GIB = 2.0**30


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step measured, equal on all ranks; losses are global means."""

    cross_entropy: float
    distillation: float
    relational: float
    tokens: int
    supervised: float
    grad_norm: float
    scale_grad_norm: float | None


@dataclass(frozen=True)
class Agreement:
    """What the ranks told one another after a step: the largest value of any of them."""

    stop: bool
    data_seconds: float
    memory: Mapping[str, float]
    """GiB by name: see `memory_gib`."""


def memory_gib(device: torch.device) -> dict[str, float]:
    """Memory of this rank in GiB.

    On a GPU the peaks so far of what tensors took and of what PyTorch holds; on the CPU the
    process's resident set.
    """
    if device.type == "cuda":
        # Asked once: each of PyTorch's functions for a single number sorts through all of them.
        stats = torch.cuda.memory_stats_as_nested_dict(device)
        return {
            f"memory_{name}_gib": stats[f"{name}_bytes"]["all"]["peak"] / _GIB
            for name in ("allocated", "reserved")
        }
    return {"memory_resident_gib": psutil.Process().memory_info().rss / _GIB}


def agree(device: torch.device, *, stop: bool, data_seconds: float) -> Agreement:
    """One small reduction a step: whether any rank was told to stop, and the largest measures."""
    memory = memory_gib(device)
    own = [float(stop), data_seconds, *memory.values()]
    largest = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    told, waited, *of_memory = largest.tolist()
    return Agreement(bool(told), waited, dict(zip(memory, of_memory, strict=True)))


class Reporter:
    """Writes a run's events; rank 0 has one."""

    def __init__(self, job: TrainingJob, step: int, steps: int) -> None:
        """step: where the run goes on; what was reported of later steps is dropped."""
        self._job = job
        truncate_after(job.metrics, step)
        self._events = EventWriter(job.metrics)
        if step > 0:
            self._write("resume", step, {"steps": float(steps)})

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        self._write("train", step, values)

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint of `step` was written in `seconds`."""
        folder = self._job.checkpoints / f"{STEP_PREFIX}{step:08d}"
        size = sum(file.stat().st_size for file in folder.iterdir())
        self._write("checkpoint", step, {"seconds": seconds, "bytes": float(size)})

    def close(self) -> None:
        self._events.close()

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._events.write(Event(time.time(), self._job.stage, step, kind, values))
