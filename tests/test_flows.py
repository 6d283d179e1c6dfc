"""The flows on a real Prefect server: what runs, what is kept, and what a deployment offers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from prefect import get_client
from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel, WorkPoolConfig
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from flows.pipeline import grace
from flows.stages import data, distill, evaluate, quantize
from grace_core.errors import ConfigError
from tests.stand_in_stages import StandIns

ROOT = Path(__file__).resolve().parent.parent
ALL_STAGES = [
    *("world", "data", "bf16", "w8", "w4", "release-bf16", "release-w8", "release-w4"),
    *("benchmarks", "evaluate-teacher", "evaluate-baseline"),
    *("evaluate-bf16", "evaluate-w8", "evaluate-w4", "publish"),
]
DEPLOYMENTS = {
    *("grace/full-pipeline", "grace-data/data", "grace-distill/distill"),
    *("grace-quantize/quantize", "grace-release/release", "grace-evaluate/evaluate"),
    "grace-publish/publish",
}


@pytest.fixture(scope="module", autouse=True)
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server and a tracking database of this module's own."""
    folder = tmp_path_factory.mktemp("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.create_experiment("flows", artifact_location=str(folder / "artifacts"))
    with prefect_test_harness(server_startup_timeout=180):
        yield
    mlflow.set_tracking_uri(before)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deployment's working directory is the checkout."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    stand_ins = StandIns()
    stand_ins.install(monkeypatch)
    return stand_ins


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    return [f"run_dir={tmp_path}/run", "tracking.experiment=flows"]


def task_states(flow_run_id: Any) -> dict[str, str]:
    """State names of a flow run's tasks, by stage."""
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        )
    return {run.name: str(run.state_name) for run in runs}


def newest_flow_run() -> Any:
    with get_client(sync_client=True) as client:
        return max(client.read_flow_runs(), key=lambda run: run.created)


def test_the_whole_chain_then_only_what_changed(
    stages: StandIns, overrides: list[str], tmp_path: Path
) -> None:
    published = grace("configs/toy.yaml", overrides)
    assert stages.made == ALL_STAGES
    assert published.stage == "publish"
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"].keys() == {
        *("teacher", "baseline", "bf16", "w8", "w4"),
    }

    stages.made.clear()
    again = grace("configs/toy.yaml", overrides)
    assert stages.made == []
    assert again == published.model_copy(update={"reused": True})
    states = task_states(newest_flow_run().id)
    shown = set(ALL_STAGES) - {"benchmarks"} | {"results"}
    assert states.keys() == shown
    assert {name for name, state in states.items() if state != "Cached"} == {"results"}

    stages.made.clear()
    grace("configs/toy.yaml", [*overrides, "quantize.training.steps=51"])
    assert stages.made == [
        *("w8", "w4", "release-w8", "release-w4", "evaluate-w8", "evaluate-w4", "publish"),
    ]

    # Nobody repeated a stage that was kept: the two trainings have one BF16 run, one model of it.
    client = MlflowClient()
    experiment = client.get_experiment_by_name("flows").experiment_id
    trained = client.search_runs([experiment], "tags.`grace.stage` = 'bf16'")
    assert len(trained) == 1
    models = [model.name for model in client.search_logged_models([experiment])]
    assert sorted(models) == ["bf16", "student", "teacher", "w4", "w4", "w8", "w8"]


def test_one_parent_run_holds_its_stages_and_their_ancestry(
    stages: StandIns, overrides: list[str]
) -> None:
    result = grace("configs/toy.yaml", [*overrides, "quantize.variants=[w4]"], publish=False)
    assert result.artifact().manifest.config["enabled"] is False
    flow_run = newest_flow_run()
    client = MlflowClient()
    experiment = client.get_experiment_by_name("flows").experiment_id
    (parent,) = client.search_runs(
        [experiment],
        f"tags.`prefect.flow_run_id` = '{flow_run.id}' and tags.`grace.stage` = 'flow'",
    )
    assert parent.info.status == "FINISHED"
    children = client.search_runs(
        [experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert {run.data.tags["grace.stage"] for run in children} == {
        *("world", "data", "bf16", "w4", "release-bf16", "release-w4"),
        *("evaluate-teacher", "evaluate-baseline", "evaluate-bf16", "evaluate-w4", "publish"),
    }
    folder = Path(client.download_artifacts(parent.info.run_id, ""))
    assert {"ancestry.md", "config.json", "table.md"} <= {file.name for file in folder.iterdir()}
    (w4,) = [line for line in (folder / "ancestry.md").read_text().splitlines() if "| w4 |" in line]
    assert all(name in w4 for name in ("data `", "bf16 `m-", "teacher `m-", "w4 `m-"))
    with get_client(sync_client=True) as prefect:
        answer = prefect._client.post("/artifacts/filter", json={"limit": 200})
    shown = {item["key"] for item in answer.json() if item["flow_run_id"] == str(flow_run.id)}
    assert {"results", "ancestry"} <= shown


def test_a_wrong_setting_stops_before_any_work(
    stages: StandIns, overrides: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'training'"):
        grace("configs/toy.yaml", [*overrides, "distill.trainning.steps=3"])
    assert stages.made == []
    assert not (tmp_path / "run").exists()


def test_a_failing_stage_fails_the_run_and_keeps_what_was_done(
    stages: StandIns, overrides: list[str]
) -> None:
    stages.fail_at = "bf16"
    with pytest.raises(ValueError, match="bf16 went wrong"):
        distill("configs/toy.yaml", overrides)
    flow_run = newest_flow_run()
    assert flow_run.state_name == "Failed"
    assert stages.made == ["world", "data", "bf16"], "tried once: no outage, no retry"
    client = MlflowClient()
    experiment = client.get_experiment_by_name("flows").experiment_id
    runs = client.search_runs([experiment], f"tags.`prefect.flow_run_id` = '{flow_run.id}'")
    assert {run.data.tags["grace.stage"]: run.info.status for run in runs} == {
        **dict.fromkeys(("world", "data"), "FINISHED"),
        **dict.fromkeys(("bf16", "flow"), "FAILED"),
    }
    stages.made.clear()
    stages.fail_at = None
    distill("configs/toy.yaml", overrides)
    assert stages.made == ["bf16"]


def test_runs_that_a_killed_flow_left_open_are_closed_by_the_next(
    stages: StandIns, overrides: list[str]
) -> None:
    data("configs/toy.yaml", overrides)
    over = newest_flow_run()
    client = MlflowClient()
    experiment = client.get_experiment_by_name("flows").experiment_id

    def left_open(flow_run_id: str) -> list[str]:
        """Runs as a SIGKILL leaves them: a parent and a child, never ended."""
        parent = client.create_run(
            experiment, tags={"grace.stage": "flow", "prefect.flow_run_id": flow_run_id}
        ).info.run_id
        child = client.create_run(
            experiment, tags={"grace.stage": "bf16", "mlflow.parentRunId": parent}
        ).info.run_id
        return [parent, child]

    dead, unknown = left_open(str(over.id)), left_open(str(uuid4()))
    data("configs/toy.yaml", overrides)
    status = {run: client.get_run(run).info.status for run in (*dead, *unknown)}
    assert {status[run] for run in dead} == {"KILLED"}
    assert {status[run] for run in unknown} == {"RUNNING"}, "another server's, perhaps at work"


def test_stage_flows_make_what_they_need(stages: StandIns, overrides: list[str]) -> None:
    assert data("configs/toy.yaml", overrides).stage == "data"
    assert stages.made == ["world", "data"]
    assert distill("configs/toy.yaml", overrides).stage == "bf16"
    assert quantize("configs/toy.yaml", overrides, variants=["w4"]).keys() == {"bf16", "w4"}
    assert stages.made == ["world", "data", "bf16", "w4"]
    rows = evaluate("configs/toy.yaml", overrides)
    assert list(rows) == ["teacher", "baseline", "bf16", "w8", "w4"]
    assert all(row.stage == f"evaluate-{label}" for label, row in rows.items())


def test_a_fitted_teacher_teaches_and_is_scored(stages: StandIns, overrides: list[str]) -> None:
    fit = "teacher_fit={training: {steps: 2, row_tokens: 1024, rows_per_step: 4}}"
    rows = evaluate("configs/toy.yaml", [*overrides, fit, "quantize.variants=[w4]"])
    assert stages.made[:4] == ["world", "data", "teacher", "bf16"]
    assert rows["teacher"].artifact().manifest.parents["model"].kind == "teacher"


@pytest.mark.slow
def test_the_deployments_are_registered_with_forms() -> None:
    subprocess.run(
        [sys.executable, "-m", "prefect", "work-pool", "create", "grace-local", "-t", "process"],
        env=os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value()},
        check=True,
    )
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=ROOT,
        env=os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value()},
        check=True,
    )
    with get_client(sync_client=True) as client:
        found = {
            f"{client.read_flow(item.flow_id).name}/{item.name}": item
            for item in client.read_deployments()
        }
    assert found.keys() == DEPLOYMENTS
    for name, item in found.items():
        assert item.enforce_parameter_schema, name
        assert item.work_pool_name == "grace-local"
        (step,) = item.pull_steps
        assert step["prefect.deployments.steps.set_working_directory"]["directory"] == str(ROOT)
        form = item.parameter_openapi_schema["properties"]
        assert {"config", "overrides"} <= form.keys(), name
        assert all(field.get("description") for field in form.values()), name
    publish = found["grace/full-pipeline"].parameter_openapi_schema["properties"]["publish"]
    assert publish["type"] == "boolean"


def test_prefect_yaml_has_only_keys_that_prefect_knows() -> None:
    """Prefect drops a mistyped key without a word."""
    tree = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    known = {field.alias or name for name, field in PrefectYamlModel.model_fields.items()}
    assert tree.keys() <= known | {"definitions"}, "definitions holds YAML anchors"
    for deployment in tree["deployments"]:
        assert deployment.keys() <= DeploymentConfig.model_fields.keys()
        assert deployment["work_pool"].keys() <= WorkPoolConfig.model_fields.keys()
