"""Stages `release-*`: a trained model in the form that users load, and its registry entry."""

from __future__ import annotations

from mlflow import MlflowClient

from grace_core import stages
from grace_core.artifacts import Artifact
from grace_core.config import GraceConfig
from tasks.lineage import find_model, register_release
from tasks.tracked import StageRef, run_stage, stage_task


@stage_task("release-{model.stage}")
def release_model(config: GraceConfig, run: str, model: StageRef) -> StageRef:
    def record(run_id: str, release: Artifact) -> None:
        if config.tracking.registered_model is not None:
            client = MlflowClient()
            name = f"{config.tracking.registered_model}-{model.stage}"
            experiment = client.get_run(run_id).info.experiment_id
            released = find_model(experiment, release.manifest.stage, release.digest)
            assert released is not None, "the run that made a release has it as its output"
            version = register_release(name, released.model_id, release)
            client.set_tag(run_id, "grace.registered", f"models:/{name}/{version}")

    return run_stage(
        config,
        run,
        f"release-{model.stage}",
        lambda context: stages.release(config, model.artifact(), context),
        record,
    )
