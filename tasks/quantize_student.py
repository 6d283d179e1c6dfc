"""Stages `w8` and `w4`: quantization-aware training, of the BF16 student as a rule."""

from __future__ import annotations

from grace_core import stages
from grace_core.config import GraceConfig
from grace_core.config.training import Precision
from tasks.tracked import StageRef, run_stage, stage_task


@stage_task("{precision}")
def quantize_student(
    config: GraceConfig,
    run: str,
    precision: Precision,
    data: StageRef,
    teacher: StageRef | None,
    bf16: StageRef | None,
) -> StageRef:
    fitted = teacher.artifact() if teacher else None
    start = bf16.artifact() if bf16 else None
    return run_stage(
        config,
        run,
        precision,
        lambda context: stages.quantize(config, precision, data.artifact(), fitted, start, context),
    )
