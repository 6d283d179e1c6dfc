"""Nothing of a training outlives the process that started it, even what ignores signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_until

STUBBORN = """
import signal, time
from pathlib import Path
from grace_core import orphans
orphans.LEAVE_SECONDS = 1.0
asked = Path({asked!r})
signal.signal(signal.SIGTERM, lambda *_: asked.write_text("asked"))
orphans.{watch}()
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""

PARENT = """
import subprocess, sys, time
from grace_core.orphans import be_parent
be_parent()
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
assert child.stdout.readline() == "ready\\n"
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("watch", ["leave_with_parent", "end_after_parent"])
def test_an_orphan_ends_itself(watch: str, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    program = STUBBORN.format(asked=str(asked), watch=watch)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, program], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert asked.exists() == (watch == "leave_with_parent")


def test_one_that_was_orphaned_before_it_looked_notices(tmp_path: Path) -> None:
    program = STUBBORN.format(asked=str(tmp_path / "asked"), watch="leave_with_parent")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"GRACE_PARENT_PID": "1"},  # this test is not process 1
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
