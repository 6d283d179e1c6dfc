"""Stages `teacher`, `bf16`, `w8` and `w4`: one training run each, as a process group."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from grace_core.artifacts import Artifact, ArtifactWriter, Parent, fingerprint
from grace_core.config.model import GraceConfig, Precision, Quantization, TrainingStage
from grace_core.data.prepare import TRAIN
from grace_core.errors import GraceError
from grace_core.events import EventReader
from grace_core.launch.backend import Program, backend_of
from grace_core.models.loading import CheckpointFolder, locate_checkpoint, read_checkpoint
from grace_core.stages.once import StageContext, checkpoint_parent, once
from grace_core.training.job import TrainingJob


def fit_teacher(config: GraceConfig, data: Artifact, context: StageContext) -> Artifact:
    """Stage `teacher`: the teacher is fitted to the data with cross-entropy alone."""
    assert config.teacher_fit is not None, "the configuration fits no teacher"
    start = locate_checkpoint(config.models.teacher)
    parents = {"start": checkpoint_parent(start), "data": data.as_parent()}
    return _train(config, "teacher", config.teacher_fit, start, None, data, parents, context)


def distill(
    config: GraceConfig, data: Artifact, teacher: Artifact | None, context: StageContext
) -> Artifact:
    """Stage `bf16`: the student learns from the teacher in BF16.

    teacher: the fitted teacher, or None for the checkpoint that the configuration names.
    """
    start = locate_checkpoint(config.models.student)
    parents = {"student": checkpoint_parent(start), "data": data.as_parent()}
    folder = None
    if config.distill.objective.needs_teacher:
        folder, parents["teacher"] = _teacher(config, teacher)
    return _train(config, "bf16", config.distill, start, folder, data, parents, context)


def quantize(
    config: GraceConfig,
    precision: Precision,
    data: Artifact,
    teacher: Artifact | None,
    bf16: Artifact,
    context: StageContext,
) -> Artifact:
    """Stages `w8` and `w4`: the BF16 student is trained on with its weights quantized."""
    start = read_checkpoint(bf16.path / "model")
    parents = {"student": bf16.as_parent(), "data": data.as_parent()}
    folder = None
    if config.quantize.objective.needs_teacher:
        folder, parents["teacher"] = _teacher(config, teacher)
    return _train(
        config, precision, config.quantize, start, folder, data, parents, context, precision
    )


def _train(
    config: GraceConfig,
    stage: str,
    section: TrainingStage,
    student: CheckpointFolder,
    teacher: CheckpointFolder | None,
    data: Artifact,
    parents: Mapping[str, Parent],
    context: StageContext,
    precision: Precision | None = None,
) -> Artifact:
    settings = {
        "training": section.training.model_dump(mode="json"),
        "objective": section.objective.model_dump(mode="json"),
        "seed": config.seed,
        "pixels": [config.data.min_pixels, config.data.max_pixels],
    }
    if isinstance(section, Quantization):
        settings |= {"precision": precision, "group_size": section.group_size}
    key = fingerprint(stage, settings, parents)
    job = TrainingJob(
        stage=stage,
        seed=config.seed,
        training=section.training,
        objective=section.objective,
        student=student.path,
        teacher=None if teacher is None else teacher.path,
        data=data.path / TRAIN,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        precision=precision,
        group_size=config.quantize.group_size,
        device=config.launch.device,
        grace_seconds=config.launch.grace_seconds,
        work=config.run_dir / "work" / f"{stage}-{key[:12]}",
    )

    def make(writer: ArtifactWriter) -> None:
        if not job.result.is_dir():
            _run_job(config, job, context)
        writer.environment |= json.loads(job.environment.read_text(encoding="utf-8"))
        _link_tree(job.result, writer.path / "model")

    made = once(config, context, stage, settings, parents, make)
    for leftover in (job.result, job.checkpoints):
        shutil.rmtree(leftover, ignore_errors=True)  # metrics and logs stay
    return made


def _run_job(config: GraceConfig, job: TrainingJob, context: StageContext) -> None:
    """Run a training job as a process group, passing its events on."""
    launch = config.launch
    job.work.mkdir(parents=True, exist_ok=True)
    file, aside = job.work / "job.json", job.work / ".job.json.new"
    aside.write_text(job.model_dump_json(indent=1), encoding="utf-8")
    os.replace(aside, file)
    events = EventReader(job.metrics)

    def forward() -> None:
        for event in events.poll():
            context.on_event(event)

    program = Program(job.stage, "grace_core.training.worker", [str(file)], job.work)
    backend_of(launch).run(program, on_poll=forward)
    if not job.result.is_dir():
        raise GraceError(
            f"stage {job.stage} was stopped before its last step; run again to continue from its "
            f"last checkpoint in {job.checkpoints}"
        )


def _teacher(config: GraceConfig, fitted: Artifact | None) -> tuple[CheckpointFolder, Parent]:
    if fitted is not None:
        return read_checkpoint(fitted.path / "model"), fitted.as_parent()
    folder = locate_checkpoint(config.models.teacher)
    return folder, checkpoint_parent(folder)


def _link_tree(source: Path, destination: Path) -> None:
    """The same files under another name, so that nothing is lost if this is interrupted."""
    destination.mkdir()
    for file in source.iterdir():
        assert file.is_file(), "a trained checkpoint is flat"
        os.link(file, destination / file.name)
