"""A run whose worker is gone still carries out a cancellation, and is not taken for dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import get_client
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Cancelling, Crashed
from prefect.testing.utilities import prefect_test_harness

from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent
FLOW = """
import os, signal, subprocess, sys, time, weakref
from pathlib import Path
from prefect import runtime
from grace_core.launch.process_group import run_process_group
from tasks import guard

guard.LOOK_SECONDS, guard.PATIENCE_SECONDS, guard.INSIST_SECONDS = 0.2, float(sys.argv[2]), 0.3
folder = Path(sys.argv[1])
rank = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"

@guard.guarded_flow("guarded")
def work() -> None:
    with guard.guarded():
        (folder / "id.new").write_text(str(runtime.flow_run.id))
        (folder / "id.new").rename(folder / "id")
        run_process_group(
            [sys.executable, "-c", rank, str(folder / "rank")], stage="bf16", env=os.environ,
            log_folder=folder / "logs", grace_seconds=5.0, poll_seconds=0.1,
            on_poll=stop,
        )

def stop() -> None:
    if (folder / "stop").exists():
        raise RuntimeError("stopped")
    if (folder / "lose").exists():
        (folder / "lose").unlink()
        lose_a_signal()
        (folder / "lost").touch()
    if (folder / "convert").exists():
        try:
            (folder / "converting").touch()
            time.sleep(60)
        except BaseException:
            pass
        raise ValueError("of compiled code that was calling Python")

def lose_a_signal() -> None:
    # It comes while Python calls back, where no exception can be raised.
    class Thing: pass
    thing = Thing()
    kept = weakref.ref(thing, lambda _: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.1)))
    del thing

work()
"""

TALKER = """
import sys, time
from pathlib import Path
from prefect import flow, get_run_logger
from tasks.flow_output import keep_output

@flow
def talk() -> None:
    keep_output(Path(sys.argv[1]))
    print("listening", flush=True)
    while not Path(sys.argv[1], "deaf").exists():
        time.sleep(0.05)
    get_run_logger().info("said to nobody")
    print("all said", flush=True)

talk()
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def run(
    tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A guarded flow at work in a process of its own, and its flow run's id.

    The parameter is how many seconds it waits for a worker.
    """
    patience = getattr(request, "param", 1.0)
    process = subprocess.Popen(
        [sys.executable, "-c", FLOW, str(tmp_path), str(patience)],
        cwd=ROOT,
        env=os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value()},
    )
    try:
        assert wait_until((tmp_path / "rank").exists)
        yield process, (tmp_path / "id").read_text()
    finally:
        process.kill()
        process.wait()


def state_of(flow_run_id: str) -> str:
    with get_client(sync_client=True) as client:
        return str(client.read_flow_run(UUID(flow_run_id)).state_name)


def set_state(flow_run_id: str, state: Any) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(flow_run_id), state, force=True)


@pytest.mark.parametrize("state", [Cancelling, Cancelled])
def test_a_cancellation_that_nobody_carries_out_is_carried_out(
    run: tuple[subprocess.Popen[bytes], str], tmp_path: Path, state: Callable[[], Any]
) -> None:
    process, flow_run_id = run
    rank = int((tmp_path / "rank").read_text())
    set_state(flow_run_id, state())
    assert process.wait(60) != 0
    assert state_of(flow_run_id) == "Cancelled"
    assert not Path(f"/proc/{rank}").exists(), "its processes are ended with it"


def test_a_signal_that_python_loses_is_sent_again(
    run: tuple[subprocess.Popen[bytes], str], tmp_path: Path
) -> None:
    process, flow_run_id = run
    rank = int((tmp_path / "rank").read_text())
    (tmp_path / "lose").touch()
    assert process.wait(60) != 0
    assert (tmp_path / "lost").exists(), "the work went on for a while"
    assert state_of(flow_run_id) == "Crashed"
    assert not Path(f"/proc/{rank}").exists(), "its processes are ended with it"


@pytest.mark.parametrize("run", [1000.0], indirect=True)
def test_a_run_that_ends_while_it_is_being_cancelled_is_cancelled(
    run: tuple[subprocess.Popen[bytes], str], tmp_path: Path
) -> None:
    process, flow_run_id = run
    set_state(flow_run_id, Cancelling())
    (tmp_path / "stop").touch()
    assert process.wait(60) != 0
    assert state_of(flow_run_id) == "Cancelled"


def test_a_run_that_was_taken_for_dead_goes_on(
    run: tuple[subprocess.Popen[bytes], str], tmp_path: Path
) -> None:
    process, flow_run_id = run
    set_state(flow_run_id, Crashed(message="no heartbeat"))
    assert wait_until(lambda: state_of(flow_run_id) == "Running")
    assert process.poll() is None
    (tmp_path / "stop").touch()
    process.wait(60)


def test_a_signal_that_became_another_error_is_still_one(
    run: tuple[subprocess.Popen[bytes], str], tmp_path: Path
) -> None:
    process, flow_run_id = run
    (tmp_path / "convert").touch()
    assert wait_until((tmp_path / "converting").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert state_of(flow_run_id) == "Crashed"


def test_a_run_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    """The worker reads a pipe; killed, it reads no more."""
    process = subprocess.Popen(
        [sys.executable, "-c", TALKER, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value()},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if b"the output of this run goes to" in line:
            break
    process.stdout.close()
    (tmp_path / "deaf").touch()
    assert process.wait(60) == 0
    (file,) = (tmp_path / "flow-runs").iterdir()
    assert "said to nobody" in file.read_text()
    assert "all said" in file.read_text()
