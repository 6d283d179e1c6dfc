"""The program behind `make demo`: it says what is wrong, and leaves nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent


def demo(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "demo", *map(str, arguments)]


def test_a_wrong_setting_is_told_before_anything_starts(tmp_path: Path) -> None:
    done = subprocess.run(
        demo("run", "configs/toy.yaml", "--set", "sead=3", "--services", tmp_path / "services"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "did you mean 'seed'" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "services").exists()


@pytest.mark.slow
def test_a_signal_ends_every_server(tmp_path: Path) -> None:
    """SIGTERM goes Ctrl-C's way; the servers answered before, so there was something to end."""
    log = tmp_path / "output"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            demo("ui", "--services", tmp_path / "services"),
            cwd=ROOT,
            stdout=stream,
            stderr=stream,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 400
        while b"Ctrl-C" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
        assert [child for child in started if child.is_running()] == []
    finally:
        for child in started:
            if child.is_running():
                child.kill()
        if process.poll() is None:
            process.kill()
            process.wait()
    assert len(started) >= 3
    listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == "LISTEN"}
    addresses = [word for word in log.read_text().split() if word.startswith("http://127.0.0.1:")]
    assert len(addresses) == 2
    assert not listening & {int(address.rsplit(":", 1)[1]) for address in addresses}
