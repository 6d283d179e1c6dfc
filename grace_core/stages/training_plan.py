"""What a training stage is to do, before anybody does it: settings, inputs, and the job's file.

Whoever runs the job, this process's back-end or a cluster, reads the same file and leaves the
result in the same folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_core.artifacts import QUANTIZED_START, Artifact, Parent, fingerprint
from grace_core.config.training import BITS, Precision, Quantization, TrainingStage
from grace_core.config.tree import GraceConfig
from grace_core.data.prepare import TRAIN
from grace_core.errors import GraceError
from grace_core.models.loading import CheckpointFolder, locate_checkpoint, read_checkpoint
from grace_core.quantization.checkpoint import load_scales
from grace_core.stages.once import checkpoint_parent, stage_folder
from grace_core.training.job import RankJob, TeacherJob, TrainingJob, work_folder
from grace_core.whole_files import write_whole

OUTPUTS_STAGE = "teacher-outputs"


@dataclass(frozen=True)
class TrainingPlan:
    """One training stage, its inputs known by digest."""

    stage: str
    settings: Mapping[str, Any]
    """Everything of the configuration that decides the result."""
    parents: Mapping[str, Parent]
    job: TrainingJob
    artifact: Path
    """Folder that the stage's artifact will have."""


@dataclass(frozen=True)
class TeacherPlan:
    """The stage `teacher-outputs`, its inputs known by digest."""

    stage: str
    settings: Mapping[str, Any]
    parents: Mapping[str, Parent]
    job: TeacherJob


def plan_teacher(config: GraceConfig, data: Artifact) -> TrainingPlan:
    """Stage `teacher`."""
    assert config.teacher_fit is not None, "the configuration fits no teacher"
    start = locate_checkpoint(config.models.teacher)
    parents = {"start": checkpoint_parent(start), "data": data.as_parent()}
    return _plan(config, "teacher", config.teacher_fit, start, None, data, parents)


def plan_teacher_outputs(
    config: GraceConfig, data: Artifact, teacher: Artifact | None
) -> TeacherPlan:
    """Stage `teacher-outputs`; teacher: the fitted one, or None for the configuration's checkpoint.

    How rows are packed and computed is taken from `distill.training`. It is no part of the
    fingerprint: outputs are of samples, and differ by roundings at most.
    """
    outputs = config.teacher_outputs
    assert outputs is not None, "the configuration records no teacher"
    folder, parent = _teacher(config, teacher)
    parents = {"teacher": parent, "data": data.as_parent()}
    # Objectives without distillation read no logits; the others agree by a rule.
    distils = (s.objective.distillation for s in (config.distill, config.quantize))
    temperatures = [d.temperature for d in distils if d.kind != "none"]
    temperature = temperatures[0] if temperatures else 1.0
    settings = {
        "outputs": outputs.model_dump(mode="json"),
        "temperature": temperature,
        "pixels": [config.data.min_pixels, config.data.max_pixels],
    }
    artifact = stage_folder(config, OUTPUTS_STAGE, fingerprint(OUTPUTS_STAGE, settings, parents))
    job = TeacherJob(
        stage=OUTPUTS_STAGE,
        teacher=folder.path,
        teacher_weights=config.models.teacher_weights,
        student=locate_checkpoint(config.models.student).path,
        data=data.path / TRAIN,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        outputs=outputs,
        temperature=temperature,
        training=config.distill.training,
        device=config.launch.device,
        work=work_folder(config.run_dir, artifact),
    )
    return TeacherPlan(OUTPUTS_STAGE, settings, parents, job)


def plan_bf16(config: GraceConfig, data: Artifact, teacher: Artifact | None) -> TrainingPlan:
    """Stage `bf16`.

    teacher: the fitted one or its recorded outputs, or None for the configuration's checkpoint.
    """
    start = locate_checkpoint(config.models.student)
    parents = {"student": checkpoint_parent(start), "data": data.as_parent()}
    teaching = None
    if config.distill.objective.needs_teacher:
        teaching, parents["teacher"] = _teaching(config, teacher)
    return _plan(config, "bf16", config.distill, start, teaching, data, parents)


def plan_quantized(
    config: GraceConfig,
    precision: Precision,
    data: Artifact,
    teacher: Artifact | None,
    bf16: Artifact | None,
) -> TrainingPlan:
    """Stages `w8` and `w4`; teacher: as for `plan_bf16`.

    bf16: None where `quantize.start` names a quantized checkpoint to go on from.
    """
    if config.quantize.start is not None:
        start = locate_checkpoint(config.quantize.start)
        _check_start(start.path, precision, config.quantize.group_size)
        parents = {QUANTIZED_START: checkpoint_parent(start), "data": data.as_parent()}
    else:
        assert bf16 is not None, "without quantize.start, the BF16 student is trained first"
        start = read_checkpoint(bf16.path / "model")
        parents = {"student": bf16.as_parent(), "data": data.as_parent()}
    teaching = None
    if config.quantize.objective.needs_teacher:
        teaching, parents["teacher"] = _teaching(config, teacher)
    return _plan(config, precision, config.quantize, start, teaching, data, parents, precision)


def _check_start(folder: Path, precision: Precision, group_size: int) -> None:
    """Raise GraceError where the checkpoint's quantizer is not the one that is to be trained."""
    found = load_scales(folder)
    if (found.bits, found.group_size) != (BITS[precision], group_size):
        raise GraceError(
            f"quantize.start: {folder} has {found.bits}-bit codes in groups of {found.group_size}, "
            f"the run trains {precision} in groups of {group_size}; set quantize.variants and "
            "quantize.group_size to what the checkpoint has"
        )


def write_job(job: RankJob) -> Path:
    """Write what the ranks read, and return the file."""
    job.work.mkdir(parents=True, exist_ok=True)
    file = job.work / "job.json"
    write_whole(file, job.model_dump_json(indent=1))
    return file


def _plan(
    config: GraceConfig,
    stage: str,
    section: TrainingStage,
    student: CheckpointFolder,
    teaching: _Teaching | None,
    data: Artifact,
    parents: Mapping[str, Parent],
    precision: Precision | None = None,
) -> TrainingPlan:
    settings = {
        "training": section.training.model_dump(mode="json"),
        "objective": section.objective.model_dump(mode="json"),
        "seed": config.seed,
        "pixels": [config.data.min_pixels, config.data.max_pixels],
    }
    if isinstance(section, Quantization):
        settings |= {"precision": precision, "group_size": section.group_size}
    artifact = stage_folder(config, stage, fingerprint(stage, settings, parents))
    job = TrainingJob(
        stage=stage,
        seed=config.seed,
        training=section.training,
        objective=section.objective,
        student=student.path,
        teacher=teaching.model if teaching else None,
        teacher_weights=config.models.teacher_weights,
        teacher_outputs=teaching.outputs if teaching else None,
        data=data.path / TRAIN,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        precision=precision,
        group_size=config.quantize.group_size,
        device=config.launch.device,
        grace_seconds=config.launch.seconds_to_save,
        work=work_folder(config.run_dir, artifact),
    )
    return TrainingPlan(stage, settings, parents, job, artifact)


@dataclass(frozen=True)
class _Teaching:
    """Where a student's teacher is: a checkpoint, or its recorded outputs."""

    model: Path | None = None
    outputs: Path | None = None


def _teaching(config: GraceConfig, teacher: Artifact | None) -> tuple[_Teaching, Parent]:
    if teacher is not None and teacher.manifest.stage == OUTPUTS_STAGE:
        return _Teaching(outputs=teacher.path / "outputs"), teacher.as_parent()
    folder, parent = _teacher(config, teacher)
    return _Teaching(model=folder.path), parent


def _teacher(config: GraceConfig, fitted: Artifact | None) -> tuple[CheckpointFolder, Parent]:
    if fitted is not None:
        return read_checkpoint(fitted.path / "model"), fitted.as_parent()
    folder = locate_checkpoint(config.models.teacher)
    return folder, checkpoint_parent(folder)
