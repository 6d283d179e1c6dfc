"""Stage `bf16`: the student learns from the teacher in BF16."""

from __future__ import annotations

from grace_core import stages
from grace_core.config import GraceConfig
from tasks.tracked import StageRef, run_stage, stage_task


@stage_task("bf16")
def distill_student(
    config: GraceConfig, run: str, data: StageRef, teacher: StageRef | None
) -> StageRef:
    fitted = teacher.artifact() if teacher else None
    return run_stage(
        config,
        run,
        "bf16",
        lambda context: stages.distill(config, data.artifact(), fitted, context),
    )
