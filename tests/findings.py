"""What the tests of the checks share: configurations, checkpoints, and picking out a finding."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from grace_core.config import GraceConfig, load_config
from grace_core.doctor.checkpoints import Checkpoint, read_checkpoint
from grace_core.doctor.findings import Finding, Severity, as_text

ROOT = Path(__file__).resolve().parent.parent


def toy(*overrides: str) -> GraceConfig:
    """The toy configuration, its paths from the project root."""
    return load_config("configs/toy.yaml", overrides)


def models(config: GraceConfig) -> tuple[Checkpoint, Checkpoint]:
    """Teacher and student, whose files are sound."""
    teacher, wrong_teacher = read_checkpoint(config.models.teacher, "models.teacher.path")
    student, wrong_student = read_checkpoint(config.models.student, "models.student.path")
    assert not wrong_teacher + wrong_student
    return teacher, student


def one(findings: Iterable[Finding], severity: Severity, said: str) -> Finding:
    """The only finding of that severity whose text holds `said`."""
    found = list(findings)
    matching = [f for f in found if f.severity is severity and said in f.text]
    assert len(matching) == 1, as_text(found)
    return matching[0]


def severities(findings: Iterable[Finding]) -> set[Severity]:
    return {finding.severity for finding in findings}
