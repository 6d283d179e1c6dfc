"""What `grace check` says of a configuration: what cannot run anywhere, and what is not here.

The checks themselves are those of `grace doctor`, without those that ask a network or measure this
machine. What cannot run anywhere is an error; what is merely not here is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grace_core.config.training import TrainingStage
from grace_core.config.tree import GraceConfig
from grace_core.doctor.benchmarks import missing_benchmarks
from grace_core.doctor.checkpoints import Checkpoint, read_checkpoint, to_be_downloaded
from grace_core.doctor.dataset import missing_data, picture_misfits, unfitting_pictures
from grace_core.doctor.findings import Finding, warning
from grace_core.doctor.gpus import DRIVER, driver_gpus
from grace_core.doctor.hub import missing_token
from grace_core.doctor.machine import processors
from grace_core.doctor.memory import training_stages
from grace_core.doctor.models import misfits, unpinned
from grace_core.errors import ConfigError

_GPUS = DRIVER


@dataclass(frozen=True)
class Findings:
    """Both checkpoints, and what a user should know before starting."""

    teacher: Checkpoint
    student: Checkpoint
    warnings: list[str]


def check_machine(config: GraceConfig, source: str) -> Findings:
    """Look at everything that `config` names.

    Raises ConfigError, for the file `source`, listing what cannot run anywhere.
    """
    teacher, teacher_problems = read_checkpoint(config.models.teacher, "models.teacher.path")
    student, student_problems = read_checkpoint(config.models.student, "models.student.path")
    impossible = [
        *teacher_problems,
        *student_problems,
        *misfits(config, teacher, student),
        *picture_misfits(config, student),
    ]
    if impossible:
        raise ConfigError(source, [finding.sentence for finding in impossible])
    warnings = [finding.sentence for finding in _not_here(config, teacher, student)]
    for name, stage in training_stages(config).items():
        warnings += _slow_warmup(name, stage)
    return Findings(teacher, student, warnings)


def _not_here(config: GraceConfig, teacher: Checkpoint, student: Checkpoint) -> Iterator[Finding]:
    for role, checkpoint in (("teacher", teacher), ("student", student)):
        if to_be_downloaded(checkpoint):
            path = checkpoint.source.path
            yield warning(
                "models", f"models.{role}: {path} is not on this machine", "a run downloads it"
            )
    yield from unpinned(teacher, student)
    yield from missing_data(config)
    yield from missing_benchmarks(config)
    if config.launch.backend.kind == "local":
        yield from processors(config, driver_gpus(_GPUS))
    yield from unfitting_pictures(config, student)
    yield from missing_token(config)


def _slow_warmup(name: str, stage: TrainingStage) -> Iterator[str]:
    relational, steps = stage.objective.relational, stage.training.steps
    if relational.enabled and steps is not None and relational.warmup_steps >= steps:
        yield (
            f"{name}: relational.warmup_steps ({relational.warmup_steps}) is not over within "
            f"{steps} steps; omega never reaches {relational.omega:g}"
        )
