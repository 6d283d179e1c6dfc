"""What a check says: one finding, with its remedy, and how findings are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from grace_core.errors import GraceError


class Severity(StrEnum):
    """The values are what tables and JSON show."""

    OK = "ok"
    INFORMATION = "information"
    WARNING = "warning"
    UNCHECKED = "not checked"
    """The check itself could not be made."""
    PROBLEM = "problem"
    """The run would fail: it does not start."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check found out."""

    area: str
    """What it is about, such as `disk`; a word of the table's first column."""
    severity: Severity
    text: str
    remedy: str = ""
    """What to do about it; never empty for a warning, a problem or a check that failed."""

    def __post_init__(self) -> None:
        needs_remedy = self.severity not in (Severity.OK, Severity.INFORMATION)
        assert not needs_remedy or self.remedy, f"no remedy: {self.text}"

    @property
    def sentence(self) -> str:
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


def ok(area: str, text: str) -> Finding:
    return Finding(area, Severity.OK, text)


def information(area: str, text: str) -> Finding:
    return Finding(area, Severity.INFORMATION, text)


def warning(area: str, text: str, remedy: str) -> Finding:
    return Finding(area, Severity.WARNING, text, remedy)


def unchecked(area: str, text: str, remedy: str) -> Finding:
    return Finding(area, Severity.UNCHECKED, text, remedy)


def problem(area: str, text: str, remedy: str) -> Finding:
    return Finding(area, Severity.PROBLEM, text, remedy)


def problems(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity is Severity.PROBLEM]


class NotReady(GraceError):
    """A run that would fail; all problems at once, each with its remedy."""

    def __init__(self, found: Sequence[Finding]) -> None:
        self.problems = list(found)
        count = len(found)
        noun = "problem" if count == 1 else "problems"
        lines = [f"{count} {noun} found before the start; nothing was run", *map(_line, found)]
        super().__init__("\n".join(lines))


def _line(finding: Finding) -> str:
    return f"  - {finding.area}: {finding.sentence}"


def require_no_problem(findings: Iterable[Finding]) -> None:
    """Raise NotReady when there is a problem among them."""
    found = problems(findings)
    if found:
        raise NotReady(found)


def as_rows(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """One row of a table a finding, for JSON and for tables."""
    return [
        {"area": row["area"], "result": str(row["severity"]), **_words(row)}
        for row in map(asdict, findings)
    ]


def _words(row: dict[str, str]) -> dict[str, str]:
    return {"finding": row["text"], "remedy": row["remedy"]}


def as_text(findings: Sequence[Finding]) -> str:
    """All findings as plain text, one a line."""
    width = max((len(finding.area) for finding in findings), default=0)
    longest = max(len(severity) for severity in Severity)
    lines = [
        f"{finding.area:{width}}  {finding.severity:{longest}}  {finding.sentence}"
        for finding in findings
    ]
    return "\n".join([*lines, summary(findings)]) + "\n"


def summary(findings: Sequence[Finding]) -> str:
    """How many of which kind."""
    counts = {severity: 0 for severity in Severity}
    for finding in findings:
        counts[finding.severity] += 1
    return ", ".join(f"{count} {severity}" for severity, count in counts.items() if count)
