"""What every stage's task shares: an MLflow run around the stage, and the small value it returns.

One parent run per flow run, one child run per stage that really ran. A stage that was done before
(by content, see `grace_core.artifacts`) is shown as `Cached` in Prefect and keeps the MLflow run
and model it has; the parent run points to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, cast

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import Task
from pydantic import BaseModel, ConfigDict

from grace_core.artifacts import Artifact, read_artifact
from grace_core.config import GraceConfig
from grace_core.events import read_events
from grace_core.stages import StageContext
from tasks.forwarding import MetricForwarder, TrackingUnavailable
from tasks.lineage import MODEL_STAGES, add_model, ancestry_table, find_model, link_inputs
from tasks.mlflow_runs import StageRun, end_after_error, finished_run, log_manifest, open_parent_run

P = ParamSpec("P")

_STAGE_TAG = "grace.stage_run."  # + stage: id of the run that made the stage's artifact


class StageRef(BaseModel):
    """What a stage left, small enough to be a Prefect result."""

    model_config = ConfigDict(frozen=True)

    stage: str
    path: str
    digest: str
    fingerprint: str
    mlflow_run_id: str
    model_id: str | None
    reused: bool

    def artifact(self) -> Artifact:
        return read_artifact(Path(self.path))


def _tracking_failed(_: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Only a tracking outage is worth another try: the stage's result is on disk by then."""
    return isinstance(state.result(raise_on_failure=False), TrackingUnavailable | MlflowException)


def stage_task(
    stage: str,
) -> Callable[[Callable[P, StageRef]], Callable[P, StageRef]]:
    """Make a function that calls `run_stage` a Prefect task, to be called directly from a flow.

    stage: name of its task runs, equal to the stage's; `{parameter}` is filled in.

    Prefect's own cache is off: it would answer without looking at the disk, where the stages find
    what is done themselves. Called directly, a task that returned a state hands that state to the
    flow; this hands over the reference in it.
    """

    def decorate(function: Callable[P, StageRef]) -> Callable[P, StageRef]:
        prefect_task = task(
            task_run_name=stage,
            cache_policy=NO_CACHE,
            persist_result=True,
            result_serializer="json",
            retries=2,
            retry_delay_seconds=[5, 60],
            retry_condition_fn=_tracking_failed,
        )(function)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> StageRef:
            outcome: StageRef | State[StageRef] = prefect_task(*args, **kwargs)
            return outcome.result() if isinstance(outcome, State) else outcome

        return call

    return decorate


@contextmanager
def tracked_flow(config: GraceConfig) -> Iterator[str]:
    """The parent MLflow run of a flow run; yields its id.

    Ends with the ancestry of what was made, as a file of the run and as a Prefect artifact.
    """
    client = MlflowClient()
    run = open_parent_run(config)
    run_id: str = run.info.run_id
    _show_link(run.info.experiment_id, run_id)
    try:
        yield run_id
        tags = client.get_run(run_id).data.tags
        runs = [value for tag, value in tags.items() if tag.startswith(_STAGE_TAG)]
        table = ancestry_table(runs)
        client.log_text(run_id, table, "ancestry.md")
        create_markdown_artifact(table, key="ancestry", description="What was made from what")
    except BaseException as error:
        end_after_error(run_id, error)
        raise
    client.set_terminated(run_id, "FINISHED")


def run_stage(
    config: GraceConfig,
    parent_run: str,
    stage: str,
    make: Callable[[StageContext], Artifact],
    record: Callable[[str, Artifact], None] | None = None,
) -> StageRef:
    """Run one stage under a child run of `parent_run`.

    make: the stage itself; record: what else to log once it is done, called with the child run's
    id. Where the stage was done and tracked before, neither a run nor a model is added.

    Raises what the stage raises, and TrackingUnavailable when MLflow is away for too long.
    """
    done_before = {folder.name for folder in (config.run_dir / "artifacts").glob(f"{stage}-*")}
    child = StageRun(config, parent_run, stage)
    forwarder = MetricForwarder(child.open)
    try:
        artifact = make(StageContext(on_event=forwarder.on_event))
        reused = artifact.path.name in done_before
        run_id = finished_run(child.experiment_id, artifact) if reused else None
        if run_id is None:
            if reused:  # made without tracking, or tracked by another server
                for event in read_events(_metrics_file(config, artifact)):
                    forwarder.on_event(event)
            forwarder.close()
            run_id = child.open()
            log_manifest(run_id, artifact)
            link_inputs(child.experiment_id, run_id, artifact)
            if stage in MODEL_STAGES:
                add_model(child.experiment_id, run_id, artifact)
            if record is not None:
                record(run_id, artifact)
            child.client.set_terminated(run_id, "FINISHED")
        child.client.set_tag(parent_run, f"{_STAGE_TAG}{stage}", run_id)
    except BaseException as error:
        child.end_after_error(error)
        raise
    model = find_model(child.experiment_id, artifact.digest) if stage in MODEL_STAGES else None
    ref = StageRef(
        stage=stage,
        path=str(artifact.path.absolute()),
        digest=artifact.digest,
        fingerprint=artifact.manifest.fingerprint,
        mlflow_run_id=run_id,
        model_id=model.model_id if model else None,
        reused=reused,
    )
    if not reused:
        return ref
    # Prefect takes a state that a task returns as the task's own, with its data as the result.
    return cast(StageRef, Completed(name="Cached", message=f"reused {artifact.path}", data=ref))


def _metrics_file(config: GraceConfig, artifact: Artifact) -> Path:
    return config.run_dir / "work" / artifact.path.name / "metrics.jsonl"


def _show_link(experiment_id: str, run_id: str) -> None:
    address = mlflow.get_tracking_uri()
    if address.startswith("http"):
        create_link_artifact(
            f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}",
            link_text="MLflow run",
            key="mlflow",
            description="Metrics, data sets and models of this flow run",
        )
