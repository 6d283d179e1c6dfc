"""What must hold after every attempt and after every round, whatever happened in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from grace_core.artifacts import MANIFEST, digest_folder, find_artifact, verify_artifact
from grace_core.errors import GraceError
from grace_core.publish.directory import read_directory_index
from tests.chaos.view import TRAININGS, artifacts

_STAGE_RUN = "grace.stage_run."
"""Tags of a flow run's MLflow run that name those of its stages."""

_OTHER_EACH_TIME = ("seconds", "per_second", "memory", "progress/", "resume/")
"""Parts of the names of metrics that a disturbed run need not share with an undisturbed one."""

Series = dict[str, list[tuple[int, float]]]
"""Step and value of every metric of an MLflow run, by its name."""

_CARD_FILES = {"README.md", "grace_manifest.json", "lineage.svg"}  # what publishing adds


@dataclass(frozen=True)
class Outcome:
    """What an undisturbed run leaves, to compare with."""

    digests: dict[str, str]
    """Content digest of each artifact that holds weights, by stage."""

    published: dict[str, dict[str, bytes]]
    """Weight files of each published model, by its name."""

    metrics: dict[str, Series]
    """What MLflow has of each stage."""

    times_finished: Counter[str]
    """How many finished MLflow runs of each stage these flow runs left."""


def outcome(run_dir: Path, mlflow: str, flow_run_ids: list[str]) -> Outcome:
    """Of a round, which took these flow runs; the last one was completed."""
    found = [artifact for folder in artifacts(run_dir) if (artifact := find_artifact(folder))]
    return Outcome(
        digests={
            item.manifest.stage: item.digest
            for item in found
            if item.manifest.stage in TRAININGS or item.manifest.stage.startswith("release-")
        },
        published={
            folder.name: {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
            for folder in _published(run_dir)
        },
        metrics=_metrics(mlflow, flow_run_ids[-1]),
        times_finished=_times_finished(mlflow, flow_run_ids),
    )


def half_written(run_dir: Path) -> Iterator[str]:
    """Whatever bears a final name without being whole."""
    for folder in artifacts(run_dir):
        artifact = find_artifact(folder)
        if artifact is None:
            yield f"{folder.name} has no {MANIFEST}"
            continue
        try:
            verify_artifact(artifact)
        except GraceError as error:
            yield str(error)
    for folder in _published(run_dir):
        missing = _CARD_FILES - {file.name for file in folder.iterdir()}
        if missing or not list(folder.glob("*.safetensors")):
            yield f"published {folder.name} lacks {sorted(missing) or 'its weights'}"
    index = read_directory_index(run_dir / "releases")
    for model in index.models.values() if index else ():
        folder = run_dir / "releases" / model.repository
        if not folder.is_dir() or digest_folder(folder) != model.digest:
            yield f"published {model.repository} is not what the release index says"


def _published(run_dir: Path) -> list[Path]:
    """Folders of published models."""
    return sorted(path for path in (run_dir / "releases").glob("[!.]*") if path.is_dir())


def differences(reference: Outcome, found: Outcome, damaged: Mapping[str, int]) -> Iterator[str]:
    """Where a round's outcome is not that of the undisturbed run, to the bit.

    damaged: how often a stage's artifact was damaged, and so made again.
    """
    for stage, digest in reference.digests.items():
        if found.digests.get(stage) != digest:
            yield f"{stage} is {found.digests.get(stage, 'absent')[:12]}, not {digest[:12]}"
    for name, files in reference.published.items():
        if found.published.get(name) != files:
            yield f"the published weights of {name} differ"
    for stage, expected in reference.metrics.items():
        series = found.metrics.get(stage)
        if series is None:
            yield f"MLflow has no finished run of {stage}"
            continue
        for name in sorted(expected.keys() | series.keys()):
            if series.get(name) != expected.get(name):
                told = f"{series.get(name)}, not {expected.get(name)}"
                yield f"metrics of {stage}: {name} is {told}"
    for stage, times in found.times_finished.items():
        if times > 1 + damaged.get(stage, 0):
            yield f"MLflow has {times} finished runs of {stage}"


def open_runs(mlflow: str, flow_run_ids: list[str]) -> Iterator[str]:
    """MLflow runs that are still RUNNING although their flow runs are over."""
    for run in _runs(MlflowClient(mlflow), flow_run_ids):
        if run.info.status == "RUNNING":
            yield f"MLflow run {run.data.tags.get('grace.stage')} is still RUNNING"


def _runs(client: MlflowClient, flow_run_ids: list[str]) -> list[Run]:
    experiment = client.get_experiment_by_name("chaos")
    found = client.search_runs([experiment.experiment_id], max_results=5000)
    return [run for run in found if run.data.tags.get("prefect.flow_run_id") in flow_run_ids]


def _metrics(mlflow: str, flow_run_id: str) -> dict[str, Series]:
    """Of the finished MLflow runs that a completed flow run's own names for its stages."""
    client = MlflowClient(mlflow)
    (parent,) = (
        run for run in _runs(client, [flow_run_id]) if run.data.tags.get("grace.stage") == "flow"
    )
    found = {}
    for tag, run_id in parent.data.tags.items():
        if not tag.startswith(_STAGE_RUN):
            continue
        run = client.get_run(run_id)
        if run.info.status == "FINISHED":
            names = [
                name
                for name in run.data.metrics
                if not any(part in name for part in _OTHER_EACH_TIME)
            ]
            found[tag.removeprefix(_STAGE_RUN)] = {
                name: sorted(
                    (metric.step, metric.value)
                    for metric in client.get_metric_history(run_id, name)
                )
                for name in names
            }
    return found


def _times_finished(mlflow: str, flow_run_ids: list[str]) -> Counter[str]:
    return Counter(
        run.data.tags["grace.stage"]
        for run in _runs(MlflowClient(mlflow), flow_run_ids)
        if run.info.status == "FINISHED" and run.data.tags.get("grace.stage") not in (None, "flow")
    )
