"""A machine that dies takes worker and flow run with it; only missing heartbeats tell."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from demo.services import Services, servers, workers
from tests.chaos.view import processes_of
from tests.deployed import Deployed

ROOT = Path(__file__).resolve().parent.parent
LONGEST_SECONDS = 150

pytestmark = [pytest.mark.slow, pytest.mark.chaos]


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with servers(tmp_path / "services", ROOT, (0, 0)) as local, workers(local):
        yield local


def worker_of(pool: str, prefect: str) -> psutil.Process:
    """The worker of this test's server."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            ours = process.environ().get("PREFECT_API_URL") == f"{prefect}/api"
            if ours and process.cmdline()[2:] == [
                *("prefect", "worker", "start", "--pool", pool, "--type", "process")
            ]:
                found.append(process)
    (worker,) = found
    return worker


def test_a_run_whose_machine_died_is_ended_and_the_living_are_left_alone(
    services: Services, tmp_path: Path
) -> None:
    prefect = Deployed(f"{services.prefect}/api")
    prefect.use_stand_in_stages()
    overrides = [f"run_dir={tmp_path}/run", "quantize.variants=[w4]"]
    finished = prefect.start("grace/full-pipeline", overrides=overrides, publish=False)
    assert prefect.wait(finished)["state"]["name"] == "Completed"
    dying, living = (prefect.start("grace-publish/publish", overrides=overrides) for _ in range(2))
    for run in (dying, living):
        prefect.wait(run, until="PAUSED")

    worker = worker_of("grace-cpu", services.prefect)
    victims = [worker, *processes_of(dying)]
    assert len(victims) >= 2
    for process in victims:
        process.kill()
    died = time.monotonic()
    crashed = prefect.wait(dying, seconds=LONGEST_SECONDS)
    assert (crashed["state"]["type"], crashed["state"]["name"]) == ("CRASHED", "Crashed")
    assert "No heartbeat" in crashed["state"]["message"]
    assert time.monotonic() - died <= LONGEST_SECONDS

    # As long again for the automation to be wrong about the others.
    time.sleep(max(0.0, LONGEST_SECONDS - (time.monotonic() - died)))
    assert prefect.run(living)["state"]["type"] == "PAUSED"
    assert prefect.run(finished)["state"]["name"] == "Completed"
    prefect.resume(living, approve=False, reviewer="Ada", note="")
    assert prefect.wait(living)["state"]["name"] == "Rejected", "without a worker, too"
