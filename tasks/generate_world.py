"""Stage `world`: the toy pictures, conversations and benchmarks."""

from __future__ import annotations

from grace_core import stages
from grace_core.config import GraceConfig
from tasks.tracked import StageRef, run_stage, stage_task


@stage_task("world")
def generate_world(config: GraceConfig, run: str) -> StageRef:
    return run_stage(config, run, "world", lambda context: stages.generate_world(config, context))
