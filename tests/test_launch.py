"""The launcher against real processes: whatever ends a group, nobody of it stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from grace_core.launch.local import torchrun_command
from grace_core.launch.output import first_error, new_attempt
from grace_core.launch.process_group import ProcessesFailed, run_process_group
from tests.waiting import wait_until

# An agent that starts one rank in a session of its own, as torchrun does, and forwards SIGTERM.
AGENT = """
import os, signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: rank.terminate())
sys.exit(abs(rank.wait()))
"""
# Ranks write their process id when they are ready, and what became of them.
SAVES_ON_SIGTERM = """
import os, signal, sys, time
def save(*_):
    open(sys.argv[1] + "/saved", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1] + "/rank", "w").write(str(os.getpid()))
time.sleep(120)
"""
IGNORES_SIGTERM = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1] + "/rank", "w").write(str(os.getpid()))
time.sleep(120)
"""


class Cancelled(BaseException):
    """Stands for Prefect's termination and for KeyboardInterrupt."""


def command(program: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", program, *map(str, arguments)]


def run(arguments: list[str], folder: Path, **options: object) -> list[str]:
    """Run a group; returns the lines that were streamed."""
    lines: list[str] = []
    defaults: dict[str, object] = {"grace_seconds": 5.0, "poll_seconds": 0.05}
    run_process_group(
        arguments,
        stage="bf16",
        env=os.environ,
        log_folder=folder / "logs",
        on_line=lines.append,
        **(defaults | options),  # type: ignore[arg-type]
    )
    return lines


def cancel_when_ready(folder: Path) -> Callable[[], None]:
    def look() -> None:
        if (folder / "rank").exists() and (folder / "rank").read_text():
            raise Cancelled

    return look


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_output_is_kept_and_streamed(tmp_path: Path) -> None:
    program = "import sys; print('out'); print('[default1]:other'); print('err', file=sys.stderr)"
    lines = run(command(program), tmp_path)
    assert sorted(lines) == ["err", "out"]
    assert (tmp_path / "logs" / "stdout.log").read_text() == "out\n[default1]:other\n"
    assert (tmp_path / "logs" / "stderr.log").read_text() == "err\n"


def test_a_failure_names_stage_code_and_reason(tmp_path: Path) -> None:
    run(command("import sys; print('of an earlier attempt', file=sys.stderr)"), tmp_path)
    with pytest.raises(ProcessesFailed) as caught:
        run(command("import sys; print('no such file', file=sys.stderr); sys.exit(3)"), tmp_path)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    for part in ("stage bf16", "exit code 3", "no such file", str(tmp_path / "logs"), "run again"):
        assert part in message
    assert "earlier attempt" not in message


def test_a_signal_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProcessesFailed, match=r"SIGKILL.*out of memory") as caught:
        run(command("import os; os.kill(os.getpid(), 9)"), tmp_path)
    assert caught.value.exit_code == -signal.SIGKILL


def test_the_rank_that_failed_first_is_quoted(tmp_path: Path) -> None:
    program = """
import sys
print("[default0]:connection closed by peer", file=sys.stderr)
print("[default1]:ValueError: the reason", file=sys.stderr)
print("E1 failed (exitcode: 1) local_rank: 1 (pid: 7) of binary: python", file=sys.stderr)
sys.exit(1)
"""
    with pytest.raises(ProcessesFailed) as caught:
        run(command(program), tmp_path)
    assert "the reason" in str(caught.value)
    assert "closed by peer" not in str(caught.value)


def test_a_cancelled_group_may_save_first(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        run(
            command(AGENT, SAVES_ON_SIGTERM, tmp_path),
            tmp_path,
            on_poll=cancel_when_ready(tmp_path),
        )
    assert (tmp_path / "saved").exists()
    assert is_gone(int((tmp_path / "rank").read_text()))


def test_no_survivor_when_a_rank_ignores_sigterm(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        run(
            command(AGENT, IGNORES_SIGTERM, tmp_path),
            tmp_path,
            on_poll=cancel_when_ready(tmp_path),
            grace_seconds=0.3,
        )
    assert is_gone(int((tmp_path / "rank").read_text()))


def test_a_second_interruption_cuts_the_grace_short(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise Cancelled

    def look() -> None:
        if (tmp_path / "rank").exists() and (tmp_path / "rank").read_text():
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(Cancelled):
            run(
                command(AGENT, IGNORES_SIGTERM, tmp_path),
                tmp_path,
                on_poll=look,
                grace_seconds=100.0,
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert is_gone(int((tmp_path / "rank").read_text()))


def test_time_runs_out(tmp_path: Path) -> None:
    with pytest.raises(ProcessesFailed, match=r"did not end within 0\.5 s") as caught:
        run(
            command(AGENT, IGNORES_SIGTERM, tmp_path),
            tmp_path,
            timeout_seconds=0.5,
            grace_seconds=0.2,
        )
    assert caught.value.exit_code is None
    if (tmp_path / "rank").exists():
        assert is_gone(int((tmp_path / "rank").read_text()))


def test_ranks_of_a_killed_agent_are_ended(tmp_path: Path) -> None:
    """The agent is gone, as after an out-of-memory kill: nobody forwards a signal any more."""
    polls_with_rank = 0

    def look() -> None:
        nonlocal polls_with_rank
        if (tmp_path / "rank").exists() and (tmp_path / "rank").read_text():
            polls_with_rank += 1
            if polls_with_rank == 2:  # the launcher saw the rank in the poll before
                psutil.Process(int((tmp_path / "rank").read_text())).parent().kill()

    with pytest.raises(ProcessesFailed) as caught:
        run(command(AGENT, SAVES_ON_SIGTERM, tmp_path), tmp_path, on_poll=look)
    assert caught.value.exit_code == -signal.SIGKILL
    assert (tmp_path / "saved").exists()
    assert is_gone(int((tmp_path / "rank").read_text()))


def test_a_killed_parent_takes_its_group_along(tmp_path: Path) -> None:
    parent = f"""
import os, sys
from pathlib import Path
from grace_core.launch.process_group import run_process_group
run_process_group([sys.executable, "-c", {AGENT!r}, {SAVES_ON_SIGTERM!r}, {str(tmp_path)!r}],
                  stage="bf16", env=os.environ, log_folder=Path({str(tmp_path)!r}) / "logs")
"""
    process = subprocess.Popen(command(parent))
    try:
        assert wait_until(
            lambda: (tmp_path / "rank").exists() and (tmp_path / "rank").read_text() != ""
        )
        rank = int((tmp_path / "rank").read_text())
    finally:
        process.kill()
        process.wait()
    assert wait_until((tmp_path / "saved").exists)
    assert wait_until(lambda: is_gone(rank))


def test_it_works_from_a_thread(tmp_path: Path) -> None:
    """Prefect runs tasks in threads too; the child must live as long as the thread waits."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            run(command("import time; time.sleep(0.5); print('done')"), tmp_path)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


@pytest.mark.slow
def test_torchrun_keeps_each_ranks_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank_program.py").write_text(
        "import os, sys\n"
        "rank = os.environ['RANK']\n"
        "print(f'hello of {rank}', flush=True)\n"
        "if rank == '1':\n"
        "    raise ValueError(f'bad row in {sys.argv[1]}')\n"
        "import time; time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = torchrun_command(
        "rank_program", ["shard-7"], processes=2, ranks=new_attempt(tmp_path / "logs")
    )
    lines: list[str] = []
    with pytest.raises(ProcessesFailed) as caught:
        run_process_group(
            arguments,
            stage="w4",
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            log_folder=tmp_path / "logs",
            on_line=lines.append,
        )
    assert "ValueError: bad row in shard-7" in str(caught.value)
    assert first_error(caught.value.lines) == "ValueError: bad row in shard-7"
    assert any(line.endswith("hello of 0") for line in lines)
    assert not any(line.endswith("hello of 1") for line in lines)
    kept = [file.read_text() for file in sorted((tmp_path / "logs" / "ranks").rglob("stdout.log"))]
    assert kept == ["hello of 0\n", "hello of 1\n"]
