"""Locks against real processes: who comes second waits, and a killed holder holds nothing."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from grace_core.locks import join_ranks, sole_maker, wait_for_ranks

HOLDER = """
import sys, time
from pathlib import Path
from grace_core.locks import join_ranks, sole_maker
folder = Path(sys.argv[2])
with sole_maker(folder) if sys.argv[1] == "maker" else join_ranks(folder):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(kind: str, folder: Path) -> subprocess.Popen[str]:
    """A process that holds a lock until it is killed or gets a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, kind, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str], how: str) -> None:
    if how == "killed":
        process.kill()
    process.communicate("" if how == "killed" else "\n")


@pytest.mark.parametrize("how", ["finished", "killed"])
def test_the_second_maker_waits_for_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    artifact = tmp_path / "artifacts" / "bf16-0123"
    first = hold("maker", artifact)
    order: list[str] = []

    def second() -> None:
        with sole_maker(artifact):
            order.append("second")

    thread = threading.Thread(target=second)
    with caplog.at_level(logging.WARNING):
        thread.start()
        thread.join(1.2)  # it has looked more than once by then
        assert thread.is_alive()
        order.append("first")
        end(first, how)
        thread.join(20)
    assert order == ["first", "second"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"process {first.pid} on " in message
    assert "bf16-0123" in message


def test_other_artifacts_are_made_meanwhile(tmp_path: Path) -> None:
    first = hold("maker", tmp_path / "w8-1")
    with sole_maker(tmp_path / "w4-1"):
        pass
    end(first, "finished")


def test_ranks_share_a_folder_and_the_next_attempt_waits_for_all(tmp_path: Path) -> None:
    ranks = [hold("rank", tmp_path) for _ in range(2)]
    with join_ranks(tmp_path):
        pass  # ranks do not shut each other out
    waiting = threading.Thread(target=wait_for_ranks, args=(tmp_path,))
    waiting.start()
    end(ranks[0], "killed")
    waiting.join(1.2)
    assert waiting.is_alive(), "one rank is still at work"
    end(ranks[1], "killed")
    waiting.join(20)
    assert not waiting.is_alive()
