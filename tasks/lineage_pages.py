"""The lineage as a page in MLflow: in the parent run of a flow, and in the run of each release."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from grace_core.lineage.collect import artifacts_below, lineage_of
from grace_core.lineage.page import page_files
from operations.mlflow_names import DIGEST, STAGE
from tasks.mlflow_runs import artifact_address

FOLDER = "lineage"


def log_lineage(run_dir: Path, parent_run: str, stage_runs: Sequence[str]) -> str:
    """Write the pages of what the stages of a flow left; returns links to them as markdown.

    Written at the flow's end, when scores and publications are there to be shown; the page of an
    earlier end is replaced. Empty where the tracking server has no pages, as with SQLite.
    """
    client = MlflowClient()
    tags = {run_id: client.get_run(run_id).data.tags for run_id in stage_runs}
    known = artifacts_below(run_dir)
    by_content = {(item.manifest.stage, item.digest): item for item in known}
    made = {run_id: by_content[entry[STAGE], entry[DIGEST]] for run_id, entry in tags.items()}
    artifacts = list(made.values())
    used = {parent.digest for item in artifacts for parent in item.manifest.parents.values()}
    released = [item for item in artifacts if item.manifest.stage.startswith("release-")]
    newest = released or [item for item in artifacts if item.digest not in used]
    pages = {parent_run: newest} if newest else {}
    pages |= {run_id: [item] for run_id, item in made.items() if item in released}
    links = []
    for run_id, models in pages.items():
        lineage = lineage_of(models, known)
        for name, text in page_files(lineage).items():
            client.log_text(run_id, text, f"{FOLDER}/{name}")
        names = ", ".join(lineage.node(model).name for model in lineage.models)
        links.append(f"- [{names}]({artifact_address(run_id, f'{FOLDER}/index.html')})")
    shown = mlflow.get_tracking_uri().startswith("http")
    return "Lineage pages:\n\n" + "\n".join(links) + "\n" if shown else ""
