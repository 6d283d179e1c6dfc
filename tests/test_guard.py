"""A run whose worker is gone still carries out a cancellation, and is not taken for dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Cancelling, Crashed
from prefect.testing.utilities import prefect_test_harness

from tasks import guard
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


def test_a_run_that_was_deleted_ends(
    run: tuple[subprocess.Popen[bytes], str], tmp_path: Path
) -> None:
    process, flow_run_id = run
    rank = int((tmp_path / "rank").read_text())
    with get_client(sync_client=True) as client:
        client.delete_flow_run(UUID(flow_run_id))
    assert process.wait(60) != 0
    assert not Path(f"/proc/{rank}").exists(), "its processes are ended with it"


@pytest.mark.parametrize("answer", [(404, ""), (502, "<html>"), (200, "<html>")])
def test_a_server_that_answers_nonsense_ends_no_run(answer: tuple[int, str]) -> None:
    """A proxy does that while the server behind it is being restarted."""
    status, body = answer

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    proxy = HTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    api = f"http://127.0.0.1:{proxy.server_port}/api"
    try:
        with temporary_settings({PREFECT_API_URL: api, PREFECT_CLIENT_MAX_RETRIES: 0}):
            with get_client(sync_client=True) as client:
                assert guard._state(client, uuid4()) is None
    finally:
        proxy.shutdown()
        proxy.server_close()


def test_the_guard_goes_on_after_an_error_that_nobody_foresaw(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[Any] = []
    states = iter([RuntimeError("out of order"), Cancelled()])

    def look(*_: object) -> Any:
        found = next(states)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(guard, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(guard, "_state", look)
    monkeypatch.setattr(guard, "_end_this_process", ended.append)
    guard._look(uuid4(), threading.Event())
    assert [state.name for state in ended] == ["Cancelled"]
    assert "out of order" in caplog.text


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
