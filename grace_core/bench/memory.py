"""Memory that trainings take, measured, beside what is worked out for them before a run."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from grace_core.bench.markdown import markdown_table
from grace_core.bench.training_step import InMemoryTrainer, process_group, training_job
from grace_core.bench.workbench import Workbench
from grace_core.config.training import Precision
from grace_core.training.memory import Decoder, FrozenTeacher, Memory, training_memory
from grace_core.training.recompute import trained_sizes

STEPS = 2
"""The moments exist from the second one on."""

_COLUMNS = ("training", "ZeRO", "recomputed", "estimated GB", "measured GB", "ratio", "at its peak")


@dataclass(frozen=True)
class Measurement:
    """One training's peak, in bytes."""

    precision: Precision | None
    zero_stage: Literal[0, 1, 2, 3]
    recompute: Literal["none", "all"]
    estimated: float
    """Without what libraries take outside of torch, which is not measured."""

    measured: int | None
    """Peak of allocated GPU memory; None on a CPU."""

    moment: str
    """At which the estimate is largest."""

    @property
    def ratio(self) -> float | None:
        """Estimated over measured."""
        return self.estimated / self.measured if self.measured else None


def trainer_of(bench: Workbench, folder: Path, **job: Any) -> InMemoryTrainer:
    """A trainer of the bench's models; called by all ranks of the group.

    Args:
        folder: for its few files.
        job: precision, group size and training settings, as `training_job` takes them.
    """
    processes = torch.distributed.get_world_size()
    return InMemoryTrainer(training_job(bench, folder, processes, **job), bench)


def estimate(bench: Workbench, trainer: InMemoryTrainer, *, row_bytes: int = 0) -> Memory:
    """What is worked out for a trainer's settings; `row_bytes` as `training_memory` takes it."""
    model, training = trainer.student.model, trainer.job.training
    on_gpu, group_size = bench.device.type == "cuda", trainer.job.group_size
    scales = 0 if trainer.bank is None else trainer.bank.flat.numel()
    sizes = replace(
        trained_sizes(model),
        quantized=scales * group_size,
        group_size=group_size,
        decoder=Decoder.of(model.config.get_text_config(), bench.family, fused=on_gpu),
    )
    weights = sum(parameter.numel() for parameter in bench.teacher.parameters())
    return training_memory(
        sizes,
        training,
        processes=trainer.processes,
        teacher=FrozenTeacher(weights=weights),
        row_bytes=row_bytes,
        on_gpu=on_gpu,
    )


def measurements(bench: Workbench, folder: Path) -> Iterator[Measurement]:
    """BF16 and W4, without and with recomputation, under ZeRO-1 and -2; one after the other."""
    rows = bench.rows(bench.shapes.samples, bench.shapes.step_rows)
    tokens = bench.shapes.samples * bench.shapes.sample_tokens
    row_bytes = sum(tensor.nbytes for tensor in rows[0].pictures.values()) // tokens
    assert bench.teacher is not None, "made before anything is measured"
    cases: list[tuple[Precision | None, Literal[1, 2], Literal["none", "all"]]] = [
        (precision, zero, recompute)
        for precision in (None, "w4")
        for zero in (1, 2)
        for recompute in ("none", "all")
    ]
    gpu = bench.device.type == "cuda"
    held = torch.cuda.memory_allocated(bench.device) if gpu else 0  # teacher and rows
    with process_group(bench.device):
        for precision, zero, recompute in cases:
            left = 0
            if gpu:
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(bench.device)
                # What an earlier training has not given back is not this one's.
                left = torch.cuda.memory_allocated(bench.device) - held
            place = folder / f"{precision}-{zero}-{recompute}"
            trainer = trainer_of(
                bench, place, precision=precision, zero_stage=zero, recompute=recompute
            )
            for _ in range(STEPS):
                trainer.optimizer_step(rows)
            memory = estimate(bench, trainer, row_bytes=row_bytes)
            peak = torch.cuda.max_memory_allocated(bench.device) - left if gpu else None
            trainer.engine.destroy()
            for parameter in trainer.student.parameters():
                # DeepSpeed binds methods to parameters: cycles that the collector does not see.
                parameter.__dict__.clear()
            del trainer
            moment = max(memory.moments, key=lambda name: memory.moments[name])
            yield Measurement(precision, zero, recompute, memory.peak, peak, moment)


@dataclass(frozen=True)
class MemoryTable:
    """Measurements with what they were made on."""

    environment: Mapping[str, str]
    measurements: list[Measurement]

    def to_json(self) -> str:
        """Everything, for programs."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def to_markdown(self) -> str:
        """For documents."""
        return markdown_table(self._heading(), _COLUMNS, self._rows())

    def to_rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self._heading())
        for name in _COLUMNS:
            table.add_column(name, justify="right" if "GB" in name or name == "ratio" else "left")
        for row in self._rows():
            table.add_row(*row)
        return table

    def _heading(self) -> str:
        device = self.environment.get("gpu", self.environment["cpu"])
        return f"memory of a training on {device}, torch {self.environment['torch']}"

    def _rows(self) -> Iterable[tuple[str, ...]]:
        for one in self.measurements:
            yield (
                one.precision or "bf16",
                str(one.zero_stage),
                one.recompute,
                f"{one.estimated / 1e9:.2f}",
                "" if one.measured is None else f"{one.measured / 1e9:.2f}",
                "" if one.ratio is None else f"{one.ratio:.3f}",
                one.moment,
            )
