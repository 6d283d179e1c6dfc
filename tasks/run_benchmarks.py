"""Stages `evaluate-*`: one row of the results table, scored on the released files."""

from __future__ import annotations

from grace_core import stages
from grace_core.config import GraceConfig
from tasks.lineage import log_scores
from tasks.tracked import StageRef, run_stage, stage_task


@stage_task("evaluate-{label}")
def run_benchmarks(config: GraceConfig, run: str, label: str, model: StageRef | None) -> StageRef:
    """Score `model`; None stands for the checkpoint that the configuration names."""
    checkpoint = model.artifact() if model else None
    return run_stage(
        config,
        run,
        f"evaluate-{label}",
        lambda context: stages.evaluate(config, label, checkpoint, context),
        log_scores,
    )
