"""Stage `report`, shown where people look; and the gate that it is held against."""

from __future__ import annotations

import json
from typing import Any

import mlflow
from mlflow import MlflowClient
from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from grace_core import stages
from grace_core.artifacts import Artifact
from grace_core.config import GraceConfig
from grace_core.evaluation.gate import GateVerdict, require_open
from grace_core.evaluation.report.comparison import AVERAGE
from grace_core.evaluation.report.files import DATA, FOLDER, PAGE, TEXT
from grace_core.whole_files import write_whole
from tasks.mlflow_runs import artifact_address
from tasks.tracked import StageRef, run_stage, stage_task


@stage_task("report")
def write_report(config: GraceConfig, run: str, evaluations: dict[str, StageRef]) -> StageRef:
    """Compare the evaluations, which are by label."""

    def record(run_id: str, report: Artifact) -> None:
        for file in report.manifest.files:
            MlflowClient().log_artifact(run_id, str(report.path / file), FOLDER)

    return run_stage(
        config,
        run,
        "report",
        lambda context: stages.report(
            config, {label: ref.artifact() for label, ref in evaluations.items()}, context
        ),
        record,
    )


@task(task_run_name="show-report", cache_policy=NO_CACHE)
def show_report(config: GraceConfig, run: str, report: StageRef) -> None:
    """The report in the run's folder, in MLflow's parent run, and as Prefect artifacts."""
    folder, client = report.artifact().path, MlflowClient()
    (config.run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    for name in report.artifact().manifest.files:
        write_whole(config.run_dir / FOLDER / name, (folder / name).read_text(encoding="utf-8"))
        client.log_artifact(run, str(folder / name), FOLDER)
    made = json.loads((folder / DATA).read_text(encoding="utf-8"))
    create_table_artifact(_rows(made), key="results", description="Percent correct")
    text = (folder / TEXT).read_text(encoding="utf-8")
    if mlflow.get_tracking_uri().startswith("http"):
        address = artifact_address(run, f"{FOLDER}/{PAGE}")
        text = f"[The page, with plots and the worst items]({address})\n\n{text}"
    create_markdown_artifact(text, key="report", description="Models side by side")


@task(task_run_name="gate", cache_policy=NO_CACHE)
def regression_gate(run: str, report: StageRef, *, holds: bool) -> None:
    """Show what the regression gate says. Raises GateClosed where it `holds` and is closed.

    The verdict is the report's own, whose manifest says whether it was changed since.
    """
    verdict = GateVerdict.model_validate(report.artifact().manifest.facts["gate"])
    client = MlflowClient()
    state = "open" if verdict.passed else "closed" if verdict.override is None else "overridden"
    client.set_tag(run, "grace.gate", state)
    if verdict.override is not None:
        client.set_tag(run, "grace.gate.override", verdict.override)
    client.log_metric(run, "gate_shortfalls", len(verdict.shortfalls))
    log = get_run_logger()
    (log.info if verdict.passed else log.warning)("Regression gate: %s", verdict.in_words)
    if holds:
        require_open(verdict)


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a model: scores, and how its average stands to the baseline's and BF16's."""
    comparison = report["comparison"]
    baselines = {model["model"] for model in report["models"] if model["label"] == "baseline"}
    gains = {
        each["first"]: f"{each['value']:+.1f}, {each['verdict']}"
        for each in comparison["differences"]
        if each["second"] in baselines and each["on"] == AVERAGE
    }
    kept = {each["model"]: f"{each['value']:.1f} %" for each in comparison["retention"]}
    headings = report.get("headings", {})  # none in reports of earlier versions
    rows = []
    for model in report["models"]:
        estimates = comparison["estimates"][model["model"]]
        names = [*model["scores"], AVERAGE]
        scores = {
            headings.get(name, name): round(estimates[name]["value"], 1)
            if name in estimates
            else None
            for name in names
        }
        ends = {"vs baseline": gains.get(model["model"]), "of BF16": kept.get(model["model"])}
        rows.append({"model": model["model"], **scores, **ends})
    return rows
