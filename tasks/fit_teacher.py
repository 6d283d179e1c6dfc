"""Stage `teacher`: the teacher is fitted to the data before it teaches."""

from __future__ import annotations

from grace_core import stages
from grace_core.config import GraceConfig
from tasks.tracked import StageRef, run_stage, stage_task


@stage_task("teacher")
def fit_teacher(config: GraceConfig, run: str, data: StageRef) -> StageRef:
    return run_stage(
        config,
        run,
        "teacher",
        lambda context: stages.fit_teacher(config, data.artifact(), context),
    )
