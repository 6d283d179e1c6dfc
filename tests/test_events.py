"""The metric stream: nothing lost, nothing doubled, nothing half-read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_core.errors import GraceError
from grace_core.events import Event, EventReader, EventWriter, read_events, truncate_after


def event(step: int, **values: float) -> Event:
    return Event(time=1.5, stage="bf16", step=step, kind="train", values=values or {"loss": 2.0})


@given(
    st.dictionaries(st.text(max_size=8), st.floats(), max_size=5),
    st.text(max_size=8),
    st.integers(min_value=0, max_value=2**40),
)
def test_an_event_survives_its_line(values: dict[str, float], stage: str, step: int) -> None:
    line = Event(time=3.25, stage=stage, step=step, kind="k", values=values).to_line()
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = Event.from_line(line)
    assert (again.time, again.stage, again.step, again.kind) == (3.25, stage, step, "k")
    assert again.values.keys() == values.keys()
    for name, value in values.items():
        assert again.values[name] == value or (math.isnan(value) and math.isnan(again.values[name]))


def test_a_torn_last_line_is_no_event_until_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    reader = EventReader(file)
    assert reader.poll() == []
    line = event(7).to_line()
    file.write_text(event(6).to_line() + "\n" + line[:20])
    assert [e.step for e in reader.poll()] == [6]
    assert reader.poll() == []
    with file.open("a") as stream:
        stream.write(line[20:] + "\n")
    assert [e.step for e in reader.poll()] == [7]


def test_a_reader_goes_on_from_its_offset(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with EventWriter(file) as writer:
        writer.write(event(1))
        first = EventReader(file)
        assert len(first.poll()) == 1
        writer.write(event(2))
    assert [e.step for e in EventReader(file, first.offset).poll()] == [2]


def test_a_writer_removes_the_line_a_crash_tore(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(event(1).to_line() + "\n" + '{"time": 1, "sta')
    with EventWriter(file) as writer:
        writer.write(event(2))
    assert [e.step for e in read_events(file)] == [1, 2]


def test_an_event_outlives_the_kill_of_its_writer(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    program = (
        "import os, sys; from pathlib import Path; from grace_core.events import *;"
        "EventWriter(Path(sys.argv[1])).write(Event(0.0, 'bf16', 1, 'train', {'loss': 1.0}));"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(file)], check=False)
    assert [e.step for e in read_events(file)] == [1]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2, 2]), (9, [1, 2, 2, 3, 4])])
def test_a_resume_keeps_the_events_up_to_its_step(
    tmp_path: Path, step: int, kept: list[int]
) -> None:
    file = tmp_path / "metrics.jsonl"
    with EventWriter(file) as writer:
        for number in (1, 2, 2, 3, 4):
            writer.write(event(number))
    with file.open("a") as stream:
        stream.write('{"torn')
    truncate_after(file, step)
    with EventWriter(file) as writer:
        writer.write(event(step + 1))
    assert [e.step for e in read_events(file)] == [*kept, step + 1]


def test_a_follower_sees_each_step_once_across_a_resume(tmp_path: Path) -> None:
    """Steps 3 and 4 are made twice, the second time with longer lines than the first."""
    file = tmp_path / "metrics.jsonl"
    reader = EventReader(file)
    followed = []
    with EventWriter(file) as writer:
        for number in (1, 2, 3, 4):
            writer.write(event(number))
    followed += reader.poll()
    truncate_after(file, 2)
    with EventWriter(file) as writer:
        for number in (3, 4, 5):
            writer.write(Event(1.0, "bf16", number, "train", {"loss": 1 / 3, "more": number}))
    followed += reader.poll()
    with EventWriter(file) as writer:
        writer.write(event(6))
    followed += reader.poll()
    assert [e.step for e in followed] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in read_events(file)] == [1, 2, 3, 4, 5, 6]


def test_a_resume_between_two_looks_loses_no_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    reader = EventReader(file)
    with EventWriter(file) as writer:
        writer.write(event(1))
    assert [e.step for e in reader.poll()] == [1]
    with EventWriter(file) as writer:
        writer.write(event(2))
    truncate_after(file, 0)
    with EventWriter(file) as writer:
        for number in (1, 2, 3):
            writer.write(event(number))
    assert [e.step for e in reader.poll()] == [2, 3]


def test_truncating_what_does_not_exist_is_no_error(tmp_path: Path) -> None:
    truncate_after(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_line_that_is_no_event_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n')
    with pytest.raises(GraceError, match=r"metrics\.jsonl.*not a metric event"):
        EventReader(file).poll()


def test_following_ends_with_everything_that_was_written(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    writer = EventWriter(file)
    looks = 0

    def finished() -> bool:
        nonlocal looks
        looks += 1
        writer.write(event(looks))
        return looks == 3

    assert [e.step for e in EventReader(file).follow(finished, seconds=0.0)] == [1, 2, 3]
