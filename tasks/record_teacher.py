"""Stage `teacher-outputs`: what the teacher says of the data is recorded once."""

from __future__ import annotations

from grace_core import stages
from grace_core.config import GraceConfig
from tasks.tracked import StageRef, run_stage, stage_task


@stage_task("teacher-outputs")
def record_teacher(
    config: GraceConfig, run: str, data: StageRef, teacher: StageRef | None
) -> StageRef:
    fitted = teacher.artifact() if teacher else None
    return run_stage(
        config,
        run,
        "teacher-outputs",
        lambda context: stages.record_teacher(config, data.artifact(), fitted, context),
    )
