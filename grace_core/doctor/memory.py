"""How much memory a training needs at least, from its number of weights.

Mixed-precision Adam keeps 2 bytes of weights, 2 of gradients and 4 + 4 + 4 of fp32 weights and both
moments for every trained weight; ZeRO divides parts of that by the number of processes (Rajbhandari
et al. 2020, arXiv 1910.02054, section 3.1 and figure 1). The frozen teacher is 2 bytes a weight on
every process. Quantized training keeps W_hat, 2 bytes for each quantized weight, where it is made
once a step. Activations, logits and the libraries' own memory come on top: they depend on row
length and checkpointing, and are not part of the estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from grace_core.config.model import GraceConfig, TrainingStage
from grace_core.doctor.checkpoints import Checkpoint
from grace_core.training.zero import QUANTIZED_ONCE_STAGES

WEIGHT_BYTES = 2
GRADIENT_BYTES = 2
OPTIMIZER_BYTES = 12


@dataclass(frozen=True)
class Need:
    """What one process of a training holds at least, in bytes."""

    stage: str
    state: float
    teacher: float

    @property
    def total(self) -> float:
        return self.state + self.teacher


def training_stages(config: GraceConfig) -> dict[str, TrainingStage]:
    """The training stages' sections by artifact stage, in their order."""
    stages: dict[str, TrainingStage] = {}
    if config.teacher_fit is not None:
        stages["teacher"] = config.teacher_fit
    stages["bf16"] = config.distill
    return stages | {name: config.quantize for name in config.quantize.variants}


def trained_checkpoint(stage: str, teacher: Checkpoint, student: Checkpoint) -> Checkpoint:
    return teacher if stage == "teacher" else student


def needs(config: GraceConfig, teacher: Checkpoint, student: Checkpoint) -> list[Need] | None:
    """One need a training stage, and one of the stage in which the teacher's outputs are recorded:
    it has no state, and the students' trainings then have no teacher. None where a model's size is
    not known."""
    found = []
    if config.records_teacher:
        if teacher.parameters is None:
            return None
        found.append(Need("teacher-outputs", 0.0, teacher.parameters * WEIGHT_BYTES))
    for stage, section in training_stages(config).items():
        weights = trained_checkpoint(stage, teacher, student).parameters
        taught = teacher.parameters
        if config.records_teacher or not section.objective.needs_teacher:
            taught = 0
        if weights is None or taught is None:
            return None
        zero_stage = section.training.zero_stage
        state = weights * _bytes_a_weight(zero_stage, config.launch.world_size)
        if stage in config.quantize.variants and zero_stage in QUANTIZED_ONCE_STAGES:
            state += student.quantized_weights() * WEIGHT_BYTES
        found.append(Need(stage, state, taught * WEIGHT_BYTES))
    return found


def _bytes_a_weight(zero_stage: int, processes: int) -> float:
    parts = (OPTIMIZER_BYTES, GRADIENT_BYTES, WEIGHT_BYTES)  # divided in this order
    divided, whole = parts[:zero_stage], parts[zero_stage:]
    return sum(divided) / processes + sum(whole)


def in_units(size: float) -> str:
    """Bytes for people: 1 GB is 10^9 bytes."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"
