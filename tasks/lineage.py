"""What was made from what, in MLflow's own terms.

Models, as trained and as released, are external LoggedModels (weights stay where they are): output
of the run that made them, input of every run that used them. All else (data, benchmarks, a
tokenizer, the scores that a publication quotes) is a data set under our content digest. So from any
model one walks `source_run_id` -> the run's model and data set inputs -> their runs, and so on;
`operations.mlflow_lineage` does. What is an input of what comes from the artifact manifests, never
from a second record; MLflow keeps no role of an input, so the run's tag `grace.input.<role>` does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

import mlflow
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelInput,
    LoggedModelOutput,
    Metric,
    RunTag,
)
from mlflow.exceptions import MlflowException

from grace_core.artifacts import Artifact, Parent
from grace_core.lineage.collect import node_of, outside_name
from operations.mlflow_names import (
    DATASET_DIGITS,
    DIGEST,
    INPUT,
    PUBLISHED,
    PUBLISHED_REVISION,
    STAGE,
    is_model,
)

_SHOWN = 10  # characters of an id in the ancestry table
CANDIDATE = "candidate"  # registry alias of the newest release; `champion` is for people to set


def dataset(name: str, digest: str, path: str) -> Dataset:
    """A data set by our digest; MLflow's own digest would not see lists, structs and pictures."""
    return Dataset(name, digest[:DATASET_DIGITS], "local", json.dumps({"uri": path}))


def find_model(experiment_id: str, stage: str, digest: str) -> LoggedModel | None:
    """The LoggedModel of what a stage made; None where there is none.

    stage: `checkpoint` for a model from outside. A BF16 student and its release may have the same
    content and are two models.
    """
    found = MlflowClient().search_logged_models(
        [experiment_id],
        filter_string=f"tags.`{STAGE}` = '{stage}' and tags.`{DIGEST}` = '{digest}'",
        max_results=1,
    )
    return found[0] if found else None


def add_model(experiment_id: str, run_id: str, artifact: Artifact) -> str:
    """Record `artifact` as a model that `run_id` made; returns the model's id.

    Done again after an outage, the record that is there stays the only one.
    """
    manifest = artifact.manifest
    found = find_model(experiment_id, manifest.stage, manifest.digest)
    if found is not None and found.source_run_id == run_id:
        return str(found.model_id)
    model = mlflow.create_external_model(
        name=manifest.stage,
        source_run_id=run_id,
        model_type="grace",
        experiment_id=experiment_id,
        tags={
            STAGE: manifest.stage,
            DIGEST: manifest.digest,
            "grace.fingerprint": manifest.fingerprint,
            "grace.config_digest": manifest.config_digest,
            "grace.path": str(artifact.path.absolute()),
        },
    )
    MlflowClient().log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return str(model.model_id)


def link_inputs(experiment_id: str, run_id: str, artifact: Artifact) -> None:
    """Record every parent of `artifact` as an input of the run that made it."""
    datasets, models, tags = [], [], []
    for role, parent in artifact.manifest.parents.items():
        if is_model(parent.kind):
            models.append(LoggedModelInput(_model_of(experiment_id, role, parent)))
        else:
            tag = InputTag("mlflow.data.context", role)
            entry = dataset(parent.kind, parent.digest, parent.path)
            datasets.append(DatasetInput(entry, [tag]))
        tags.append(RunTag(f"{INPUT}{role}", f"{parent.kind}:{parent.digest}"))
    if tags:
        client = MlflowClient()
        client.log_inputs(run_id, datasets=datasets, models=models)
        client.log_batch(run_id, tags=tags)


def _model_of(experiment_id: str, role: str, parent: Parent) -> str:
    """Id of a parent's model; one that came from outside gets its record when first used."""
    found = find_model(experiment_id, parent.kind, parent.digest)
    if found is None:
        tags = {STAGE: parent.kind, DIGEST: parent.digest}
        tags |= {"grace.path": parent.path, "grace.role": role}
        if parent.revision is not None:
            repository = outside_name(parent.kind, parent.path)
            tags |= {"hf.repo": repository, "hf.revision": parent.revision}
        found = mlflow.create_external_model(
            name=role, model_type="grace", experiment_id=experiment_id, tags=tags
        )
    return str(found.model_id)


def register_release(name: str, model_id: str, release: Artifact) -> str:
    """Enter a released model in the registry under the alias `candidate`; returns its version.

    A model that is registered already keeps its version. The version carries the model's id as a
    tag because the open-source server does not return the `model_id` it is given.
    """
    client = MlflowClient()
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(DIGEST) == release.digest:
            number = str(version.version)
            break
    else:
        created = client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=client.get_logged_model(model_id).source_run_id,
            model_id=model_id,
            tags={
                "grace.model_id": model_id,
                DIGEST: release.digest,
                "grace.path": str(release.path.absolute()),
            },
            await_creation_for=0,
        )
        number = str(created.version)
    client.set_registered_model_alias(name, CANDIDATE, number)
    return number


def mark_published(run_id: str, publication: Artifact) -> None:
    """Say on the run, on every published model and on its registered versions where it went."""
    client = MlflowClient()
    experiment_id = client.get_run(run_id).info.experiment_id
    for role, place in node_of(publication).published.items():
        release = publication.manifest.parents[role]
        model = find_model(experiment_id, release.kind, release.digest)
        assert model is not None, "a publication's inputs are linked before this"
        tags = {PUBLISHED: place.location, PUBLISHED_REVISION: place.revision}
        if place.location.startswith("http"):
            owner_and_name = place.location.split("/")[-2:]
            tags |= {"hf.repo": "/".join(owner_and_name), "hf.commit": place.revision}
        client.set_logged_model_tags(model.model_id, tags)
        client.set_tag(run_id, f"{PUBLISHED}.{role}", place.location)
        client.set_tag(run_id, f"{PUBLISHED_REVISION}.{role}", place.revision)
        for version in client.search_model_versions(f"tags.`grace.model_id` = '{model.model_id}'"):
            for key, value in tags.items():
                client.set_model_version_tag(version.name, version.version, key, value)


def log_scores(run_id: str, evaluation: Artifact) -> None:
    """Put an evaluation's metrics on the model that was scored, with the data they are about."""
    client = MlflowClient()
    inputs = client.get_run(run_id).inputs
    moment = round(datetime.fromisoformat(evaluation.manifest.created).timestamp() * 1000)
    data = {entry.tags[0].value: entry.dataset for entry in inputs.dataset_inputs}  # by role
    metrics = []
    for name, value in evaluation.manifest.metrics.items():
        scored_on = data["held_out" if name == "held_out_loss" else "benchmarks"]
        metrics += [
            Metric(
                name,
                value,
                moment,
                step=0,
                model_id=model.model_id,
                dataset_name=scored_on.name,
                dataset_digest=scored_on.digest,
            )
            for model in inputs.model_inputs
        ]
    client.log_batch(run_id, metrics=metrics)


def ancestry_table(run_ids: Sequence[str]) -> str:
    """Markdown table of what these runs made from what, oldest first, read back from MLflow.

    Ids and digests are cut to what tells them apart.
    """
    client = MlflowClient()
    runs = sorted(
        (client.get_run(run_id) for run_id in run_ids), key=lambda run: int(run.info.start_time)
    )
    rows = ["| stage | made | from data | from models | MLflow run |", "|---|---|---|---|---|"]
    for run in runs:
        made = [_model_name(client, entry.model_id) for entry in run.outputs.model_outputs]
        models = [_model_name(client, entry.model_id) for entry in run.inputs.model_inputs]
        data = [
            f"{entry.dataset.name} `{entry.dataset.digest[:_SHOWN]}`"
            for entry in run.inputs.dataset_inputs
        ]
        cells = [
            run.data.tags["grace.stage"],
            ", ".join(made) or f"`{run.data.tags['grace.digest'][:_SHOWN]}`",
            ", ".join(data) or "-",
            ", ".join(models) or "-",
            f"`{run.info.run_id[:_SHOWN]}`",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _model_name(client: MlflowClient, model_id: str) -> str:
    return f"{client.get_logged_model(model_id).name} `{model_id[:_SHOWN]}`"
