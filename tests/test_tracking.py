"""MLflow on SQLite: what can be asked of it afterwards, and what an outage costs (nothing)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect.client.schemas.objects import State

from grace_core.artifacts import Artifact
from grace_core.config import GraceConfig, load_config
from grace_core.events import Event
from grace_core.failure import Kind
from grace_core.stages import StageContext
from tasks.forwarding import MetricForwarder, TrackingUnavailable
from tasks.lineage import log_scores, register_release
from tasks.mlflow_runs import open_parent_run
from tasks.tracked import StageRef, run_stage
from tasks.watch import Watch
from tests.stand_in_stages import StandIns, checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tracking database of this module's own."""
    folder = tmp_path_factory.mktemp("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    yield folder
    mlflow.set_tracking_uri(before)


@pytest.fixture
def config(tracking: Path, tmp_path: Path) -> GraceConfig:
    """The toy configuration in a run folder and an experiment of the test's own."""
    name = tmp_path.name
    mlflow.create_experiment(name, artifact_location=str(tracking / name))
    return load_config(
        ROOT / "configs" / "toy.yaml", [f"run_dir={tmp_path}/run", f"tracking.experiment={name}"]
    )


@pytest.fixture
def parent(config: GraceConfig) -> str:
    return str(open_parent_run(config).info.run_id)


def result_of(outcome: StageRef | State[StageRef]) -> StageRef:
    """What Prefect hands on: the data of a state that a task returned, or the value itself."""
    return outcome.data if isinstance(outcome, State) else outcome


class Pipeline:
    """The stages of a run under `run_stage`, as the tasks call them."""

    def __init__(self, config: GraceConfig, parent: str) -> None:
        self.config, self.parent, self.stages = config, parent, StandIns()

    def stage(self, name: str, make: Any, record: Any = None) -> StageRef:
        return result_of(run_stage(self.config, self.parent, name, make, record))

    def train(self) -> dict[str, StageRef]:
        config, stages = self.config, self.stages
        data = self.stage("data", lambda c: stages.prepare_data(config, c))
        bf16 = self.stage("bf16", lambda c: stages.distill(config, data.artifact(), None, c))
        w4 = self.stage(
            "w4",
            lambda c: stages.quantize(config, "w4", data.artifact(), None, bf16.artifact(), c),
        )
        return {"data": data, "bf16": bf16, "w4": w4}


def runs_of(config: GraceConfig, **tags: str) -> list[Any]:
    client = MlflowClient()
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    found: list[Any] = client.search_runs([experiment.experiment_id], query)
    return found


def models_of(config: GraceConfig) -> list[Any]:
    client = MlflowClient()
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    found: list[Any] = client.search_logged_models([experiment.experiment_id])
    return found


def test_from_w4_one_walks_to_bf16_teacher_and_data(config: GraceConfig, parent: str) -> None:
    refs = Pipeline(config, parent).train()
    client = MlflowClient()

    def parents(model_id: str) -> tuple[dict[str, str], dict[str, str]]:
        """Names and ids of the models, names and digests of the data, that made a model."""
        run = client.get_run(client.get_logged_model(model_id).source_run_id)
        assert [output.model_id for output in run.outputs.model_outputs] == [model_id]
        assert run.data.tags["mlflow.parentRunId"] == parent
        models = {
            client.get_logged_model(entry.model_id).name: entry.model_id
            for entry in run.inputs.model_inputs
        }
        data = {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs}
        return models, data

    assert refs["w4"].model_id is not None
    models, data = parents(refs["w4"].model_id)
    assert models.keys() == {"bf16", "teacher"}
    assert models["bf16"] == refs["bf16"].model_id
    assert data == {"data": refs["data"].digest[:32]}
    teacher_of_w4 = models["teacher"]
    models, data = parents(models["bf16"])
    assert models.keys() == {"student", "teacher"}
    assert models["teacher"] == teacher_of_w4, "one teacher, one model"
    assert data == {"data": refs["data"].digest[:32]}
    tags = client.get_logged_model(teacher_of_w4).tags
    assert tags["grace.digest"] == checkpoint(config.models.teacher.path).digest
    # And from the data set on: its run is found by our digest, and has the pictures it came from.
    experiment = client.get_run(parent).info.experiment_id
    users = client.search_runs([experiment], f"dataset.digest = '{refs['data'].digest[:32]}'")
    assert {run.data.tags["grace.stage"] for run in users} == {"bf16", "w4"}
    prepared = client.get_run(refs["data"].mlflow_run_id)
    assert [entry.dataset.name for entry in prepared.inputs.dataset_inputs] == ["world"]


def test_a_child_run_holds_what_the_manifest_says(config: GraceConfig, parent: str) -> None:
    refs = Pipeline(config, parent).train()
    client = MlflowClient()
    run = client.get_run(refs["bf16"].mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.learning_rate"] == "0.001"
    assert run.data.tags["grace.digest"] == refs["bf16"].digest
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["manifest.json"]
    assert client.get_run(refs["data"].mlflow_run_id).data.metrics["records"] == 5.0


def test_what_was_done_before_is_linked_not_repeated(config: GraceConfig, parent: str) -> None:
    first = Pipeline(config, parent).train()
    runs, models = len(runs_of(config)), len(models_of(config))
    again = open_parent_run(config).info.run_id
    second = Pipeline(config, again)
    refs = second.train()
    assert second.stages.made == []
    assert len(runs_of(config)) == runs + 1, "the new parent run, and no child"
    assert len(models_of(config)) == models
    for stage, ref in refs.items():
        assert ref == first[stage].model_copy(update={"reused": True})
        assert MlflowClient().get_run(again).data.tags[f"grace.stage_run.{stage}"] == (
            first[stage].mlflow_run_id
        )


def test_a_reused_stage_is_cached_for_prefect(config: GraceConfig, parent: str) -> None:
    stages = StandIns()
    make = lambda context: stages.prepare_data(config, context)  # noqa: E731
    assert isinstance(run_stage(config, parent, "data", make), StageRef)
    outcome = run_stage(config, parent, "data", make)
    assert isinstance(outcome, State)
    assert outcome.name == "Cached"
    assert outcome.is_completed()


def test_a_stage_that_ran_without_tracking_is_recorded_later(
    config: GraceConfig, parent: str
) -> None:
    untracked, silent = StandIns(), StageContext()
    data = untracked.prepare_data(config, silent)
    untracked.distill(config, data, None, silent)
    pipeline = Pipeline(config, parent)
    ref = pipeline.train()["bf16"]
    assert pipeline.stages.made == ["w4"]
    assert ref.reused
    assert ref.model_id is not None
    history = MlflowClient().get_metric_history(ref.mlflow_run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_metrics_are_there_while_the_stage_runs(config: GraceConfig, parent: str) -> None:
    stages = StandIns()

    def make(context: StageContext) -> Artifact:
        context.on_event(Event(time.time(), "data", 1, "train", {"loss": 2.5}))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            running = runs_of(config, **{"grace.stage": "data"})
            if running and running[0].data.metrics.get("train/loss") == 2.5:
                assert running[0].info.status == "RUNNING"
                return stages.prepare_data(config, context)
            time.sleep(0.1)
        raise AssertionError("the metric did not come while the stage ran")

    assert result_of(run_stage(config, parent, "data", make)).stage == "data"


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("bad row"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_stage_that_ends_badly_is_marked(
    config: GraceConfig, parent: str, error: BaseException, status: str
) -> None:
    def make(context: StageContext) -> Artifact:
        raise error

    with pytest.raises(type(error)):
        run_stage(config, parent, "bf16", make)
    (run,) = runs_of(config, **{"grace.stage": "bf16"})
    assert run.info.status == status
    assert run.data.tags["grace.error"] == str(error)
    assert models_of(config) == []


def test_an_outage_loses_and_doubles_nothing(
    config: GraceConfig, parent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, calls = MlflowClient.log_batch, []

    def log_batch(self: MlflowClient, run_id: str, *args: Any, **kwargs: Any) -> None:
        calls.append(run_id)
        if len(calls) == 2:  # taken, but the answer is lost on its way back
            answers(self, run_id, *args, **kwargs)
        if len(calls) <= 3:
            raise MlflowException("connection refused")
        answers(self, run_id, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    monkeypatch.setattr("tasks.forwarding._SEND_EVERY", 0.01)
    forwarder = MetricForwarder(lambda: parent)
    steps = range(1, 2501)  # more than MLflow takes in one request
    for step in steps:
        forwarder.on_event(Event(1000.0 + step, "bf16", step, "train", {"loss": float(step)}))
    forwarder.close()
    history = MlflowClient().get_metric_history(parent, "train/loss")
    assert [metric.step for metric in history] == list(steps)


def test_a_lasting_outage_is_told(
    config: GraceConfig, parent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_batch(*_: Any, **__: Any) -> None:
        raise MlflowException("connection refused")

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    forwarder = MetricForwarder(lambda: parent, close_seconds=0.0)
    forwarder.on_event(Event(1.0, "bf16", 1, "train", {"loss": 1.0}))
    with pytest.raises(TrackingUnavailable, match=r"connection refused.*run again") as caught:
        forwarder.close()
    watch = Watch(config, "distill")
    watch.started("bf16")
    told = watch.failed(caught.value)
    assert (told.kind, told.stage) == (Kind.TRACKING, "bf16")
    assert "connection refused" in (config.run_dir / "failure.md").read_text()


def test_scores_stand_on_the_released_model_with_their_benchmark(
    config: GraceConfig, parent: str
) -> None:
    pipeline = Pipeline(config, parent)
    w4 = pipeline.train()["w4"]
    release = pipeline.stage(
        "release-w4", lambda c: pipeline.stages.release(config, w4.artifact(), c)
    )
    assert release.model_id is not None
    evaluated = pipeline.stage(
        "evaluate-w4",
        lambda c: pipeline.stages.evaluate(config, "w4", release.artifact(), c),
        log_scores,
    )
    (metric,) = [
        metric
        for metric in MlflowClient().get_logged_model(release.model_id).metrics
        if metric.key == "toy-choice"
    ]
    assert (metric.value, metric.run_id) == (75.0, evaluated.mlflow_run_id)
    assert metric.dataset_name == "benchmarks"
    benchmarks = evaluated.artifact().manifest.parents["benchmarks"]
    assert metric.dataset_digest == benchmarks.digest[:32]


def test_a_release_is_registered_once_under_its_alias(config: GraceConfig, parent: str) -> None:
    pipeline = Pipeline(config, parent)
    w4 = pipeline.train()["w4"]
    made = pipeline.stage("release-w4", lambda c: pipeline.stages.release(config, w4.artifact(), c))
    release = made.artifact()
    name = f"{config.tracking.experiment}-w4"
    assert made.model_id is not None
    assert register_release(name, made.model_id, release) == "1"
    assert register_release(name, made.model_id, release) == "1"
    version = MlflowClient().get_model_version_by_alias(name, "candidate")
    assert version.tags["grace.model_id"] == made.model_id
    assert Path(version.tags["grace.path"]) == release.path
    other = pipeline.stages.release(
        config, Pipeline(config, parent).train()["bf16"].artifact(), StageContext()
    )
    assert register_release(name, made.model_id, other) == "2"
    assert MlflowClient().get_model_version_by_alias(name, "candidate").tags["grace.digest"] == (
        other.digest
    )
