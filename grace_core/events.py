"""Metric events: what a running stage reports, one JSON object a line.

The stage's one writer (rank 0 of a training group) appends to a file; whoever started the stage
follows that file and forwards the events. Neither side needs a tracking server: the file is the
record, outlives any outage, and can be read again from the start at any time.

On a resume `truncate_after` comes first, then the writer is opened: the events of steps that will
be repeated are gone by then. Whoever follows the file meanwhile notices and goes on with the first
step that is new, so that none is lost and none comes twice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grace_core.errors import GraceError

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Event:
    """Values measured together.

    time: seconds since the epoch, UTC; stage: artifact stage such as `bf16`; step: optimizer step
    (0 where a stage has no steps); kind: what was measured, such as `train` or `evaluate`;
    values: one number per name, not necessarily finite.
    """

    time: float
    stage: str
    step: int
    kind: str
    values: Mapping[str, float]

    def to_line(self) -> str:
        """One line of strict JSON without its line end; non-finite values become strings."""
        values = {
            name: value if abs(value) < float("inf") else repr(float(value))
            for name, value in self.values.items()
        }
        fields = {
            "time": self.time,
            "stage": self.stage,
            "step": self.step,
            "kind": self.kind,
            "values": values,
        }
        return json.dumps(fields, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> Self:
        """The inverse of `to_line`; raises ValueError or KeyError on anything else."""
        fields: dict[str, Any] = json.loads(line)
        return cls(
            time=float(fields["time"]),
            stage=str(fields["stage"]),
            step=int(fields["step"]),
            kind=str(fields["kind"]),
            values={name: float(value) for name, value in fields["values"].items()},
        )


class EventWriter:
    """Appends events to `path`; there is exactly one writer of a file at a time.

    A line torn by the crash of an earlier writer is removed on opening. Each event is handed to
    the operating system before `write` returns, so it survives the death of this process.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab", buffering=0)
        size = self._stream.tell()
        whole = _end_of_last_line(path)
        if whole < size:
            self._stream.truncate(whole)

    def write(self, event: Event) -> None:
        self._stream.write(event.to_line().encode("utf-8") + b"\n")

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class LineReader:
    """Complete lines of a growing text file; a last line without its end is not there yet.

    `offset` is the byte to go on from; keep it to continue after a restart. A file that was
    replaced or shortened is read again from its start, and `restarts` counts how often.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset
        self.restarts = 0
        self._inode: int | None = None

    def poll(self) -> list[str]:
        """The lines completed since the last call; none while the file does not exist."""
        try:
            stream = self.path.open("rb")
        except FileNotFoundError:
            return []
        with stream:
            found = os.fstat(stream.fileno())
            size = found.st_size
            replaced = self._inode not in (None, found.st_ino)
            if replaced or size < self.offset:
                self.offset = 0
                self.restarts += 1
            self._inode = found.st_ino
            stream.seek(self.offset)
            data = stream.read(size - self.offset)
        data = data[: data.rfind(b"\n") + 1]
        self.offset += len(data)
        return data.decode("utf-8", errors="replace").splitlines()


class EventReader:
    """Follows the events of `path`, from byte `offset` on.

    When a resume shortens the file, the steps that were yielded before are not yielded again.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._lines = LineReader(path, offset)
        self._newest: dict[str, int] = {}  # step last yielded, by kind
        self._yielded: dict[str, int] = {}  # the same when the file was last shortened

    @property
    def offset(self) -> int:
        """Byte after the last event read; a new reader started there misses and repeats none."""
        return self._lines.offset

    def poll(self) -> list[Event]:
        """The events completed since the last call.

        Raises GraceError when a complete line is not an event.
        """
        restarts = self._lines.restarts
        events = [_parse(line, self._lines.path) for line in self._lines.poll()]
        if self._lines.restarts > restarts:
            self._yielded = dict(self._newest)
        events = [event for event in events if event.step > self._yielded.get(event.kind, -1)]
        for event in events:
            self._newest[event.kind] = max(event.step, self._newest.get(event.kind, -1))
        return events

    def follow(self, finished: Callable[[], bool], seconds: float = 0.5) -> Iterator[Event]:
        """Yield events as they come, looking every `seconds`, until `finished()` holds.

        What was written before `finished()` turned true is still yielded.
        """
        while True:
            last = finished()
            yield from self.poll()
            if last:
                return
            time.sleep(seconds)


def read_events(path: Path) -> list[Event]:
    """All complete events of `path`; none when the file does not exist."""
    return EventReader(path).poll()


def truncate_after(path: Path, step: int) -> None:
    """Drop every event after `step`, and a torn last line; call before a training resumes there.

    The kept events are written aside and renamed, so a crash leaves either the old file or the
    shortened one, and whoever follows it can tell that it is another. Steps never fall within a
    file, therefore what is kept is what comes before the first later one.
    """
    if not path.exists():
        return
    keep = 0
    with path.open("rb") as stream:
        for raw in stream:
            line = raw.decode("utf-8", errors="replace")
            if not line.endswith("\n") or _parse(line, path).step > step:
                break
            keep += len(raw)
        if keep == os.fstat(stream.fileno()).st_size:
            return
        stream.seek(0)
        aside = path.with_name(f".{path.name}.new")
        aside.write_bytes(stream.read(keep))
    os.replace(aside, path)


def _parse(line: str, path: Path) -> Event:
    try:
        return Event.from_line(line)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GraceError(
            f"{path}: a line is not a metric event ({error!r}): {line[:80]!r}; the file is "
            "written by training only, move it away and resume"
        ) from error


def _end_of_last_line(path: Path) -> int:
    """Byte after the last line end of a file, 0 when it has none."""
    with path.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _READ_BYTES)
            stream.seek(start)
            found = stream.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0
