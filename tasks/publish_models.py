"""Stage `publish`: the results table, and the releases at their destination."""

from __future__ import annotations

import json

from mlflow import MlflowClient
from prefect import task
from prefect.cache_policies import NO_CACHE

from grace_core import stages
from grace_core.artifacts import Artifact
from grace_core.config import GraceConfig
from grace_core.errors import GraceError
from grace_core.publish.approval import Approval
from grace_core.publish.release_set import HubAccess
from grace_core.whole_files import write_whole
from operations.publishing_rights import secret, token_block
from tasks.lineage import mark_published
from tasks.tracked import StageRef, run_stage, stage_task


@stage_task("publish")
def publish_models(
    config: GraceConfig,
    run: str,
    releases: dict[str, StageRef],
    evaluations: dict[str, StageRef],
    approval: Approval | None = None,
) -> StageRef:
    """Publish; both mappings are by label: bf16, w8, w4, and for evaluations teacher, baseline."""

    def record(run_id: str, publication: Artifact) -> None:
        mark_published(run_id, publication)
        for name, value in publication.manifest.facts.get("approval", {}).items():
            MlflowClient().set_tag(run_id, f"grace.approval.{name}", value)

    return run_stage(
        config,
        run,
        "publish",
        lambda context: stages.publish(
            config,
            {label: ref.artifact() for label, ref in releases.items()},
            {label: ref.artifact() for label, ref in evaluations.items()},
            context,
            approval,
            HubAccess(token=_token(config)),
        ),
        record,
    )


def _token(config: GraceConfig) -> str | None:
    """The Hub's token from the Secret block that the configuration names; None: HF_TOKEN is used.

    It is handed on within this process only: never a parameter or a result of a task.
    """
    block = token_block(config)
    if block is None:
        return None
    token = secret(block)
    if token is None:
        raise GraceError(
            f"publish.destination.token_secret: Prefect has no Secret block {block}; make one "
            "in its UI under Blocks, or export HF_TOKEN"
        )
    return token


@task(task_run_name="results", cache_policy=NO_CACHE)
def show_results(config: GraceConfig, run: str, published: StageRef) -> None:
    """The results where people look: the run's folder and MLflow's parent run."""
    folder = published.artifact().path
    for name in ("results.json", "table.md"):
        write_whole(config.run_dir / name, (folder / name).read_text(encoding="utf-8"))
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    client = MlflowClient()
    client.log_artifact(run, str(folder / "table.md"))
    for label, row in rows.items():
        if row.get("average") is not None:
            client.log_metric(run, f"average/{label}", row["average"])
