"""The stages in order, in this process: what `grace run` does without Prefect."""

from __future__ import annotations

from collections.abc import Callable

from grace_core import stages
from grace_core.artifacts import Artifact
from grace_core.config.model import GraceConfig
from grace_core.stages import StageContext

Announce = Callable[[str], None]


def run_pipeline(
    config: GraceConfig, context: StageContext, announce: Announce = lambda _stage: None
) -> Artifact:
    """Run every stage that is not done yet; returns the artifact of the last one.

    announce: called with each stage's name before it is looked at.
    """
    announce("data")
    data = stages.prepare_data(config, context)
    teacher = None
    if config.teacher_fit is not None:
        announce("teacher")
        teacher = stages.fit_teacher(config, data, context)
    announce("bf16")
    models = {"bf16": stages.distill(config, data, teacher, context)}
    for precision in config.quantize.variants:
        announce(precision)
        models[precision] = stages.quantize(
            config, precision, data, teacher, models["bf16"], context
        )
    releases = {}
    for label, model in models.items():
        announce(f"release-{label}")
        releases[label] = stages.release(config, model, context)
    evaluations = {}
    for label, scored in {"teacher": teacher, "baseline": None, **releases}.items():
        announce(f"evaluate-{label}")
        evaluations[label] = stages.evaluate(config, label, scored, context)
    announce("publish")
    return stages.publish(config, releases, evaluations, context)
