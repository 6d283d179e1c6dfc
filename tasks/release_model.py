"""Stages `release-*`: a trained model in the form that users load, and its registry entry."""

from __future__ import annotations

from mlflow import MlflowClient

from grace_core import stages
from grace_core.artifacts import Artifact
from grace_core.config import GraceConfig
from tasks.lineage import register_release
from tasks.tracked import StageRef, run_stage, stage_task


@stage_task("release-{model.stage}")
def release_model(config: GraceConfig, run: str, model: StageRef) -> StageRef:
    def record(run_id: str, release: Artifact) -> None:
        assert model.model_id is not None
        client = MlflowClient()
        client.set_logged_model_tags(
            model.model_id,
            {
                "grace.release_digest": release.digest,
                "grace.release_path": str(release.path.absolute()),
            },
        )
        if config.tracking.registered_model is not None:
            name = f"{config.tracking.registered_model}-{model.stage}"
            version = register_release(name, model.model_id, release)
            client.set_tag(run_id, "grace.registered", f"models:/{name}/{version}")

    return run_stage(
        config,
        run,
        f"release-{model.stage}",
        lambda context: stages.release(config, model.artifact(), context),
        record,
    )
