"""The whole flow against a Prefect server whose database is PostgreSQL, as teams run it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import mlflow
import pytest
from prefect import get_client

from flows.pipeline import grace
from grace_core.launch.process_group import end_process_group, start_process_group
from tests.deployed import Deployed
from tests.prefect_client import prefect_at
from tests.stand_in_stages import StandIns

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not BINARIES or (os.geteuid() == 0 and shutil.which("runuser") is None),
        reason="no PostgreSQL; `make system-deps` installs it",
    ),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """Address of a cluster of these tests' own; PostgreSQL refuses to run as root."""
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    made = subprocess.run(
        [*as_user, "mktemp", "-d", "/tmp/grace-postgresql-XXXXXX"],
        capture_output=True,
        text=True,
        check=True,
    )
    folder, port = Path(made.stdout.strip()), free_port()
    control = [*as_user, str(BINARIES[-1] / "pg_ctl"), "-D", str(folder / "data"), "-w", "-s"]
    settings = f"-h {HOST} -p {port} -k {folder} -c fsync=off"
    try:
        subprocess.run([*control, "initdb", "-o", "-A trust -U prefect"], check=True, cwd="/tmp")
        log = str(folder / "log")
        subprocess.run([*control, "-o", settings, "-l", log, "start"], check=True, cwd="/tmp")
        try:
            yield f"postgresql+asyncpg://prefect@{HOST}:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, cwd="/tmp")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def prefect_api(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prefect server on that database."""
    port, home = free_port(), tmp_path_factory.mktemp("prefect-server")
    environment = os.environ | {
        "PREFECT_API_DATABASE_CONNECTION_URL": database,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    environment.pop("PREFECT_API_URL", None)
    log = home / "prefect-server.log"
    with log.open("wb") as stream:
        server = start_process_group(
            [
                *(sys.executable, "-m", "prefect", "server", "start"),
                *("--host", HOST, "--port", str(port)),
            ],
            env=environment,
            stdout=stream,
            stderr=stream,
            folder=ROOT,
        )
    try:
        address = f"http://{HOST}:{port}/api"
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        end_process_group(server, set(), grace_seconds=5.0)


def test_the_flow_runs_and_finds_its_stages_done(
    prefect_api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    stages = StandIns()
    stages.install(monkeypatch)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    overrides = [f"run_dir={tmp_path}/run"]
    try:
        with prefect_at(prefect_api):
            with get_client(sync_client=True) as client:
                others = {run.id for run in client.read_flow_runs()}
            first = grace("configs/toy.yaml", overrides)
            assert stages.made.pop() == "publish"
            stages.made.clear()
            assert grace("configs/toy.yaml", overrides) == first.model_copy(update={"reused": True})
            assert stages.made == []
            with get_client(sync_client=True) as client:
                runs = [run for run in client.read_flow_runs() if run.id not in others]
                states = [run.state_name for run in runs]
                own = {run.id for run in runs}
                tasks = [run for run in client.read_task_runs() if run.flow_run_id in own]
                names = [run.state_name for run in tasks]
    finally:
        mlflow.set_tracking_uri(before)
    assert states == ["Completed", "Completed"]
    assert names.count("Cached") == 16


def test_what_setup_deploys_runs_in_workers(prefect_api: str, tmp_path: Path) -> None:
    """From the pipeline over a person's approval to the publication."""
    environment = os.environ | {
        "PREFECT_API_URL": prefect_api,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    for expected in ("created", "unchanged"):
        told = subprocess.run(
            [sys.executable, "-m", "operations", "setup"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        assert {line.split()[0] for line in told if "  " in line} == {expected}
    prefect = Deployed(prefect_api)
    prefect.use_stand_in_stages()
    overrides = [f"run_dir={tmp_path}/run", "quantize.variants=[w4]", "publish.approval=true"]
    with ExitStack() as stack:
        for pool in ("grace-gpu", "grace-cpu"):
            log = stack.enter_context((tmp_path / f"{pool}.log").open("wb"))
            worker = start_process_group(
                [
                    *(sys.executable, "-m", "prefect", "worker", "start"),
                    *("--pool", pool, "--type", "process"),
                ],
                env=environment,
                stdout=log,
                stderr=log,
                folder=ROOT,
            )
            stack.callback(end_process_group, worker, set(), grace_seconds=5.0)
        run = prefect.wait(prefect.start("grace/full-pipeline", overrides=overrides))
        assert run["state"]["name"] == "Completed", prefect.explain(run)
        body = {"flows": {"name": {"any_": ["grace-publish"]}}}
        (asking,) = prefect.call("POST", "/flow_runs/filter", body)
        prefect.wait(asking["id"], until="PAUSED")
        prefect.resume(asking["id"], approve=True, reviewer="Ada", note="")
        done = prefect.wait(asking["id"])
        assert done["state"]["name"] == "Completed", prefect.explain(done)
    facts = [
        json.loads(file.read_text())["facts"]
        for file in (tmp_path / "run").glob("artifacts/publish-*/manifest.json")
    ]
    assert [found["approval"]["by"] for found in facts if found] == ["Ada"]
