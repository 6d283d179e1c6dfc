"""All checks of a configuration on this machine, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from grace_core.artifacts import stage_folders
from grace_core.config.launch import SlurmLaunch
from grace_core.config.tree import GraceConfig
from grace_core.doctor.benchmarks import Size, check_benchmarks
from grace_core.doctor.checkpoints import Checkpoint, read_checkpoint
from grace_core.doctor.dataset import check_data
from grace_core.doctor.disk import check_disk
from grace_core.doctor.findings import Finding, information
from grace_core.doctor.hub import check_publishing, look_up
from grace_core.doctor.machine import AREA as MACHINE
from grace_core.doctor.machine import check_machine, least_memory
from grace_core.doctor.models import check_models, downloads
from grace_core.doctor.slurm import check_slurm
from grace_core.doctor.versions import check_versions
from grace_core.plan import Goal, planned_stages

_COMPUTES_NOTHING = ("benchmarks", "world", "data", "report", "publish")


def examine(
    config: GraceConfig,
    goal: Goal = "publish",
    publishing: Callable[[GraceConfig], Iterable[Finding]] = check_publishing,
) -> list[Finding]:
    """Look at everything that a run up to `goal` needs; Prefect and MLflow are not asked.

    Loads no weights, downloads nothing and imports no torch. What only finished stages would need
    is not asked for: a run that merely publishes what is there needs neither GPU nor room for
    checkpoints.

    publishing: looks at the token, where the run publishes.
    """
    return list(_all(config, goal, publishing))


def _all(
    config: GraceConfig, goal: Goal, publishing: Callable[[GraceConfig], Iterable[Finding]]
) -> Iterator[Finding]:
    yield from check_versions()
    teacher, unreadable_teacher = read_checkpoint(config.models.teacher, "models.teacher.path")
    student, unreadable_student = read_checkpoint(config.models.student, "models.student.path")
    yield from (*unreadable_teacher, *unreadable_student)
    for checkpoint in downloads(teacher, student):
        looked_up, found = look_up(checkpoint)
        yield from found
        teacher = looked_up if checkpoint.source == teacher.source else teacher
        student = looked_up if checkpoint.source == student.source else student
    yield from check_models(config, teacher, student)
    yield from check_data(config, student)
    benchmarks: list[Size] = []
    if _evaluates(config, goal):
        found, benchmarks = check_benchmarks(config)
        yield from found
    yield from _compute(config, goal, teacher, student, benchmarks)
    if "publish" in planned_stages(config, goal):
        yield from publishing(config)


def _compute(
    config: GraceConfig,
    goal: Goal,
    teacher: Checkpoint,
    student: Checkpoint,
    benchmarks: list[Size],
) -> Iterator[Finding]:
    """The machine that trains, and room for what it leaves."""
    left = [stage for stage in planned_stages(config, goal) if not _is_there(config, stage)]
    if not [stage for stage in left if stage not in _COMPUTES_NOTHING]:
        yield information(MACHINE, f"nothing is left to compute up to `{goal}`; not examined")
    elif isinstance(config.launch.backend, SlurmLaunch):
        yield from check_slurm(config.launch, config.launch.backend)
        yield from least_memory(config, teacher, student)
    else:
        yield from check_machine(config, teacher, student)
    yield from check_disk(config, teacher, student, benchmarks)


def _evaluates(config: GraceConfig, goal: Goal) -> bool:
    """Whether an evaluation is on the way, and none of them was made yet."""
    planned = [each for each in planned_stages(config, goal) if each.startswith("evaluate-")]
    return any(not _is_there(config, stage) for stage in planned)


def _is_there(config: GraceConfig, stage: str) -> bool:
    """Whether run_dir holds an artifact of the stage, of whatever settings.

    Which settings it was made with shows only when the stage itself compares fingerprints, for
    which it reads every weight.
    """
    return bool(stage_folders(config.run_dir / "artifacts", stage))
