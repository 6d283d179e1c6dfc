"""The checks of Prefect and MLflow against real servers, and the first task of every flow."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

import tasks.tracked
from demo.services import Services, servers
from flows.stages import data
from grace_core.doctor.findings import Finding, NotReady, Severity, as_text
from operations.check_mlflow import check_mlflow
from operations.check_prefect import check_prefect
from operations.prefect_setup import GPU_POOL, set_up
from operations.servers import shown_address
from tasks.examine import ServersAway, examine
from tests.findings import ROOT, one, severities
from tests.prefect_client import prefect_at
from tests.stand_in_stages import StandIns

PASSWORD = "NeverToBeSeenAnywhere"


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with servers(tmp_path_factory.mktemp("servers") / "services", ROOT, (0, 0)) as running:
        yield running


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the project's folder; MLflow's address is put back."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


def dead_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def about_mlflow(address: str) -> list[Finding]:
    mlflow.set_tracking_uri(address)
    return list(check_mlflow())


def test_addresses_are_shown_without_their_secrets() -> None:
    secret = f"https://user:{PASSWORD}@host:8443/path?token={PASSWORD}#{PASSWORD}"
    assert shown_address(secret) == "https://host:8443/path"
    assert shown_address(f"user:{PASSWORD}@host").count(PASSWORD) == 0
    assert shown_address("mlruns") == "mlruns"


@pytest.mark.parametrize("address", ["mlruns", "file:///tmp/mlruns"])
def test_a_file_store_is_a_problem(address: str) -> None:
    finding = one(about_mlflow(address), Severity.PROBLEM, "is a file store")
    assert "sqlite:///mlflow.db" in finding.remedy


def test_servers_that_do_not_answer_are_problems_without_secrets() -> None:
    port = dead_port()
    address = f"http://user:{PASSWORD}@127.0.0.1:{port}"
    found = about_mlflow(address)
    one(found, Severity.PROBLEM, f"http://127.0.0.1:{port} does not answer")
    found += about_mlflow(f"postgresql+psycopg2://user:{PASSWORD}@127.0.0.1:{port}/mlflow")
    one(found, Severity.PROBLEM, f"127.0.0.1:{port}/mlflow does not answer")
    with prefect_at(f"{address}/api"):
        found += check_prefect()
    one(found, Severity.PROBLEM, f"http://127.0.0.1:{port}/api does not answer")
    assert PASSWORD not in as_text(found)


def test_databases_on_this_machine_need_their_folder(tmp_path: Path) -> None:
    one(about_mlflow(f"sqlite:///{tmp_path}/mlflow.db"), Severity.OK, "on this machine")
    one(about_mlflow(f"sqlite:///{tmp_path}/no/mlflow.db"), Severity.PROBLEM, "no folder")


@pytest.mark.slow
def test_an_mlflow_server_tells_its_version(services: Services) -> None:
    one(about_mlflow(services.mlflow), Severity.OK, f"answers, MLflow {mlflow.__version__}")
    # Something that answers, and is no MLflow.
    one(about_mlflow(f"{services.prefect}/nothing"), Severity.UNCHECKED, "tells no version")


class Page(BaseHTTPRequestHandler):
    """Answers everything, and means nothing by it."""

    def do_GET(self) -> None:
        self.send_response(200 if "version" in self.path else 404)
        self.end_headers()
        self.wfile.write(b"<html>Welcome</html>")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_address_of_something_else_is_a_problem() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        with prefect_at(f"http://127.0.0.1:{server.server_port}"):
            one(check_prefect(), Severity.PROBLEM, "as a Prefect API (JSONDecodeError)")
        one(
            about_mlflow(f"http://127.0.0.1:{server.server_port}"),
            Severity.UNCHECKED,
            "tells no version",
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
def test_prefect_without_and_with_its_set_up(services: Services) -> None:
    with prefect_at(services.environment["PREFECT_API_URL"]):
        found = list(check_prefect())
        one(found, Severity.OK, "/api answers, Prefect 3.")
        for missing in ("work pool grace-gpu", "work pool grace-cpu", "queue grace-gpu/train"):
            assert (
                one(found, Severity.WARNING, f"{missing} is missing").remedy == "run `grace setup`"
            )
        one(found, Severity.WARNING, "end runs without heartbeats' is missing")
        assert Severity.PROBLEM not in severities(found)

        list(set_up(ROOT, deploy=False))
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 30}):
            found = list(check_prefect())
        one(found, Severity.OK, "work pools, queue and automations are set up")
        one(found, Severity.WARNING, f"{GPU_POOL} has no worker online")
        one(found, Severity.OK, "heartbeats every 30 s; a run without them ends after 120 s")
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 180}):
            one(check_prefect(), Severity.WARNING, "send a heartbeat every 180 s")


@pytest.mark.slow
def test_the_command_asks_the_servers(services: Services, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "operations", "doctor", "configs/toy.yaml", "--json"),
            *("--set", f"run_dir={tmp_path}/run"),
        ],
        env={**services.environment, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{dead_port()}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    rows = json.loads(done.stdout)
    assert [row["area"] for row in rows if row["result"] == "problem"] == ["mlflow"]
    assert [row for row in rows if row["area"] == "prefect" and row["result"] == "ok"]


@pytest.mark.slow
def test_every_flow_looks_first(
    services: Services, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stages = StandIns()
    stages.install(monkeypatch)
    mlflow.set_tracking_uri(services.mlflow)
    overrides = [f"run_dir={tmp_path}/run", "tracking.experiment=doctor"]
    with prefect_at(services.environment["PREFECT_API_URL"]):
        data("configs/toy.yaml", overrides)
        assert stages.made == ["world", "data"]
        with get_client(sync_client=True) as client:
            (shown,) = client.read_artifacts(
                artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["doctor"]))
            )
        assert shown.type == "table"
        rows = json.loads(str(shown.data))
        assert {"environment", "disk", "prefect", "mlflow"} <= {row["area"] for row in rows}

        stages.made.clear()
        (tmp_path / "file").write_text("")
        with pytest.raises(NotReady) as raised:
            data("configs/toy.yaml", [*overrides, f"run_dir={tmp_path}/file"])
    assert "choose another run_dir" in str(raised.value)
    assert stages.made == []
    client = MlflowClient()
    experiment = client.get_experiment_by_name("doctor")
    assert experiment is not None
    runs = client.search_runs(
        [experiment.experiment_id], "tags.`grace.stage` = 'flow'", order_by=["start_time ASC"]
    )
    assert [run.info.status for run in runs] == ["FINISHED", "FAILED"]
    texts = [mlflow.artifacts.load_text(f"{run.info.artifact_uri}/doctor.txt") for run in runs]
    assert "problem" not in texts[0] and "problem" in texts[1]


@pytest.mark.slow
def test_a_server_that_is_away_is_waited_for(
    services: Services, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Four attempts, then the flow stops before any stage."""
    stages = StandIns()
    stages.install(monkeypatch)
    attempts = []

    def away(*_: object) -> list[Finding]:
        attempts.append(1)
        return [dataclasses.replace(found[0]), *found]

    mlflow.set_tracking_uri(f"http://127.0.0.1:{dead_port()}")
    found = list(check_mlflow())
    monkeypatch.setattr("tasks.examine.examine_all", away)
    monkeypatch.setattr(tasks.tracked, "examine", examine.with_options(retry_delay_seconds=0))
    with prefect_at(services.environment["PREFECT_API_URL"]):
        with pytest.raises(ServersAway, match="does not answer"):
            data("configs/toy.yaml", [f"run_dir={tmp_path}/run"])
    assert len(attempts) == 4
    assert stages.made == []
    assert not list(tmp_path.glob("run/artifacts/*"))
