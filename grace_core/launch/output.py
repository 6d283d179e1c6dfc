"""What ranks write: where it is kept, which lines are streamed, which of them tell of a failure.

Output is kept below a training's `logs`: `stdout.log` and `stderr.log` of the launcher, and a
numbered folder `ranks/attempt-<n>` with every rank's own for each start, never overwritten.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from grace_core.secrets import redacted

logger = logging.getLogger(__name__)

_RANK_LINE = re.compile(r"^\[[a-z]*(\d+)\]:")
_MARKS = re.compile(r"^(\s*\[[a-z]*\d+\]:\s?)+")
_FAILED_RANK = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
_ERROR = re.compile(
    r"^(?P<cause>[A-Za-z_][\w.]*(?:Error|Exception|Diverged|Failed)\b(?::.*)?|error: .+)"
    r"|\b(?:ERROR|CRITICAL) (?P<logged>.+)"
)
_ERROR_BEGINS = re.compile(r"^Traceback \(most recent call last\):")
_WARNING = re.compile(r"\bWARNING\b")
_LIBRARY_WARNING = re.compile(r"[^:]+:\d+: \w*Warning:")
_ATTEMPT = "attempt-"


def new_attempt(logs: Path) -> Path:
    """Folder for the output of every rank of the next start; not made yet."""
    return attempt_folder(logs, last_attempt(logs) + 1)


def last_attempt(logs: Path) -> int:
    """Number of the last start, 0 where there was none."""
    found = _attempts(logs)
    return int(found[-1].name.removeprefix(_ATTEMPT)) if found else 0


def attempt_folder(logs: Path, number: int) -> Path:
    """Folder for the output of every rank of start `number`, counted from 1."""
    return logs / "ranks" / f"{_ATTEMPT}{number:03d}"


def newest_logs(logs: Path) -> list[Path]:
    """The launcher's logs, and those of the ranks of the last start."""
    ranks = [file for folder in _attempts(logs)[-1:] for file in folder.rglob("*.log")]
    return sorted(file for file in (*logs.glob("*.log"), *ranks) if file.stat().st_size)


def tail(file: Path, size: int) -> str:
    """The last `size` bytes of a log, from the beginning of a line, without secrets."""
    with file.open("rb") as stream:
        start = max(0, file.stat().st_size - size)
        stream.seek(start)
        text = stream.read(size).decode("utf-8", errors="replace")
    if start:
        text = f"[{start} bytes before this are in {file}]\n" + text.partition("\n")[2]
    return redacted(text)


def unmarked(line: str) -> str:
    """A line without the marks of its rank in front, such as `[default1]:`."""
    return _MARKS.sub("", line)


def level_of(line: str) -> int:
    """ERROR, WARNING or INFO, by how Python and its loggers write them."""
    line = unmarked(line)
    if _ERROR.search(line) or _ERROR_BEGINS.search(line):
        return logging.ERROR
    warns = _WARNING.search(line) or _LIBRARY_WARNING.match(line)
    return logging.WARNING if warns else logging.INFO


class Shown:
    """Which lines whoever watches is shown: all of rank 0, and what other ranks warn of.

    A warning of a Python library is shown once: some come at every step, from every rank.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __contains__(self, line: str) -> bool:
        text = unmarked(line)
        if _LIBRARY_WARNING.match(text):
            again = text in self._told
            self._told.add(text)
            return not again
        marked = _RANK_LINE.match(line)
        return marked is None or marked.group(1) == "0" or level_of(line) > logging.INFO


def stream(line: str) -> None:
    """Log a line of a rank at its own level."""
    logger.log(level_of(line), "%s", line)


def first_error(lines: Sequence[str]) -> str | None:
    """The first line that says what went wrong: later ones are often its consequences."""
    for line in map(unmarked, lines):
        if found := _ERROR.search(line):
            return (found["cause"] or found["logged"]).strip()
    return None


def first_failure(lines: Sequence[str]) -> tuple[str, int] | None:
    """The rank that failed first and its exit code, as torchrun's agent names them."""
    for line in lines:
        if found := _FAILED_RANK.search(line):
            return found[2], int(found[1])
    return None


def lines_of_rank(lines: Sequence[str], rank: str) -> list[str]:
    return [line for line in lines if (m := _RANK_LINE.match(line)) and m[1] == rank]


def _attempts(logs: Path) -> list[Path]:
    """Folders of the starts so far, oldest first."""
    return sorted(
        path
        for path in (logs / "ranks").glob(f"{_ATTEMPT}*")
        if path.name[len(_ATTEMPT) :].isdigit()
    )
