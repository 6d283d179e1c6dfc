"""The flows on a real Prefect server: what runs, what is kept, and what a deployment offers."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from prefect import get_client
from prefect.cli.deploy._models import (
    DeploymentConfig,
    PrefectYamlModel,
    RawScheduleConfig,
    WorkPoolConfig,
)
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.logging.handlers import APILogWorker
from prefect.testing.utilities import prefect_test_harness
from prefect.workers.process import ProcessWorker

from flows.pipeline import grace
from flows.stages import data, distill, evaluate, publish, quantize
from grace_core.errors import ConfigError, GraceError
from grace_core.events import Event
from grace_core.launch.output import stream
from grace_core.launch.process_group import ProcessesFailed
from grace_core.lineage.graph import Lineage
from operations.automations import HEARTBEAT_SECONDS, ZOMBIE_AFTER
from tests.stand_in_stages import StandIns

ROOT = Path(__file__).resolve().parent.parent
ALL_STAGES = [
    *("benchmarks", "world", "data", "bf16", "w8", "w4"),
    *("release-bf16", "release-w8", "release-w4"),
    *("evaluate-teacher", "evaluate-baseline"),
    *("evaluate-bf16", "evaluate-w8", "evaluate-w4", "report", "publish"),
]


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
    not_stages = {"examine", "show-report", "gate", "results"}
    assert states.keys() == set(ALL_STAGES) | not_stages
    assert {name for name, state in states.items() if state != "Cached"} == not_stages

    stages.made.clear()
    grace("configs/toy.yaml", [*overrides, "quantize.training.steps=51"])
    assert stages.made == [
        *("w8", "w4", "release-w8", "release-w4", "evaluate-w8", "evaluate-w4"),
        *("report", "publish"),
    ]

    # Nobody repeated a stage that was kept: the two trainings have one BF16 run, one model of it.
    client = MlflowClient()
    experiment = client.get_experiment_by_name("flows").experiment_id
    trained = client.search_runs([experiment], "tags.`grace.stage` = 'bf16'")
    assert len(trained) == 1
    models = [model.name for model in client.search_logged_models([experiment])]
    assert sorted(models) == [
        *("bf16", "release-bf16", "release-w4", "release-w4", "release-w8", "release-w8"),
        *("student", "teacher", "w4", "w4", "w8", "w8"),
    ]


def test_a_closed_gate_ends_the_run_before_anything_is_published(
    stages: StandIns, overrides: list[str]
) -> None:
    demand = "evaluation.gate.floors={average: 80}"
    with pytest.raises(GraceError, match=r"GRACE W4G128, average: 75\.00 %, 5\.00 below the floor"):
        grace("configs/toy.yaml", [*overrides, demand])
    assert stages.made == ALL_STAGES[:-1], "the report is there, the publication is not"
    flow_run = newest_flow_run()
    states = task_states(flow_run.id)
    assert (states["show-report"], states["gate"]) == ("Completed", "Failed")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("flows").experiment_id
    tags = f"tags.`prefect.flow_run_id` = '{flow_run.id}' and tags.`grace.stage` = 'flow'"
    (parent,) = client.search_runs([experiment], tags)
    assert parent.data.tags["grace.gate"] == "closed"
    assert parent.data.metrics["gate_shortfalls"] == 3

    grace("configs/toy.yaml", [*overrides, demand, "evaluation.gate.override=for a test"])
    assert stages.made[-1] == "publish"


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
        *("benchmarks", "world", "data", "bf16", "w4", "release-bf16", "release-w4"),
        *("evaluate-teacher", "evaluate-baseline", "evaluate-bf16", "evaluate-w4"),
        *("report", "publish"),
    }
    folder = Path(client.download_artifacts(parent.info.run_id, ""))
    assert {"ancestry.md", "config.json", "table.md", "report"} <= {
        file.name for file in folder.iterdir()
    }
    lineage = Lineage.model_validate_json((folder / "lineage" / "lineage.json").read_text())
    assert [lineage.node(model).stage for model in lineage.models] == ["release-bf16", "release-w4"]
    (release,) = [run for run in children if run.data.tags["grace.stage"] == "release-w4"]
    own = Path(client.download_artifacts(release.info.run_id, "lineage"))
    assert {file.name for file in own.iterdir()} == {
        *("index.html", "lineage.json", "lineage.md", "lineage.svg"),
    }
    stages_of_w4 = {
        node.stage for node in Lineage.model_validate_json((own / "lineage.json").read_text()).nodes
    }
    assert {"world", "data", "checkpoint", "bf16", "evaluate-w4", "publish"} <= stages_of_w4
    assert not {"release-bf16", "evaluate-bf16"} & stages_of_w4
    (w4,) = [line for line in (folder / "ancestry.md").read_text().splitlines() if "| w4 |" in line]
    assert all(name in w4 for name in ("data `", "bf16 `m-", "teacher `m-", "w4 `m-"))
    with get_client(sync_client=True) as prefect:
        answer = prefect._client.post("/artifacts/filter", json={"limit": 200})
    shown = {item["key"] for item in answer.json() if item["flow_run_id"] == str(flow_run.id)}
    assert {"results", "report", "ancestry", "doctor"} <= shown


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


def artifacts_of(flow_run_id: Any) -> dict[str, Any]:
    """A flow run's artifacts by key."""
    with get_client(sync_client=True) as prefect:
        answer = prefect._client.post("/artifacts/filter", json={"limit": 200})
    return {item["key"]: item for item in answer.json() if item["flow_run_id"] == str(flow_run_id)}


def logs_of(flow_run_id: Any) -> list[tuple[int, str]]:
    """Level and message of what arrived at the server."""
    APILogWorker.drain_all()
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as prefect:
        return [(log.level, log.message) for log in prefect.read_logs(wanted, limit=200)]


def parent_run(flow_run_id: Any) -> Any:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("flows").experiment_id
    (run,) = client.search_runs(
        [experiment],
        f"tags.`prefect.flow_run_id` = '{flow_run_id}' and tags.`grace.stage` = 'flow'",
    )
    return run


def test_a_run_is_watched_while_it_runs(
    stages: StandIns,
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of bf16, stage 3 of 3, after one of its four steps."""
    monkeypatch.setattr("tasks.board._UPDATE_SECONDS", 0.05)
    seen: dict[str, Any] = {}
    plain = stages.distill

    def distill_slowly(config: Any, data: Any, teacher: Any, context: Any) -> Any:
        values = {"steps": 4.0, "cross_entropy": 1.25, "beta": 0.5, "grad_norm": 3.0}
        begun = time.time() + 1
        context.on_event(Event(begun, "bf16", 1, "train", values))
        stream("[default0]:2026-01-02 03:04:05 INFO grace_core.training.loop: from rank 0")
        flow_run_id = newest_flow_run().id
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = artifacts_of(flow_run_id)
            if "1.25" in found.get("numbers", {"data": ""})["data"]:
                seen.update(found, tag=parent_run(flow_run_id).data.tags["grace.current_stage"])
                break
            time.sleep(0.1)
        context.on_event(Event(begun + 2, "bf16", 2, "train", values))
        return plain(config, data, teacher, context)

    monkeypatch.setattr("grace_core.stages.distill", distill_slowly)
    ref = distill("configs/toy.yaml", overrides)
    assert seen["tag"] == "bf16 (stage 3 of 3)"
    assert seen["progress"]["data"] == pytest.approx(100 * (2 + 1 / 4) / 3, abs=0.1)
    assert "bf16, stage 3 of 3: 1 of 4, time left unknown" in seen["numbers"]["data"]
    for row in ("| beta | 0.5 |", "| grad_norm | 3 |"):
        assert row in seen["numbers"]["data"]

    flow_run = newest_flow_run()
    after = artifacts_of(flow_run.id)
    assert after["progress"]["id"] == seen["progress"]["id"], "updated, not made again"
    assert (after["progress"]["data"], after["numbers"]["id"]) == (100.0, seen["numbers"]["id"])
    assert any(
        level == logging.INFO and "from rank 0" in text for level, text in logs_of(flow_run.id)
    )
    assert parent_run(flow_run.id).data.tags["grace.current_stage"] == "finished"
    client = MlflowClient()
    percent = client.get_metric_history(ref.mlflow_run_id, "progress/percent")
    assert [(metric.step, metric.value) for metric in percent] == [(1, 25.0), (2, 50.0)]
    (left,) = client.get_metric_history(ref.mlflow_run_id, "progress/seconds_left")
    assert (left.step, left.value) == (2, pytest.approx(2 * 2.0))


def test_a_server_that_does_not_answer_holds_up_nothing(
    stages: StandIns, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr("tasks.board.Board._send", lambda *_: never.wait(60))
    monkeypatch.setattr("tasks.watch._REPORT_SECONDS", 0.1)
    assert distill("configs/toy.yaml", overrides).stage == "bf16"
    assert not never.is_set()
    never.set()


def test_a_failure_is_reported_wherever_people_look(
    stages: StandIns,
    overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_anyone")
    run_dir = tmp_path / "run"

    def fail_in_a_rank(*_: Any) -> None:
        work = run_dir / "work" / "bf16-0123456789ab"
        rank = work / "logs" / "ranks" / "attempt-001" / "0"
        rank.mkdir(parents=True)
        (rank / "stderr.log").write_text("with hf_not_for_anyone\nValueError: bad row\n")
        (work / "job.json").write_text("{}")
        (work / "checkpoints" / "step-00000040").mkdir(parents=True)
        (work / "checkpoints" / "step-00000040" / "state.json").write_text("{}")
        raise ProcessesFailed("stage bf16: ended", 1, ["[default0]:ValueError: bad row"])

    with monkeypatch.context() as patch:
        patch.setattr("grace_core.stages.distill", fail_in_a_rank)
        with pytest.raises(ProcessesFailed):
            distill("configs/toy.yaml", overrides)
    flow_run = newest_flow_run()
    expected = (
        *("Stage bf16 failed: error", "ValueError: bad row", "finished stages: world, data"),
        *("up to step 40", f"grace distill configs/toy.yaml --set run_dir={run_dir} --set"),
    )
    parent = parent_run(flow_run.id)
    folder = Path(MlflowClient().download_artifacts(parent.info.run_id, ""))
    reports = (
        artifacts_of(flow_run.id)["failure"]["data"],
        (run_dir / "failure.md").read_text(),
        (folder / "failure.md").read_text(),
    )
    for report in reports:
        assert all(part in report for part in expected), report
    assert parent.data.tags["grace.current_stage"] == "bf16 (stage 3 of 3)"
    errors = [text for level, text in logs_of(flow_run.id) if level >= logging.ERROR]
    assert any(
        "stage bf16 failed" in text and "continue with: grace distill" in text for text in errors
    )
    experiment = parent.info.experiment_id
    (child,) = MlflowClient().search_runs(
        [experiment],
        f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.`grace.stage` = 'bf16'",
    )
    kept = Path(MlflowClient().download_artifacts(child.info.run_id, "logs"))
    (log,) = kept.rglob("*.log")
    assert log.read_text() == "with [HF_TOKEN]\nValueError: bad row\n"

    distill("configs/toy.yaml", overrides)
    assert not (run_dir / "failure.md").exists() and not (run_dir / "failure.json").exists()


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
    assert stages.made[:5] == ["benchmarks", "world", "data", "teacher", "bf16"]
    assert rows["teacher"].artifact().manifest.parents["model"].kind == "teacher"


def test_students_learn_from_recorded_outputs(stages: StandIns, overrides: list[str]) -> None:
    models = quantize("configs/toy.yaml", [*overrides, "teacher_outputs={}"], variants=["w4"])
    assert stages.made == ["world", "data", "teacher-outputs", "bf16", "w4"]
    parents = [models[label].artifact().manifest.parents for label in ("bf16", "w4")]
    assert [of_model["teacher"].kind for of_model in parents] == ["teacher-outputs"] * 2
    assert parents[0]["teacher"] == parents[1]["teacher"]
    assert distill("configs/toy.yaml", [*overrides, "teacher_outputs={}"]).reused


def test_a_scheduled_run_works_only_when_there_is_something_new(
    stages: StandIns, overrides: list[str], tmp_path: Path
) -> None:
    def scheduled(*more: str) -> str:
        short = [*overrides, "quantize.variants=[w8]", *more]
        grace("configs/toy.yaml", short, only_if_new=True)
        return str(newest_flow_run().state_name)

    stages.fail_at = "w8"
    with pytest.raises(ValueError, match="w8 went wrong"):
        scheduled()
    stages.fail_at = None
    assert scheduled() == "Completed", "one that failed is tried again"
    stages.made.clear()
    assert scheduled() == "Nothing new"
    assert stages.made == []
    assert "unchanged" in newest_flow_run().state.message
    assert scheduled("data.source.records=99") == "Completed"
    assert "bf16" in stages.made
    teacher = tmp_path / "teacher"
    shutil.copytree(ROOT / "assets/toy/teacher", teacher)
    named = ["data.source.records=99", f"models.teacher.path={teacher}"]
    assert scheduled(*named) == "Nothing new", "the same teacher in another place"
    (teacher / "generation_config.json").write_text("{}")
    assert scheduled(*named) == "Completed"


def test_an_approval_needs_the_deployment_that_asks_before_any_work(
    stages: StandIns, overrides: list[str]
) -> None:
    with pytest.raises(GraceError, match="run `grace setup`"):
        grace("configs/toy.yaml", [*overrides, "publish.approval=true"])
    assert stages.made == []


def test_publishing_trains_nothing_and_records_whether_anybody_was_asked(
    stages: StandIns, overrides: list[str]
) -> None:
    overrides = [*overrides, "quantize.variants=[w4]"]
    with pytest.raises(GraceError, match="stage benchmarks is not done"):
        publish("configs/toy.yaml", overrides, ask=False)
    assert stages.made == []
    grace("configs/toy.yaml", overrides, publish=False)
    stages.made.clear()
    with pytest.raises(GraceError, match="nobody answered within"):
        publish("configs/toy.yaml", overrides, days=2e-5)
    waited = newest_flow_run()
    assert waited.state_name == "Failed"
    assert "again to ask again" in waited.state.message
    assert stages.made == []
    published = publish("configs/toy.yaml", [*overrides, "publish.approval=true"], ask=False)
    assert stages.made == ["publish"]
    assert published.artifact().manifest.facts["approval"]["by"].startswith("nobody")
    # The demand for an approval is no part of what was published.
    again = publish("configs/toy.yaml", overrides, ask=True)
    assert again.path == published.path
    assert stages.made == ["publish"], "all of it is there, and nobody is asked"


def test_prefect_yaml_has_only_keys_that_prefect_knows() -> None:
    """Prefect drops a mistyped key without a word."""
    tree = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    known = {field.alias or name for name, field in PrefectYamlModel.model_fields.items()}
    assert tree.keys() <= known | {"definitions"}, "definitions holds YAML anchors"
    for deployment in tree["deployments"]:
        assert deployment.keys() <= DeploymentConfig.model_fields.keys()
        assert deployment["work_pool"].keys() <= WorkPoolConfig.model_fields.keys()
        for schedule in deployment.get("schedules", []):
            assert schedule.keys() <= RawScheduleConfig.model_fields.keys()
            assert schedule["active"] is False
        # A limit of the deployment would end a long training whose lease is not renewed in time.
        assert "concurrency_limit" not in deployment


def test_pool_templates_have_what_prefects_worker_fills_in() -> None:
    ours = json.loads((ROOT / "configs/work-pools/grace-gpu.json").read_text())
    assert ours == json.loads((ROOT / "configs/work-pools/grace-cpu.json").read_text())
    theirs = ProcessWorker.get_default_base_job_template()
    assert ours["job_configuration"] == theirs["job_configuration"]
    assert ours["variables"]["properties"].keys() == theirs["variables"]["properties"].keys()
    environment = ours["variables"]["properties"]["env"]["default"]
    known = {f"PREFECT_{name}" for name in ("CLIENT_MAX_RETRIES", "FLOWS_HEARTBEAT_FREQUENCY")}
    assert known <= environment.keys()
    # Prefect waits 2, 4, 8 ... seconds between its attempts: 62 in all by default.
    attempts = int(environment["PREFECT_CLIENT_MAX_RETRIES"])
    assert sum(2**attempt for attempt in range(1, attempts + 1)) > 120
    assert int(environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) == HEARTBEAT_SECONDS
    assert ZOMBIE_AFTER.total_seconds() >= 3 * HEARTBEAT_SECONDS
