"""Stage `benchmarks`: the questions that all models are asked, before anything is trained."""

from __future__ import annotations

from grace_core import stages
from grace_core.config import GraceConfig
from tasks.tracked import StageRef, run_stage, stage_task


@stage_task("benchmarks")
def prepare_benchmarks(config: GraceConfig, run: str) -> StageRef:
    return run_stage(
        config, run, "benchmarks", lambda context: stages.prepare_benchmarks(config, context)
    )
