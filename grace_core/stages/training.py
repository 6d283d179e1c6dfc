"""Stages `teacher`, `bf16`, `w8` and `w4`: one training run each, as a process group.

Stage `teacher-outputs`: one pass of the teacher over the data, likewise.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from grace_core.artifacts import Artifact, ArtifactWriter
from grace_core.config.training import Precision
from grace_core.config.tree import GraceConfig
from grace_core.errors import GraceError
from grace_core.events import EventReader
from grace_core.launch.backend import Program, backend_of
from grace_core.stages.once import StageContext, once
from grace_core.stages.training_plan import (
    TrainingPlan,
    plan_bf16,
    plan_quantized,
    plan_teacher,
    plan_teacher_outputs,
    write_job,
)
from grace_core.training.job import TeacherJob, TrainingJob
from grace_core.training.teacher_outputs import read_index


def fit_teacher(config: GraceConfig, data: Artifact, context: StageContext) -> Artifact:
    """Stage `teacher`: the teacher is fitted to the data with cross-entropy alone."""
    return _train(config, plan_teacher(config, data), context)


def record_teacher(
    config: GraceConfig, data: Artifact, teacher: Artifact | None, context: StageContext
) -> Artifact:
    """Stage `teacher-outputs`: what the teacher says of the data, for all trainings to learn from.

    teacher: the fitted teacher, or None for the checkpoint that the configuration names.
    """
    plan = plan_teacher_outputs(config, data, teacher)
    job = plan.job

    def make(writer: ArtifactWriter) -> None:
        _run_job(config, job, "grace_core.training.teacher_worker", context)
        writer.environment |= json.loads(job.environment.read_text(encoding="utf-8"))
        _link_tree(job.result, writer.path / "outputs")
        index = read_index(job.result)
        size = sum(file.stat().st_size for file in job.result.iterdir())
        writer.metrics |= {
            "samples": float(index.samples),
            "tokens": float(index.tokens),
            "supervised_tokens": float(index.supervised),
            "pictures": float(index.pictures),
            "tail_mass": index.tail_mass,
            "bytes": float(size),
            "bytes_per_million_tokens": size / index.tokens * 1e6,
        }

    made = once(config, context, plan.stage, plan.settings, plan.parents, make)
    for leftover in (job.result, job.shards):
        shutil.rmtree(leftover, ignore_errors=True)
    return made


def distill(
    config: GraceConfig, data: Artifact, teacher: Artifact | None, context: StageContext
) -> Artifact:
    """Stage `bf16`: the student learns from the teacher in BF16.

    teacher: the fitted teacher or its recorded outputs, or None for the checkpoint that the
    configuration names.
    """
    return _train(config, plan_bf16(config, data, teacher), context)


def quantize(
    config: GraceConfig,
    precision: Precision,
    data: Artifact,
    teacher: Artifact | None,
    bf16: Artifact | None,
    context: StageContext,
) -> Artifact:
    """Stages `w8` and `w4`: the BF16 student is trained on with its weights quantized.

    bf16: None where `quantize.start` names a quantized checkpoint to go on from.
    """
    return _train(config, plan_quantized(config, precision, data, teacher, bf16), context)


def _train(config: GraceConfig, plan: TrainingPlan, context: StageContext) -> Artifact:
    job = plan.job

    def make(writer: ArtifactWriter) -> None:
        _run_job(config, job, "grace_core.training.worker", context)
        writer.environment |= json.loads(job.environment.read_text(encoding="utf-8"))
        _link_tree(job.result, writer.path / "model")

    made = once(config, context, plan.stage, plan.settings, plan.parents, make)
    for leftover in (job.result, job.checkpoints):
        shutil.rmtree(leftover, ignore_errors=True)  # metrics and logs stay
    return made


def _run_job(
    config: GraceConfig, job: TrainingJob | TeacherJob, module: str, context: StageContext
) -> None:
    """Run a job as a process group, passing its events on; at once where its result is there."""
    events = EventReader(job.metrics)
    if job.result.is_dir():  # made on a cluster, or before this process
        for event in events.poll():
            context.on_event(event)
        return
    file = write_job(job)

    def forward() -> None:
        for event in events.poll():
            context.on_event(event)

    program = Program(job.stage, module, [str(file)], job.work)
    backend_of(config.launch).run(program, on_poll=forward)
    if not job.result.is_dir():
        raise GraceError(
            f"stage {job.stage} was stopped before its end; run again to continue from what it "
            f"left in {job.kept}"
        )


def _link_tree(source: Path, destination: Path) -> None:
    """The same files under another name, so that nothing is lost if this is interrupted."""
    destination.mkdir()
    for file in source.iterdir():
        assert file.is_file(), "what a job leaves is flat"
        os.link(file, destination / file.name)
