"""Running the stages of a reproduction, each with the configuration that was recorded for it."""

from __future__ import annotations

from typing import cast

from grace_core import stages
from grace_core.artifacts import Artifact
from grace_core.cli.chain import Observer
from grace_core.config.training import Precision
from grace_core.reproduction.plan import Plan
from grace_core.stages import StageContext


def remake(plan: Plan, observer: Observer) -> dict[str, Artifact]:
    """The artifacts by stage; those that an interrupted reproduction left are kept."""
    made: dict[str, Artifact] = {}
    context = StageContext(observer.on_event)
    for node in plan.stages:
        observer.started(node.stage)
        made[node.stage] = _make(plan, node.stage, made, context)
        observer.ended(node.stage, made[node.stage])
    return made


def _make(plan: Plan, stage: str, made: dict[str, Artifact], context: StageContext) -> Artifact:
    config = plan.configs[stage]
    teacher = made.get("teacher-outputs", made.get("teacher"))
    if stage == "world":
        return stages.generate_world(config, context)
    if stage == "data":
        return stages.prepare_data(config, context)
    if stage == "teacher":
        return stages.fit_teacher(config, made["data"], context)
    if stage == "teacher-outputs":
        return stages.record_teacher(config, made["data"], teacher, context)
    if stage == "bf16":
        return stages.distill(config, made["data"], teacher, context)
    if stage.startswith("release-"):
        return stages.release(config, made[stage.removeprefix("release-")], context)
    precision = cast(Precision, stage)
    return stages.quantize(config, precision, made["data"], teacher, made.get("bf16"), context)
