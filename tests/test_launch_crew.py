"""Independent processes: one that dies costs the others nothing, and none is left behind."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import psutil
import pytest

from grace_core.launch.crew import run_crew
from grace_core.launch.process_group import ProcessesFailed


def run(program: str, folder: Path, count: int = 2, **settings: object) -> None:
    environments = [{**os.environ, "NUMBER": str(number)} for number in range(count)]
    settings = {"poll_seconds": 0.02, "grace_seconds": 1.0, **settings}
    run_crew(
        [sys.executable, "-c", program],
        environments,
        stage="evaluate",
        log_folder=folder,
        **settings,  # type: ignore[arg-type]
    )


def test_each_runs_in_its_environment(tmp_path: Path) -> None:
    polls: list[int] = []
    run("import os; print('I am', os.environ['NUMBER'])", tmp_path, on_poll=lambda: polls.append(1))
    said = [(tmp_path / f"crew-{number}.out").read_text() for number in (0, 1)]
    assert said == ["I am 0\n", "I am 1\n"]
    assert polls


def test_one_that_dies_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = (
        "import os, signal, time\n"
        "if os.environ['NUMBER'] == '0': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(1)"
    )
    with caplog.at_level(logging.WARNING):
        run(program, tmp_path)
    assert "process 0 ended with signal SIGKILL" in caplog.text
    assert "the others take over" in caplog.text


def test_when_all_fail_the_error_shows_why(tmp_path: Path) -> None:
    with pytest.raises(ProcessesFailed, match="no such benchmark") as failure:
        run("raise SystemExit('no such benchmark')", tmp_path)
    assert failure.value.exit_code == 1


def test_none_outlives_an_interruption(tmp_path: Path) -> None:
    def interrupt() -> None:
        if all(psutil.Process(child.pid).is_running() for child in children()):
            raise KeyboardInterrupt

    def children() -> list[psutil.Process]:
        return psutil.Process().children(recursive=True)

    before = set(children())
    with pytest.raises(KeyboardInterrupt):
        run("import time; time.sleep(60)", tmp_path, on_poll=interrupt)
    assert set(children()) == before


def test_too_long(tmp_path: Path) -> None:
    with pytest.raises(ProcessesFailed, match=r"did not end within 0\.2 s"):
        run("import time; time.sleep(60)", tmp_path, timeout_seconds=0.2)
