"""Everything that `grace setup` deploys, driven through workers; stages are stand-ins."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from mlflow import MlflowClient

from demo.services import Services, servers, workers
from tests.deployed import Deployed, until

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with servers(tmp_path_factory.mktemp("services"), ROOT, (0, 0)) as local, workers(local):
        yield local


@pytest.fixture(scope="module")
def prefect(services: Services) -> Deployed:
    return Deployed(f"{services.prefect}/api")


@pytest.fixture(scope="module")
def set_up_again(services: Services, prefect: Deployed) -> str:
    """What a second `grace setup` prints, after an operator switched the schedule on."""
    (schedule,) = prefect.call("GET", "/deployments/name/grace/scheduled-retrain")["schedules"]
    assert schedule["active"] is False, "shipped switched off"
    path = f"/deployments/{schedule['deployment_id']}/schedules/{schedule['id']}"
    prefect.call("PATCH", path, {"active": True})
    return grace_setup(services)


@pytest.fixture(scope="module")
def stand_ins(set_up_again: str, prefect: Deployed) -> Deployed:
    prefect.use_stand_in_stages()
    return prefect


@dataclass(frozen=True)
class Started:
    """A run of a deployment, and where it works."""

    run: str
    run_dir: Path
    overrides: list[str]


@pytest.fixture(scope="module")
def started(stand_ins: Deployed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Started]:
    """The first run of each test, started side by side, by deployment; each in its own folder."""
    runs = {}
    for deployment, overrides in (
        ("grace/full-pipeline", ["quantize.variants=[w4]", "publish.approval=true"]),
        ("grace-data/data", []),
        ("grace/scheduled-retrain", ["quantize.variants=[w4]"]),
    ):
        run_dir = tmp_path_factory.mktemp("work") / "run"
        given = [f"run_dir={run_dir}", *overrides]
        runs[deployment] = Started(stand_ins.start(deployment, overrides=given), run_dir, given)
    return runs


def grace_setup(services: Services, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "operations", "setup", *arguments],
        cwd=ROOT,
        env=dict(services.environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def publications(run_dir: Path) -> list[dict[str, Any]]:
    """Manifests of what was published, whatever was left unpublished by configuration."""
    manifests = [
        json.loads(file.read_text()) for file in run_dir.glob("artifacts/publish-*/manifest.json")
    ]
    return [manifest for manifest in manifests if manifest["config"]["enabled"]]


def test_setup_again_changes_nothing_and_keeps_the_schedule_on(
    set_up_again: str, prefect: Deployed
) -> None:
    lines = set_up_again.splitlines()
    assert lines[-1] == "Everything was there already; nothing was changed."
    assert all(line.startswith("unchanged") for line in lines[:-1])
    for what in ("work pool grace-gpu", "grace-gpu/train", "automation", "grace-publish/publish"):
        assert what in set_up_again
    (schedule,) = prefect.call("GET", "/deployments/name/grace/scheduled-retrain")["schedules"]
    assert schedule["active"] is True
    assert schedule["schedule"] == {"cron": "0 2 * * 6", "timezone": "UTC", "day_or": True}


def test_every_deployment_has_a_form_and_a_pool(set_up_again: str, prefect: Deployed) -> None:
    pools = {"data": "grace-cpu", "publish": "grace-cpu"}
    found = {item["name"]: item for item in prefect.call("POST", "/deployments/filter", {})}
    assert found.keys() == {
        *("full-pipeline", "scheduled-retrain"),
        *("data", "distill", "quantize", "release", "evaluate", "publish"),
    }
    for name, item in found.items():
        assert item["enforce_parameter_schema"], name
        assert item["work_pool_name"] == pools.get(name, "grace-gpu")
        assert item["work_queue_name"] == ("default" if name in pools else "train")
        (step,) = item["pull_steps"]
        assert step["prefect.deployments.steps.set_working_directory"]["directory"] == str(ROOT)
        form = item["parameter_openapi_schema"]["properties"]
        assert {"config", "overrides"} <= form.keys(), name
        assert all(field.get("description") for field in form.values()), name
    publish = found["full-pipeline"]["parameter_openapi_schema"]["properties"]["publish"]
    assert publish["type"] == "boolean"


def test_setup_changes_only_what_differs(
    services: Services, prefect: Deployed, set_up_again: str
) -> None:
    shown = grace_setup(services, "--gpus", "3", "--dry-run", "--no-deploy")
    assert "would be updated work queue grace-gpu/train  (3 at a time)" in shown
    queue = "/work_pools/grace-gpu/queues/train"
    assert prefect.call("GET", queue)["concurrency_limit"] == 1

    prefect.call("PATCH", "/work_pools/grace-cpu", {"base_job_template": {}})
    shown = grace_setup(services, "--gpus", "2", "--no-deploy")
    changed = [line for line in shown.splitlines() if not line.startswith("unchanged")]
    assert len(changed) == 2
    assert "updated    work pool grace-cpu" in changed[0]
    assert changed[1] == "updated    work queue grace-gpu/train  (2 at a time)"
    assert prefect.call("GET", queue)["concurrency_limit"] == 2
    template = prefect.call("GET", "/work_pools/grace-cpu")["base_job_template"]
    assert template == json.loads((ROOT / "configs/work-pools/grace-cpu.json").read_text())
    # Without the option the limit stays.
    assert "unchanged" in grace_setup(services, "--no-deploy").splitlines()[2]


def test_setup_says_what_is_wrong_with_a_notification_block(services: Services) -> None:
    told = grace_setup(services, "--notify", "slack-webhook/nobody", "--no-deploy", code=1)
    assert "no such block" in told
    assert "Traceback" not in told


def test_an_approval_is_asked_for_by_a_run_of_its_own(
    started: dict[str, Started], stand_ins: Deployed, services: Services
) -> None:
    """The pipeline ends with its scores and nothing published, and says where it is asked."""
    pipeline = started["grace/full-pipeline"]
    run_dir, run = pipeline.run_dir, stand_ins.wait(pipeline.run)
    assert run["state"]["name"] == "Completed", stand_ins.explain(run)
    assert run["work_queue_name"] == "train"
    assert publications(run_dir) == []
    assert (run_dir / "results.json").is_file()
    assert "asks a person" in stand_ins.artifact(run["id"], "publication")

    client = MlflowClient(services.mlflow)
    experiment = client.get_experiment_by_name("grace").experiment_id
    (parent,) = client.search_runs(
        [experiment], f"tags.`prefect.flow_run_id` = '{run['id']}' and tags.`grace.stage` = 'flow'"
    )
    asking = parent.data.tags["grace.publication_flow_run"]
    refused = stand_ins.wait(asking, until="PAUSED")
    assert refused["work_pool_name"] == "grace-cpu"
    shown = stand_ins.artifact(asking, "approval")
    assert "75.0" in shown, "the scores"
    assert str(run_dir / "releases" / "Toy-GRACE-W4G128") in shown

    # Two more, to be cancelled and approved; they start while the first is answered.
    publisher = "grace-publish/publish"
    cancelled, approved = (
        stand_ins.start(publisher, overrides=pipeline.overrides) for _ in range(2)
    )

    wrong = stand_ins.resume(asking, approve=True)
    assert wrong["status"] == "REJECT", "no name, no approval"
    assert stand_ins.run(asking)["state"]["type"] == "PAUSED"
    stand_ins.resume(asking, approve=False, reviewer="Ada", note="W4 lost too much")
    refused = stand_ins.wait(asking)
    assert (refused["state"]["type"], refused["state"]["name"]) == ("COMPLETED", "Rejected")
    assert refused["state"]["message"] == "refused by Ada: W4 lost too much"
    assert publications(run_dir) == []

    stand_ins.wait(cancelled, until="PAUSED")
    state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
    stand_ins.call("POST", f"/flow_runs/{cancelled}/set_state", state)
    assert stand_ins.wait(cancelled)["state"]["name"] == "Cancelled"
    assert publications(run_dir) == []

    stand_ins.wait(approved, until="PAUSED")
    stand_ins.resume(approved, approve=True, reviewer=" Grace ", note="")
    done = stand_ins.wait(approved)
    assert done["state"]["name"] == "Completed", stand_ins.explain(done)
    (publication,) = publications(run_dir)
    approval = publication["facts"]["approval"]
    assert approval["by"] == "Grace"
    (recorded,) = client.search_runs(
        [experiment], "tags.`grace.stage` = 'publish' and tags.`grace.approval.by` = 'Grace'"
    )
    assert recorded.data.tags["grace.approval.at"] == approval["at"]
    (flow,) = client.search_runs(
        [experiment], f"tags.`prefect.flow_run_id` = '{approved}' and tags.`grace.stage` = 'flow'"
    )
    assert flow.data.tags["grace.approval"] == "approved"


def test_a_scheduled_run_works_once(started: dict[str, Started], stand_ins: Deployed) -> None:
    """`only_if_new` is the deployment's own; what counts as new is tested in test_flows."""
    scheduled = started["grace/scheduled-retrain"]
    first = stand_ins.wait(scheduled.run)
    assert first["state"]["name"] == "Completed", stand_ins.explain(first)
    assert len(publications(scheduled.run_dir)) == 1
    again = stand_ins.start("grace/scheduled-retrain", overrides=scheduled.overrides)
    second = stand_ins.wait(again)
    assert (second["state"]["type"], second["state"]["name"]) == ("COMPLETED", "Nothing new")
    assert "data" in second["state"]["message"]
    assert "teacher" in second["state"]["message"]


class Receiver(BaseHTTPRequestHandler):
    messages: ClassVar[list[dict[str, str]]] = []

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.messages.append(json.loads(self.rfile.read(length)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_people_are_told_of_a_failure_with_its_stage_and_a_link(
    stand_ins: Deployed, services: Services, tmp_path: Path
) -> None:
    receiver = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    program = f"""
from prefect.blocks.notifications import CustomWebhookNotificationBlock
CustomWebhookNotificationBlock(
    name="people", url="http://127.0.0.1:{receiver.server_port}/",
    json_data={{"subject": "{{{{subject}}}}", "body": "{{{{body}}}}"}},
).save("people")
"""
    try:
        subprocess.run([sys.executable, "-c", program], env=dict(services.environment), check=True)
        told = grace_setup(services, "--notify", "custom-webhook/people", "--no-deploy")
        assert "created    automation 'grace: tell of runs that ended'" in told
        again = grace_setup(services, "--notify", "custom-webhook/people", "--no-deploy")
        assert "nothing was changed" in again
        # Nothing is finished in that folder: publishing must fail, not train.
        overrides = [f"run_dir={tmp_path}/run"]
        run = stand_ins.start("grace-publish/publish", overrides=overrides)
        failed = stand_ins.wait(run)
        assert failed["state"]["name"] == "Failed"
        assert not list((tmp_path / "run").glob("artifacts/*-*"))
        until(lambda: Receiver.messages, "a message")
    finally:
        receiver.shutdown()
    # Prefect delivers at least once: on SQLite a locked database makes it evaluate an event again.
    message = Receiver.messages[0]
    assert all(other == message for other in Receiver.messages)
    assert message["subject"] == "grace-publish: Failed"
    for part in ("Last stage: benchmarks", "stage benchmarks is not done", failed["name"], run):
        assert part in message["body"]
    report = stand_ins.artifact(run, "failure")
    assert "Stage benchmarks failed" in report
    (command,) = [line for line in report.splitlines() if line.startswith("prefect ")]
    words = shlex.split(command)
    assert words[:4] == ["prefect", "deployment", "run", "grace-publish/publish"]
    assert f"overrides={json.dumps(overrides)}" in words


def test_a_stage_has_a_deployment_of_its_own(
    started: dict[str, Started], stand_ins: Deployed
) -> None:
    data = started["grace-data/data"]
    done = stand_ins.wait(data.run)
    assert done["state"]["name"] == "Completed", stand_ins.explain(done)
    assert done["work_pool_name"] == "grace-cpu"
    made = sorted(path.name.split("-")[0] for path in data.run_dir.glob("artifacts/[!.]*"))
    assert made == ["data", "world"]


def test_a_parameter_of_the_wrong_kind_is_refused(stand_ins: Deployed) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        stand_ins.start("grace/full-pipeline", publish="perhaps")
    assert refused.value.code == 409


def test_without_a_server_setup_says_so() -> None:
    environment = os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = subprocess.run(
        [sys.executable, "-m", "operations", "setup"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no Prefect server answers" in done.stderr
    assert "Traceback" not in done.stderr
