"""All questions asked, whoever dies meanwhile."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from grace_core.errors import GraceError
from grace_core.evaluation.engine.claims import Claims
from grace_core.evaluation.engine.interface import Unanswered
from grace_core.evaluation.engine.journal import Journal
from grace_core.evaluation.engine.run import ask_all
from grace_core.evaluation.items import Prediction
from tests.engine_process import Echo, asked, expected


def answered_lines(folder: Path) -> Counter[str]:
    """How often each item stands in the folder's files, whole lines only."""
    found: Counter[str] = Counter()
    for file in (folder / "answers").glob("*.jsonl"):
        for line in file.read_bytes().split(b"\n")[:-1]:
            found[json.loads(line)["item_id"]] += 1
    return found


def test_answers_come_in_the_order_of_the_questions(tmp_path: Path) -> None:
    questions = asked(10)
    seen: list[tuple[int, int]] = []
    found = ask_all(Echo(3), questions, tmp_path, lambda *counts: seen.append(counts))
    assert found == [expected(question) for question in questions]
    assert seen == [(3, 10), (6, 10), (9, 10), (10, 10), (10, 10)]


def test_what_is_answered_is_not_asked_again(tmp_path: Path) -> None:
    questions = asked(7)
    first = ask_all(Echo(3), questions, tmp_path)
    engine = Echo(3)
    assert ask_all(engine, questions, tmp_path) == first
    assert engine.answered == []


def test_a_batch_is_asked_again_as_a_whole_and_as_it_was(tmp_path: Path) -> None:
    """Also where the engine would by now cut the questions otherwise."""
    questions = asked(10)
    ask_all(Echo(3), questions, tmp_path)
    (file,) = (tmp_path / "answers").iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    engine = Echo(5)
    assert ask_all(engine, questions, tmp_path) == [expected(one) for one in questions]
    assert engine.answered == [question.id for question in questions[::-1][3:]]


def test_a_half_written_line_is_not_there(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append([Prediction("a", "yes"), Prediction("b", "no")])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for end in range(len(whole) - 1, len(whole) - 30, -1):
        file.write_bytes(whole[:end])
        assert list(Journal(tmp_path).predictions) == ["a"]


def test_a_line_that_is_no_answer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"item": 1}\n')
    with pytest.raises(GraceError, match="remove the file"):
        Journal(tmp_path)


def test_writers_see_one_another(tmp_path: Path) -> None:
    with Journal(tmp_path) as one, Journal(tmp_path) as other:
        one.append([Prediction("a", "yes")])
        other.append([Prediction("b", "no", "broken")])
        one.refresh()
        other.refresh()
        assert one.predictions == other.predictions
        assert one.in_order(["b", "a"]) == [Prediction("b", "no", "broken"), Prediction("a", "yes")]


def test_a_folder_of_other_questions_is_refused(tmp_path: Path) -> None:
    ask_all(Echo(3), asked(4), tmp_path)
    with pytest.raises(GraceError, match="other questions"):
        ask_all(Echo(3), asked(5), tmp_path)


def test_no_questions(tmp_path: Path) -> None:
    assert ask_all(Echo(3), [], tmp_path / "never") == []


def test_an_error_of_the_engine_keeps_what_was_answered(tmp_path: Path) -> None:
    class Failing(Echo):
        def _answers(self, batch):  # type: ignore[no-untyped-def]
            if len(self.answered) >= 6:
                raise RuntimeError("the device is gone")
            return super()._answers(batch)

    with pytest.raises(RuntimeError, match="the device is gone"):
        ask_all(Failing(3), asked(10), tmp_path)
    engine = Echo(3)
    ask_all(engine, asked(10), tmp_path)
    assert len(engine.answered) == 4


class Unlucky(Echo):
    """Cannot ask some questions for want of memory."""

    def __init__(self, *without: int) -> None:
        super().__init__(3)
        self.without = {f"q{number}" for number in without}

    def _answers(self, batch):  # type: ignore[no-untyped-def]
        found = super()._answers(batch)
        return [
            Unanswered(one.item_id, "no memory left") if one.item_id in self.without else one
            for one in found
        ]


def test_what_could_not_be_asked_ends_the_run_and_is_asked_again(tmp_path: Path) -> None:
    questions = asked(10)  # batches 9 8 7, 6 5 4, 3 2 1, 0
    engine = Unlucky(5)
    with pytest.raises(GraceError, match=r"a question could not be asked \(q5: no memory left\)"):
        ask_all(engine, questions, tmp_path)
    assert len(engine.answered) == 10, "all others are answered first"
    assert "q5" not in answered_lines(tmp_path)
    again = Echo(3)
    assert ask_all(again, questions, tmp_path) == [expected(one) for one in questions]
    assert again.answered == ["q6", "q5", "q4"], "a batch as a whole"


def test_a_cause_that_is_not_the_questions_ends_the_run_at_once(tmp_path: Path) -> None:
    engine = Unlucky(*range(3, 300))
    with pytest.raises(GraceError, match="21 questions could not be asked"):
        ask_all(engine, asked(300), tmp_path)
    assert len(engine.answered) == 21


def test_a_claim_is_one_processs(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from grace_core.evaluation.engine.claims import Claims\n"
        "claims = Claims(Path(sys.argv[1])); print([claims.take(n) for n in (0, 1, 2)])"
    )
    file = tmp_path / "lock"

    def other() -> str:
        done = subprocess.run(
            [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    with Claims(file) as claims:
        assert claims.take(1)
        assert not claims.take(1)
        assert other() == "[True, False, True]"
        claims.give(1)
        assert other() == "[True, True, True]"
        assert claims.take(0)


def start(folder: Path, count: int, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.engine_process", str(folder), str(count), str(seconds)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_lines(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (folder / "answers").is_dir() and answered_lines(folder).total() >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the processes answer nothing")


@pytest.mark.slow
def test_processes_share_the_work_and_take_over_from_the_dead(tmp_path: Path) -> None:
    processes = [start(tmp_path, 90, 0.1) for _ in range(3)]
    try:
        wait_for_lines(tmp_path, 12)
        processes[0].send_signal(signal.SIGKILL)
        assert [process.wait(timeout=60) for process in processes] == [-signal.SIGKILL, 0, 0]
    finally:
        for process in processes:
            process.kill()
    engine = Echo(3)
    questions = asked(90)
    assert ask_all(engine, questions, tmp_path) == [expected(one) for one in questions]
    assert engine.answered == []
    lines = answered_lines(tmp_path)
    assert set(lines.values()) == {1}, "nothing was asked twice"
    writers = list((tmp_path / "answers").glob("*.jsonl"))
    assert len(writers) >= 2, "more than one process answered"


@pytest.mark.slow
def test_killed_at_random_moments_everything_is_answered_in_the_end(tmp_path: Path) -> None:
    moments = random.Random(5)
    for _ in range(4):
        process = start(tmp_path, 60, 0.05)
        try:
            before = answered_lines(tmp_path).total() if (tmp_path / "answers").is_dir() else 0
            wait_for_lines(tmp_path, min(before + moments.randint(1, 9), 60))
            time.sleep(moments.random() * 0.1)
        finally:
            process.kill()
            process.wait()
    questions = asked(60)
    assert ask_all(Echo(3), questions, tmp_path) == [expected(one) for one in questions]
