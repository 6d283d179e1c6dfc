"""MLflow runs: one parent a flow run, one child a stage, marked truthfully however they end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Param, Run, RunTag
from mlflow.exceptions import MlflowException
from prefect import get_client, runtime
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound

from grace_core.artifacts import MANIFEST, Artifact, code_version
from grace_core.config import GraceConfig
from grace_core.config.load import config_digest

logger = logging.getLogger(__name__)

_PARAMS_A_REQUEST = 100
_PARAM_LENGTH = 6000
_KEY_LENGTH = 250


def experiment_id(config: GraceConfig) -> str:
    """Id of the configured experiment, created when there is none."""
    return str(mlflow.set_experiment(config.tracking.experiment).experiment_id)


class StageRun:
    """A stage's MLflow run, opened when there is something to record; safe to use in threads."""

    def __init__(self, config: GraceConfig, parent_run: str, stage: str) -> None:
        self.client = MlflowClient()
        self.experiment_id = experiment_id(config)
        self._parent_run = parent_run
        self._stage = stage
        self._started = round(time.time() * 1000)
        self._run_id: str | None = None
        self._lock = threading.Lock()

    def open(self) -> str:
        """The run's id; a stage that is tried again goes on with the run it has."""
        with self._lock:
            if self._run_id is None:
                found = self.client.search_runs(
                    [self.experiment_id],
                    f"tags.`mlflow.parentRunId` = '{self._parent_run}' "
                    f"and tags.`grace.stage` = '{self._stage}'",
                    max_results=1,
                )
                if found:
                    self._run_id = str(found[0].info.run_id)
                    self.client.update_run(self._run_id, status="RUNNING")
                    return self._run_id
                tags = {
                    "mlflow.parentRunId": self._parent_run,
                    "grace.stage": self._stage,
                    **_prefect_tags(),
                }
                run = self.client.create_run(
                    self.experiment_id, self._started, tags, run_name=self._stage
                )
                self._run_id = str(run.info.run_id)
            return self._run_id

    def end_after_error(self, error: BaseException) -> None:
        """Mark the run; the error that ended the stage stays the one that is raised."""
        try:
            run_id = self.open()
            self.client.set_tag(run_id, "grace.error", str(error)[:5000])
        except MlflowException as failure:
            logger.warning("MLflow run of stage %s was not marked: %s", self._stage, failure)
        else:
            end_after_error(run_id, error)


def end_after_error(run_id: str, error: BaseException) -> None:
    """Mark a run FAILED, or KILLED when a cancellation ended it; never raises for MLflow's sake."""
    status = "FAILED" if isinstance(error, Exception) else "KILLED"
    try:
        MlflowClient().set_terminated(run_id, status)
    except MlflowException as failure:
        logger.warning("MLflow run %s was not marked %s: %s", run_id, status, failure)


def open_parent_run(config: GraceConfig) -> Run:
    """The run of this flow run; a flow run that is tried again goes on with the run it has."""
    client = MlflowClient()
    experiment = experiment_id(config)
    end_dead_runs(experiment)
    tags = _prefect_tags()
    if flow_run := tags.get("prefect.flow_run_id"):
        found = client.search_runs(
            [experiment],
            f"tags.`prefect.flow_run_id` = '{flow_run}' and tags.`grace.stage` = 'flow'",
            max_results=1,
        )
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0]
    tags |= {"grace.stage": "flow", "grace.config_digest": config_digest(config)}
    tags |= _code_tags(code_version())
    name = " ".join(filter(None, [config.name, runtime.flow_run.name]))
    run = client.create_run(experiment, tags=tags, run_name=name)
    client.log_text(run.info.run_id, config.model_dump_json(indent=1), "config.json")
    return run


def end_dead_runs(experiment: str) -> None:
    """Mark KILLED what flow runs left RUNNING when they were killed; Prefect knows which are over.

    Flow runs that this Prefect server has never had are left alone.
    """
    client = MlflowClient()
    running = "attributes.status = 'RUNNING'"
    left = {
        run.info.run_id: run.data.tags["prefect.flow_run_id"]
        for run in client.search_runs([experiment], f"{running} and tags.`grace.stage` = 'flow'")
        if "prefect.flow_run_id" in run.data.tags
    }
    if not left:
        return
    with get_client(sync_client=True) as prefect:
        dead = [run_id for run_id, flow_run_id in left.items() if _is_over(prefect, flow_run_id)]
    for run_id in dead:
        children = f"{running} and tags.`mlflow.parentRunId` = '{run_id}'"
        for run in client.search_runs([experiment], children):
            client.set_terminated(run.info.run_id, "KILLED")
        client.set_terminated(run_id, "KILLED")


def _is_over(prefect: SyncPrefectClient, flow_run_id: str) -> bool:
    try:
        state = prefect.read_flow_run(UUID(flow_run_id)).state
    except ObjectNotFound:
        return False
    return state is not None and state.is_final()


def finished_run(experiment: str, artifact: Artifact) -> str | None:
    """Id of the run that recorded exactly this artifact: same inputs, same content."""
    found = MlflowClient().search_runs(
        [experiment],
        f"tags.`grace.fingerprint` = '{artifact.manifest.fingerprint}' "
        f"and tags.`grace.digest` = '{artifact.digest}' and attributes.status = 'FINISHED'",
        max_results=1,
    )
    return str(found[0].info.run_id) if found else None


def log_manifest(run_id: str, artifact: Artifact) -> None:
    """Everything a manifest says about the stage itself, in the places where MLflow shows it."""
    client = MlflowClient()
    manifest = artifact.manifest
    params = [
        Param(key[:_KEY_LENGTH], value[:_PARAM_LENGTH])
        for key, value in _leaves(manifest.config).items()
    ]
    for start in range(0, len(params), _PARAMS_A_REQUEST):
        client.log_batch(run_id, params=params[start : start + _PARAMS_A_REQUEST])
    tags = {
        "grace.fingerprint": manifest.fingerprint,
        "grace.digest": manifest.digest,
        "grace.config_digest": manifest.config_digest,
        "grace.path": str(artifact.path.absolute()),
        **_code_tags(manifest.code),
    }
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    client.log_metric(run_id, "seconds", manifest.seconds)
    for name, value in manifest.metrics.items():
        client.log_metric(run_id, name, value)
    client.log_artifact(run_id, str(artifact.path / MANIFEST))


def artifact_address(run_id: str, path: str) -> str:
    """Where a browser finds an artifact of a run, on a tracking server that has pages."""
    server = mlflow.get_tracking_uri().rstrip("/")
    experiment = MlflowClient().get_run(run_id).info.experiment_id
    return f"{server}/#/experiments/{experiment}/runs/{run_id}/artifacts/{path}"


def _prefect_tags() -> dict[str, str]:
    """Which Prefect run this is; nothing outside of one."""
    values = {
        "prefect.flow_run_id": runtime.flow_run.id,
        "prefect.flow_run_name": runtime.flow_run.name,
        "prefect.deployment": runtime.deployment.name,
    }
    return {key: str(value) for key, value in values.items() if value}


def _code_tags(code: Mapping[str, str]) -> dict[str, str]:
    tags = {"grace.version": code["version"]}
    if "commit" in code:
        tags["grace.commit"] = code["commit"]  # tells of uncommitted changes
        tags["mlflow.source.git.commit"] = code["commit"].removesuffix("-dirty")
    return tags


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as dotted keys with printed values."""
    leaves: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = str(value)
    return leaves
