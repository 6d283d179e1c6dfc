"""What the processes of a stage are told, as one JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from grace_core.config.models import TeacherWeights
from grace_core.config.objective import Objective
from grace_core.config.section import Section
from grace_core.config.training import BITS, Precision, TeacherOutputs, Training

METRICS = "metrics.jsonl"
"""In the work folder: what the training measured, kept when it is done."""


def work_folder(run_dir: Path, artifact: Path) -> Path:
    """Where a training works that leaves this artifact: checkpoints, metrics and logs."""
    return run_dir / "work" / artifact.name


class RankJob(Section):
    """What every job of a process group has: a stage, a device and a folder to work in."""

    stage: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    work: Path = Field(description="folder of checkpoints, metrics and logs; a re-run continues it")

    @property
    def metrics(self) -> Path:
        return self.work / METRICS

    @property
    def environment(self) -> Path:
        """What rank 0 ran on: world size, processor, GPUs."""
        return self.work / "environment.json"

    @property
    def setting(self) -> dict[str, str]:
        """What else the manifest says of the environment."""
        return {}


class TrainingJob(RankJob):
    """One training stage, fully resolved: paths on disk and settings, nothing to look up."""

    seed: int
    training: Training
    objective: Objective
    student: Path = Field(description="checkpoint directory the student starts from")
    teacher: Path | None = Field(None, description="checkpoint directory of the frozen teacher")
    teacher_weights: TeacherWeights = "whole"
    teacher_outputs: Path | None = Field(
        None, description="folder of the teacher's recorded outputs, in place of the teacher"
    )
    data: Path = Field(description="Arrow directory of prepared samples")
    min_pixels: int
    max_pixels: int
    precision: Precision | None = Field(None, description="quantized training; None is BF16")
    group_size: int = 128
    grace_seconds: float = Field(20.0, description="seconds between SIGTERM and SIGKILL")

    @property
    def setting(self) -> dict[str, str]:
        return {"zero_stage": str(self.training.zero_stage)}

    @property
    def bits(self) -> int:
        assert self.precision is not None, "BF16 training has no code width"
        return BITS[self.precision]

    @property
    def checkpoints(self) -> Path:
        return self.work / "checkpoints"

    @property
    def kept(self) -> Path:
        """What a stopped run continues from."""
        return self.checkpoints

    @property
    def result(self) -> Path:
        """Where the trained checkpoint lies once the job is done."""
        return self.work / "trained"


class TeacherJob(RankJob):
    """One pass of the teacher over a data set, fully resolved."""

    teacher: Path = Field(description="checkpoint directory")
    teacher_weights: TeacherWeights = "whole"
    student: Path = Field(description="checkpoint directory of whoever learns from the outputs")
    data: Path = Field(description="Arrow directory of prepared samples")
    min_pixels: int
    max_pixels: int
    outputs: TeacherOutputs
    temperature: float
    training: Training = Field(description="how rows are made and computed; its loop is not run")

    @property
    def shards(self) -> Path:
        """Shards that are whole, while others are made."""
        return self.work / "shards"

    @property
    def kept(self) -> Path:
        """What a stopped run continues from."""
        return self.shards

    @property
    def result(self) -> Path:
        """Where all shards lie once the job is done."""
        return self.work / "outputs"
