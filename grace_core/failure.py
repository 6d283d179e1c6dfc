"""What to tell when a run ends early: stage, cause, remedy, what is kept, how to go on.

A report is made from the exception and the run's folder alone, and written beside the results as
`failure.json` and `failure.md`; the next success removes both.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from grace_core.artifacts import stage_folders
from grace_core.errors import ConfigError, GraceError
from grace_core.launch.output import first_error
from grace_core.launch.process_group import ProcessesFailed
from grace_core.secrets import redacted
from grace_core.training.saved import newest_written
from grace_core.whole_files import write_whole

JSON_FILE, MARKDOWN_FILE = "failure.json", "failure.md"
_LONGEST_CAUSE = 600  # characters


class Kind(StrEnum):
    """What went wrong, as far as it can be recognised. The values are what reports show."""

    OUT_OF_MEMORY = "out of memory"
    KILLED = "a process was killed"
    DISK_FULL = "disk full"
    TIME_LIMIT = "time limit"
    STOPPED = "stopped by a signal"
    CANCELLED = "cancelled"
    DIVERGED = "training diverged"
    TRACKING = "tracking server away"
    CONFIGURATION = "configuration"
    OTHER = "error"


_REMEDIES: dict[Kind, str] = {
    Kind.OUT_OF_MEMORY: "Lower training.row_tokens or training.logits_mib, set "
    "training.recompute to all, raise training.zero_stage, set models.teacher_weights to sharded, "
    "or use more GPUs; for an "
    "evaluation lower evaluation.batch_tokens.",
    Kind.KILLED: "Usually the system ended it because memory ran out (`dmesg` says so): lower "
    "training.data_workers or training.row_tokens, or give the job more memory. Otherwise somebody "
    "or a scheduler ended it: just continue.",
    Kind.DISK_FULL: "Free space (old run folders, training.keep_checkpoints) or move run_dir to a "
    "larger disk, then continue.",
    Kind.TIME_LIMIT: "Raise launch.timeout_hours or the scheduler's limit, or just continue.",
    Kind.STOPPED: "Nothing is wrong with the run: continue.",
    Kind.CANCELLED: "Nothing is wrong with the run: continue when it suits you.",
    Kind.DIVERGED: "Continuing alone would diverge again: lower learning_rate or omega, or look at "
    "the records of that step first.",
    Kind.TRACKING: "Bring the tracking server back, then continue: what was measured is kept on "
    "disk and is sent then.",
    Kind.CONFIGURATION: "Correct what the cause names, check with `grace check`, then run again.",
    Kind.OTHER: "Mend what the cause names, then continue.",
}

_SIGNS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    (Kind.DIVERGED, re.compile(r" is (?:nan|-?inf); training stopped before")),
    (Kind.STOPPED, re.compile(r"stopped by signal after step \d+")),
    (
        Kind.OUT_OF_MEMORY,
        re.compile(r"OutOfMemoryError|CUDA out of memory|can't allocate memory|MemoryError\b"),
    ),
    (Kind.DISK_FULL, re.compile(r"No space left on device|Disk quota exceeded")),
    (Kind.TIME_LIMIT, re.compile(r"DUE TO TIME LIMIT")),
    (Kind.KILLED, re.compile(r"signal SIGKILL")),
    (Kind.STOPPED, re.compile(r"signal SIGTERM|was stopped before its end")),
)
"""The first that is found counts."""


@dataclass(frozen=True)
class Failure:
    """The report; all texts are without secrets."""

    kind: Kind
    stage: str | None
    """None: before the first stage, or between two."""
    cause: str
    remedy: str
    finished: tuple[str, ...]
    """Stages of this run that are done and kept."""
    checkpoint: str | None
    checkpoint_step: int | None
    logs: str | None
    commands: tuple[str, ...]
    """Each continues the run; ready for a shell."""
    time: str
    """UTC, ISO 8601."""

    @property
    def title(self) -> str:
        where = "the run" if self.stage is None else f"stage {self.stage}"
        ending = {Kind.CANCELLED: "was cancelled", Kind.STOPPED: "was stopped"}
        return f"{where} {ending.get(self.kind, f'failed: {self.kind}')}"

    @property
    def kept(self) -> str:
        stages = ", ".join(self.finished) or "none"
        text = f"finished stages: {stages}"
        if self.checkpoint_step is not None:
            text += f"; stage {self.stage} up to step {self.checkpoint_step} in {self.checkpoint}"
        return text

    def to_text(self, after: str = "") -> str:
        """Several lines for a terminal; the cause is left out where `after` has told it."""
        lines = [self.title]
        if self.cause not in after:
            lines.append(f"cause: {self.cause}")
        lines += [f"remedy: {self.remedy}", f"kept: {self.kept}"]
        if self.logs is not None:
            lines.append(f"logs: {self.logs}")
        return "\n".join([*lines, "continue with:", *(f"  {line}" for line in self.commands)])

    def to_line(self) -> str:
        """The last line of a log: what, why, and how to go on."""
        cause = self.cause.partition("\n")[0]
        return f"{self.title} ({cause}); continue with: {' or: '.join(self.commands)}"

    def to_markdown(self) -> str:
        parts = [
            f"# {self.title[0].upper()}{self.title[1:]}",
            f"**Cause**\n\n{_code_block(self.cause)}",
            f"**Remedy**: {self.remedy}",
            f"**Kept**: {self.kept}",
        ]
        if self.logs is not None:
            parts.append(f"**Logs**: `{self.logs}`")
        parts.append("**Continue with** (one of)\n\n" + _code_block("\n".join(self.commands)))
        return "\n\n".join([*parts, f"{self.time}\n"])


def failure_of(
    error: BaseException,
    run_dir: Path,
    *,
    stage: str | None,
    since: float = 0.0,
    finished: Sequence[str] = (),
    commands: Sequence[str] = (),
    kind: Kind | None = None,
) -> Failure:
    """The report on `error`.

    since: when the stage began, in seconds since the epoch; what lies in the run's folder from
    before is not of this attempt. kind: where the caller knows it; else it is recognised.
    """
    lines = _lines(error)
    work = None if stage is None else _work_folder(run_dir, stage, since)
    checkpoint = None if work is None else newest_written(work / "checkpoints")
    kind = kind or _kind_of(error, lines)
    return Failure(
        kind=kind,
        stage=stage,
        cause=redacted(_cause(error, kind, lines))[:_LONGEST_CAUSE],
        remedy=_REMEDIES[kind],
        finished=tuple(finished),
        checkpoint=None if checkpoint is None else str(checkpoint[0]),
        checkpoint_step=None if checkpoint is None else checkpoint[1],
        logs=None if work is None else str(work / "logs"),
        commands=tuple(redacted(command) for command in commands),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def logs_of(run_dir: Path, stage: str, since: float) -> Path | None:
    """Folder of a training's logs, if it wrote any after `since` (seconds since the epoch)."""
    work = _work_folder(run_dir, stage, since)
    return None if work is None else work / "logs"


def write_failure(failure: Failure, run_dir: Path) -> None:
    """Write both files, each whole or not at all. Raises OSError where the disk does not allow."""
    run_dir.mkdir(parents=True, exist_ok=True)
    texts = {
        JSON_FILE: json.dumps(asdict(failure), indent=1) + "\n",
        MARKDOWN_FILE: failure.to_markdown(),
    }
    for name, text in texts.items():
        write_whole(run_dir / name, text)


def remove_failure(run_dir: Path) -> None:
    """Take the report of an earlier run away; called after a success."""
    for name in (JSON_FILE, MARKDOWN_FILE):
        (run_dir / name).unlink(missing_ok=True)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what led to it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _lines(error: BaseException) -> list[str]:
    """What the failed process wrote, and what the exceptions say."""
    lines: list[str] = []
    for one in _chain(error):
        if isinstance(one, ProcessesFailed):
            lines += one.lines
        lines += f"{type(one).__name__}: {one}".splitlines()
    return lines


def _kind_of(error: BaseException, lines: Sequence[str]) -> Kind:
    if not isinstance(error, Exception):
        return Kind.CANCELLED
    for one in _chain(error):
        if isinstance(one, ConfigError):
            return Kind.CONFIGURATION
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return Kind.DISK_FULL
        if isinstance(one, ProcessesFailed) and one.exit_code is None:
            return Kind.TIME_LIMIT
    text = "\n".join(lines)
    return next((kind for kind, sign in _SIGNS if sign.search(text)), Kind.OTHER)


def _cause(error: BaseException, kind: Kind, lines: Sequence[str]) -> str:
    if kind is Kind.CANCELLED:
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, ProcessesFailed):
        told = str(error).partition("\n")[0]
        if kind in (Kind.TIME_LIMIT, Kind.KILLED):
            return told
        if kind is Kind.STOPPED:
            sign = re.compile(r"stopped by signal after step .*")
            return next((m[0] for line in lines if (m := sign.search(line))), told)
        return first_error(error.lines) or told
    return str(error) if isinstance(error, GraceError) else f"{type(error).__name__}: {error}"


def _work_folder(run_dir: Path, stage: str, since: float) -> Path | None:
    """Where the stage's training worked last, if it began after `since`."""
    files = [folder / "job.json" for folder in stage_folders(run_dir / "work", stage)]
    found = [(file.stat().st_mtime, file) for file in files if file.is_file()]
    begun, file = max(found, default=(0.0, None))
    # A file system keeps coarser time than the clock.
    return file.parent if file is not None and begun >= since - 1.0 else None


def _code_block(text: str) -> str:
    return f"```\n{text}\n```"
