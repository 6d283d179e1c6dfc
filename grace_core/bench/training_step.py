"""The row with everything: a whole optimizer step under DeepSpeed ZeRO-2, on one process or many.

The training loop's own `Trainer` takes the step. Only where it would read checkpoints and prepared
data from a disk it is given models and rows made in memory.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch import distributed as dist

from grace_core.bench import floors, plain
from grace_core.bench.cases import Prepared
from grace_core.bench.measure import Runner
from grace_core.bench.random_models import trained_weights
from grace_core.bench.shapes import GROUP_SIZE
from grace_core.bench.workbench import Workbench
from grace_core.config.training import Precision, Training
from grace_core.losses.objective import Teacher
from grace_core.models.loading import CheckpointFolder
from grace_core.training.engine import deepspeed_engine
from grace_core.training.job import TrainingJob
from grace_core.training.loop import Trainer

_STEPS = 1000
"""More than are taken, so that no repeat comes after the end of the schedule."""


@contextmanager
def process_group(device: torch.device) -> Iterator[int]:
    """The ranks that torchrun started, or this process alone; yields their number."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.get_world_size()
    finally:
        dist.destroy_process_group()


@contextmanager
def training_step(bench: Workbench, folder: Path) -> Iterator[Prepared]:
    """A whole optimizer step: teacher, student, ZeRO-2's reductions and AdamW, controller.

    Each process takes the same number of packed rows. Plain is the plain implementation under the
    same DeepSpeed settings. Times are those of a whole step, and memory is above both models and
    the optimizer's state.

    Args:
        folder: an empty one for the few files that the trainer reads.
    """
    bench.forget_student()
    shapes = bench.shapes
    with process_group(bench.device) as processes:
        rows = bench.rows(shapes.samples, shapes.step_rows)
        job = training_job(bench, folder, processes, zero_stage=2)
        made = _Made()

        def ours() -> Tensor:
            trainer = made.get("ours", lambda: InMemoryTrainer(job, bench))
            report = trainer.optimizer_step(rows)
            return torch.tensor(report.cross_entropy)

        def in_plain() -> None:
            step = made.get("plain", lambda: _PlainTraining(job, bench, processes))
            step.optimizer_step([bench.batch(row, shapes.samples) for row in rows])

        of_row = floors.step(shapes, shapes.samples)
        optimizer = floors.adamw(trained_weights(bench.shapes, bench.family)).times(1 / processes)
        yield Prepared(
            ours=Runner(ours, _nothing),
            plain=Runner(in_plain, _nothing),
            work=of_row.times(shapes.step_rows) + optimizer,
            tokens=shapes.step_rows * shapes.samples * shapes.sample_tokens,
        )
        made.clear()


def _nothing() -> None:
    pass


class _Made:
    """Holds one trainer at a time: two optimizers of a large model do not fit side by side."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._value: Any = None

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        if name != self._name:
            self.clear()
            self._name, self._value = name, make()
        return self._value

    def clear(self) -> None:
        if self._value is not None:
            self._value.engine.destroy()
        self._name = self._value = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class InMemoryTrainer(Trainer):
    """The training loop's trainer over models that were never on a disk."""

    def __init__(self, job: TrainingJob, bench: Workbench) -> None:
        self._bench = bench
        super().__init__(job, bench.device)

    def _load_student(self, folder: CheckpointFolder) -> Any:
        return self._bench.new_student()

    def _load_teacher(self, student: CheckpointFolder) -> Teacher:
        return Teacher.of(self._bench.teacher, self._bench.family)


class _PlainTraining:
    """The plain implementation, stepped by the same optimizer."""

    def __init__(self, job: TrainingJob, bench: Workbench, processes: int) -> None:
        student = plain.prepare_student(bench.new_plain_student(), bench.family)
        self._processes = processes
        self.engine = deepspeed_engine(_PlainLoss(bench, student), job, processes, bench.device)

    def optimizer_step(self, batches: list[plain.Batch]) -> None:
        """Micro-batches weigh the same, whatever they hold: a mean of means."""
        for batch in batches:
            loss = self.engine(batch)
            self.engine.backward(loss)
            self.engine.step()


class _PlainLoss(nn.Module):
    def __init__(self, bench: Workbench, student: Any) -> None:
        super().__init__()
        self.student = student
        self._bench = bench
        # In a tuple, so that it is no module of this one and DeepSpeed leaves it alone.
        self._teacher = (bench.plain_teacher,)

    def forward(self, batch: plain.Batch) -> Tensor:
        bench = self._bench
        return plain.loss_of(self._teacher[0], self.student, bench.family, bench.objective, batch)


def training_job(
    bench: Workbench,
    folder: Path,
    processes: int,
    *,
    precision: Precision | None = None,
    group_size: int = GROUP_SIZE,
    **training: Any,
) -> TrainingJob:
    """What the trainer is told; its data set only says how long samples are.

    training: settings beside those that follow from the shapes.
    """
    shapes = bench.shapes
    rows = shapes.step_rows * processes
    lengths = [shapes.sample_tokens] * (rows * shapes.samples)
    data = folder / f"data-{dist.get_rank()}"
    Dataset.from_dict({"num_tokens": lengths}).save_to_disk(str(data))
    return TrainingJob(
        stage=precision or "bf16",
        seed=0,
        training=Training(
            steps=_STEPS,
            row_tokens=shapes.samples * shapes.sample_tokens,
            rows_per_step=rows,
            **training,
        ),
        precision=precision,
        group_size=group_size,
        objective=bench.objective,
        student=bench.checkpoint.path,
        teacher=bench.checkpoint.path,
        data=data,
        min_pixels=shapes.picture_side**2,
        max_pixels=shapes.picture_side**2,
        device="cuda" if bench.device.type == "cuda" else "cpu",
        work=folder / "work",
    )
