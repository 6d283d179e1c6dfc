"""The evaluation stage, killed and started again, leaves the files of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grace_core.artifacts import Artifact
from grace_core.events import Event
from grace_core.stages.evaluation import evaluate
from grace_core.stages.once import StageContext
from tests.evaluation_process import toy_config

pytestmark = pytest.mark.slow
ITEMS = 80


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    config = toy_config(tmp_path_factory.mktemp("undisturbed"))
    return evaluate(config, "baseline", None, StageContext())


def contents(artifact: Artifact) -> dict[str, bytes]:
    """Of every file but the manifest, which says when it was made."""
    files = (file for file in artifact.path.rglob("*") if file.is_file())
    return {
        str(file.relative_to(artifact.path)): file.read_bytes()
        for file in files
        if file.name != "manifest.json"
    }


def answered(run_dir: Path) -> int:
    """Whole lines in all journals."""
    files = run_dir.glob("work/*/*/answers/*.jsonl")
    return sum(file.read_bytes().count(b"\n") for file in files)


def start(run_dir: Path, *settings: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.evaluation_process", str(run_dir), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def wait_until(run_dir: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """So many answers are on disk; or the process is done."""
    deadline = time.monotonic() + 120
    while answered(run_dir) < count and process.poll() is None:
        assert time.monotonic() < deadline, "nothing is answered"
        time.sleep(0.002)


def test_killed_at_random_moments_the_files_are_the_same(
    undisturbed: Artifact, tmp_path: Path
) -> None:
    moments = random.Random(11)
    kills = 0
    for _ in range(2):
        process = start(tmp_path)
        try:
            wait_until(tmp_path, answered(tmp_path) + moments.randint(1, 20), process)
            time.sleep(moments.random() * 0.02)
        finally:
            process.kill()
            kills += process.wait() == -signal.SIGKILL
    before = answered(tmp_path)
    assert kills == 2 and 0 < before < ITEMS
    resumed = evaluate(toy_config(tmp_path), "baseline", None, StageContext())
    assert contents(resumed) == contents(undisturbed)
    assert not list((tmp_path / "work").iterdir()), "what only served to resume is gone"


def test_several_processes_give_the_same_files_also_when_one_is_killed(
    undisturbed: Artifact, tmp_path: Path
) -> None:
    """Whichever worker writes first is killed; the other one takes over."""
    killed: list[int] = []

    def kill_a_worker(event: Event) -> None:
        journals = sorted(tmp_path.glob("work/*/*/answers/*.jsonl"))
        if journals and not killed:
            killed.append(int(journals[0].stem.split("-")[-2]))
            os.kill(killed[0], signal.SIGKILL)

    config = toy_config(tmp_path, "evaluation.processes=2")
    shared = evaluate(config, "baseline", None, StageContext(kill_a_worker))
    assert killed
    assert contents(shared) == contents(undisturbed)


def test_progress_is_told(tmp_path: Path) -> None:
    seen: list[Event] = []
    evaluate(toy_config(tmp_path), "baseline", None, StageContext(seen.append))
    told = [event for event in seen if event.stage == "evaluate-baseline"]
    done = [event.values["done"] for event in told]
    assert done == sorted(done)
    assert done[-1] == told[-1].values["total"] == ITEMS
    assert len(set(done)) > 4
