"""Small trainings for the SLURM back-end, and what an undisturbed local one makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grace_core.config.launch import Launch
from grace_core.events import EventReader, read_events
from grace_core.launch.backend import Program, backend_of
from grace_core.training.job import TrainingJob
from tests.objective_oracle import opinionated
from tests.prepared_rows import prepared_row, write_prepared
from tests.tiny_models import FAMILIES, save_tiny

TIMES = ("seconds", "tokens_per_second")
STEPS = 60
"""Long enough to be met in the middle."""
CLUSTER = {"kind": "slurm", "poll_seconds": 1, "warning_seconds": 20}


def make_inputs(root: Path) -> None:
    """A teacher, a student and 20 samples."""
    student = opinionated(FAMILIES["qwen3_vl"](seed=22))
    save_tiny(opinionated(FAMILIES["qwen3_vl"](seed=21, hidden=256)), root / "teacher")
    save_tiny(student, root / "student")
    write_prepared(root / "data", [prepared_row(student, i, pictures=i % 3) for i in range(20)])


def make_job(root: Path, name: str, **training: Any) -> TrainingJob:
    """ZeRO-2 with a teacher; `name` is its work folder."""
    return TrainingJob.model_validate(
        {
            "stage": "bf16",
            "seed": 1,
            "training": {
                "steps": STEPS,
                "row_tokens": 60,
                "rows_per_step": 4,
                "learning_rate": 1e-3,
                "zero_stage": 2,
                "recompute": "none",
                "checkpoint_every": 25,
                **training,
            },
            "objective": {"relational": {"warmup_steps": 2}},
            "student": root / "student",
            "teacher": root / "teacher",
            "data": root / "data",
            "min_pixels": 1024,
            "max_pixels": 16384,
            "device": "cpu",
            "grace_seconds": 20.0,
            "work": root / "work" / name,
        }
    )


def slurm_launch(**backend: Any) -> Launch:
    """One process on each of two nodes."""
    return Launch.model_validate(
        {"nodes": 2, "device": "cpu", "backend": CLUSTER | backend, "grace_seconds": 25.0}
    )


LOCAL = Launch(processes=2, device="cpu")


@dataclass
class Watched:
    """One watch of a training, and what it was told meanwhile."""

    job: TrainingJob
    launch: Launch
    lines: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def run(self, on_step: Callable[[int], None] = lambda _step: None) -> None:
        """Run it as a stage does; on_step: called with each step when it is seen."""
        self.job.work.mkdir(parents=True, exist_ok=True)
        file = self.job.work / "job.json"
        file.write_text(self.job.model_dump_json(), encoding="utf-8")
        program = Program(self.job.stage, "grace_core.training.worker", [str(file)], self.job.work)
        events = EventReader(self.job.metrics)

        def forward() -> None:
            for event in events.poll():
                if event.kind == "train":
                    self.steps.append(event.step)
                    on_step(event.step)

        backend_of(self.launch).run(program, on_poll=forward, on_line=self.lines.append)


def trained(job: TrainingJob) -> dict[str, bytes]:
    """Content of the weights that a training left."""
    return {file.name: file.read_bytes() for file in sorted(job.result.glob("*.safetensors"))}


def measured(job: TrainingJob) -> list[tuple[int, dict[str, float]]]:
    """Steps with their values, without what depends on the clock or the machine."""
    return [
        (event.step, {n: v for n, v in event.values.items() if n in _TERMS})
        for event in read_events(job.metrics)
        if event.kind == "train"
    ]


_TERMS = (
    *("cross_entropy", "distillation", "relational", "beta", "omega", "learning_rate"),
    *("grad_norm", "supervised_tokens", "distillation_ema"),
)


def job_id(job: TrainingJob) -> int:
    """Id of the SLURM job that is or was watched."""
    found = json.loads((job.work / "slurm" / "job.json").read_text(encoding="utf-8"))
    return int(found["id"])
