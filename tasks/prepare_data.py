"""Stage `data`: conversations and pictures become the tokenized training set."""

from __future__ import annotations

from grace_core import stages
from grace_core.config import GraceConfig
from tasks.tracked import StageRef, run_stage, stage_task


@stage_task("data")
def prepare_data(config: GraceConfig, run: str) -> StageRef:
    return run_stage(config, run, "data", lambda context: stages.prepare_data(config, context))
