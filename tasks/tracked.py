"""What every stage's task shares: an MLflow run around the stage, and the small value it returns.

One parent run per flow run, one child run per stage that really ran. A stage that was done before
(by content, see `grace_core.artifacts`) is shown as `Cached` in Prefect and keeps the MLflow run
and model it has; the parent run points to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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

from grace_core.artifacts import Artifact, read_artifact, stage_folders
from grace_core.config import GraceConfig
from grace_core.doctor.findings import as_text, require_no_problem
from grace_core.events import Event, read_events
from grace_core.plan import Goal
from grace_core.progress import StageMeter, StageProgress
from grace_core.stages import StageContext
from grace_core.training.job import METRICS, work_folder
from operations.check_mlflow import AREA as MLFLOW
from operations.mlflow_names import is_model
from tasks.examine import examine
from tasks.flow_output import keep_output
from tasks.forwarding import MetricForwarder, TrackingUnavailable
from tasks.guard import guarded
from tasks.lineage import add_model, ancestry_table, find_model, link_inputs
from tasks.lineage_pages import log_lineage
from tasks.mlflow_runs import StageRun, end_after_error, finished_run, log_manifest, open_parent_run
from tasks.watch import Watch, attach_logs, current_watch, watched_flow

P = ParamSpec("P")

_FINISHED_ONLY: ContextVar[bool] = ContextVar("finished_only", default=False)
CURRENT_STAGE_TAG = "grace.current_stage"
"""On the parent run: where it is, or was when it ended early."""

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
def tracked_flow(config: GraceConfig, goal: Goal = "publish") -> Iterator[str]:
    """Around all stages of a flow run: shown while it runs, tracked; yields its MLflow run's id.

    goal: what the flow is for, which decides how many stages it has.
    """
    keep_output(config.run_dir)
    with (
        guarded(),
        watched_flow(config, goal) as watch,
        _parent_run(config, goal, watch) as run_id,
    ):
        yield run_id


@contextmanager
def _parent_run(config: GraceConfig, goal: Goal, watch: Watch) -> Iterator[str]:
    """The parent MLflow run of a flow run; yields its id.

    Looks first whether everything is here that a run up to `goal` needs, and raises NotReady where
    it is not. Ends with the ancestry of what was made, as a file of the run and as a Prefect
    artifact.
    """
    findings = examine(config, goal)
    require_no_problem(finding for finding in findings if finding.area == MLFLOW)
    client = MlflowClient()
    run = open_parent_run(config)
    run_id: str = run.info.run_id
    watch.parent_run = run_id
    _show_link(run.info.experiment_id, run_id)
    try:
        client.log_text(run_id, as_text(findings), "doctor.txt")
        require_no_problem(findings)
        yield run_id
        tags = client.get_run(run_id).data.tags
        runs = [value for tag, value in tags.items() if tag.startswith(_STAGE_TAG)]
        table = ancestry_table(runs)
        client.log_text(run_id, table, "ancestry.md")
        links = log_lineage(config.run_dir, run_id, runs)
        shown = f"{table}\n{links}" if links else table
        create_markdown_artifact(shown, key="ancestry", description="What was made from what")
    except BaseException as error:
        end_after_error(run_id, error)
        raise
    client.set_tag(run_id, CURRENT_STAGE_TAG, "finished")
    client.set_terminated(run_id, "FINISHED")


@contextmanager
def finished_stages_only() -> Iterator[None]:
    """Within this block no stage works: one that is not done raises GraceError saying so."""
    token = _FINISHED_ONLY.set(True)
    try:
        yield
    finally:
        _FINISHED_ONLY.reset(token)


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
    done_before = {folder.name for folder in stage_folders(config.run_dir / "artifacts", stage)}
    child = StageRun(config, parent_run, stage)
    forwarder = MetricForwarder(child.open)
    began, watch = time.time(), current_watch()
    meter = StageMeter(stage, began)

    def on_event(event: Event) -> None:
        forwarder.on_event(event)
        meter.take(event)
        # What is read again of an attempt that ended has its progress recorded already.
        if event.time >= began and (shown := _progress_event(event, meter.progress)):
            forwarder.on_event(shown)
        if watch is not None:
            watch.take(event)

    try:
        if watch is not None:
            child.client.set_tag(parent_run, CURRENT_STAGE_TAG, watch.started(stage))
        artifact = make(StageContext(on_event, finished_only=_FINISHED_ONLY.get()))
        reused = artifact.path.name in done_before
        run_id = finished_run(child.experiment_id, artifact) if reused else None
        if run_id is None:
            if reused:  # made without tracking, or tracked by another server
                for event in read_events(work_folder(config.run_dir, artifact.path) / METRICS):
                    forwarder.on_event(event)
            forwarder.close()
            run_id = child.open()
            log_manifest(run_id, artifact)
            link_inputs(child.experiment_id, run_id, artifact)
            if is_model(stage):
                add_model(child.experiment_id, run_id, artifact)
            if record is not None:
                record(run_id, artifact)
            child.client.set_terminated(run_id, "FINISHED")
        child.client.set_tag(parent_run, f"{_STAGE_TAG}{stage}", run_id)
        if watch is not None:
            watch.ended(stage)
    except BaseException as error:
        if watch is not None:
            watch.failed(error)
        child.end_after_error(error)
        attach_logs(child, config, stage, began)
        raise
    model = find_model(child.experiment_id, stage, artifact.digest) if is_model(stage) else None
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


def _progress_event(event: Event, progress: StageProgress) -> Event | None:
    """Per cent done and seconds left, where they are known, as metrics of the same step."""
    if event.kind not in ("train", "progress") or progress.fraction is None:
        return None
    values = {"percent": 100.0 * progress.fraction}
    if progress.seconds_left is not None:
        values["seconds_left"] = progress.seconds_left
    return Event(event.time, event.stage, event.step, "progress", values)


def _show_link(experiment_id: str, run_id: str) -> None:
    address = mlflow.get_tracking_uri()
    if address.startswith("http"):
        create_link_artifact(
            f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}",
            link_text="MLflow run",
            key="mlflow",
            description="Metrics, data sets and models of this flow run",
        )
