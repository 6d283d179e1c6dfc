"""What MLflow recorded of the pipeline's lineage: models, runs, their inputs, by name or digest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import is_tracking_uri_set

from grace_core.artifacts import MANIFEST, OUTSIDE, QUANTIZED_START, Manifest
from grace_core.errors import GraceError
from grace_core.lineage.collect import manifest_node, outside_name
from grace_core.lineage.find import LEAST_DIGITS, starts_a_digest
from grace_core.lineage.graph import Node, Place
from operations.mlflow_names import (
    DATASET_DIGITS,
    DIGEST,
    INPUT,
    PUBLISHED,
    PUBLISHED_REVISION,
    STAGE,
    is_model,
)
from operations.servers import shown_address

_FINISHED = "attributes.status = 'FINISHED'"
_ROLES_OF_MODELS = (
    *("model", "student", "teacher", "start", QUANTIZED_START),
    *("release-bf16", "release-w8", "release-w4"),
)


class Records:
    """Questions to the tracking server, over all its experiments."""

    def __init__(self) -> None:
        if not is_tracking_uri_set():
            raise GraceError("MLFLOW_TRACKING_URI is not set; set it to the server's address")
        self._client = MlflowClient()
        self._manifests: dict[str, Manifest] = {}
        try:
            found = self._client.search_experiments()
        except MlflowException as error:
            raise GraceError(
                f"MLflow at {_address()} does not answer ({error}); set "
                "MLFLOW_TRACKING_URI to its address, or leave --mlflow out to read the files"
            ) from error
        self._experiments = [entry.experiment_id for entry in found]

    def model(self, name: str) -> LoggedModel:
        """The LoggedModel that a name, an id or digits mean."""
        wanted = name.removeprefix("models:/")
        if wanted.startswith("m-"):
            try:
                found = [self._client.get_logged_model(wanted)]
            except MlflowException as error:
                raise GraceError(f"MLflow has no model of the id {wanted}") from error
        elif starts_a_digest(wanted):
            found = self._models(f"tags.`{DIGEST}` LIKE '{wanted}%'")
        else:
            found = [self._registered(wanted)]
        # A BF16 release has the content of the trained model; the release is meant.
        released = [model for model in found if model.tags[STAGE].startswith("release-")]
        chosen = released or [model for model in found if model.source_run_id]
        if not chosen:
            raise GraceError(
                f"MLflow at {_address()} knows no model {name} that a run made; "
                "give a registered name, name@alias, a model's id (m-...) or digits of its digest"
            )
        if len({model.tags[DIGEST] for model in chosen}) > 1:
            listed = "".join(f"\n  {m.tags[STAGE]}  {m.tags[DIGEST]}" for m in chosen)
            raise GraceError(f"several digests start with {name}; give more digits:{listed}")
        return chosen[0]

    def released(self) -> list[LoggedModel]:
        """Every model that a release stage made, oldest first."""
        found = self._models(f"tags.`{STAGE}` LIKE 'release-%'")
        made = [model for model in found if model.source_run_id]
        return sorted(made, key=lambda model: model.creation_timestamp)

    def _registered(self, name: str) -> LoggedModel:
        base, _, alias = name.partition("@")
        try:
            if alias:
                version = self._client.get_model_version_by_alias(base, alias)
            else:
                versions = self._client.search_model_versions(f"name = '{base}'")
                if not versions:
                    raise GraceError(f"MLflow has no registered model {base}")
                version = max(versions, key=lambda entry: int(entry.version))
        except MlflowException as error:
            raise GraceError(f"MLflow has no registered model {name}: {error.message}") from error
        return self._client.get_logged_model(version.tags["grace.model_id"])

    def thing(self, digits: str) -> tuple[str, str]:
        """Stage and digest of what the digits of a digest stand for, made or from outside."""
        if not starts_a_digest(digits):
            raise GraceError(
                f"{digits} is no digest: give {LEAST_DIGITS} or more of its digits (0-9, a-f)"
            )
        found = {
            (run.data.tags[STAGE], run.data.tags[DIGEST])
            for run in self._runs(f"tags.`{DIGEST}` LIKE '{digits}%' and {_FINISHED}")
        }
        found |= {
            (model.tags[STAGE], model.tags[DIGEST])
            for model in self._models(f"tags.`{DIGEST}` LIKE '{digits}%'")
        }
        for run in self._runs(f"dataset.digest LIKE '{digits[:DATASET_DIGITS]}%'"):
            for tag, value in run.data.tags.items():
                stage, _, digest = value.partition(":")
                if tag.startswith(INPUT) and digest.startswith(digits):
                    found.add((stage, digest))
        if len({digest for _, digest in found}) > 1:
            listed = "".join(f"\n  {stage}  {digest}" for stage, digest in sorted(found))
            raise GraceError(f"several digests start with {digits}; give more digits:{listed}")
        if not found:
            raise GraceError(f"MLflow at {_address()} knows nothing of the digest {digits}")
        return sorted(found)[0]

    def users(self, stage: str, digest: str) -> list[Run]:
        """Finished runs that have this as an input."""
        if not is_model(stage):
            found = self._runs(f"dataset.digest = '{digest[:DATASET_DIGITS]}' and {_FINISHED}")
        else:
            # Runs cannot be searched by their model inputs; the tags say which to look at.
            tagged = (
                self._runs(f"tags.`{INPUT}{role}` = '{stage}:{digest}' and {_FINISHED}")
                for role in _ROLES_OF_MODELS
            )
            found = [run for runs in tagged for run in runs]
        unique = {run.info.run_id: run for run in found}.values()
        return [
            run
            for run in unique
            if any(parent.id == f"{stage}:{digest}" for _, parent in self.inputs(run))
        ]

    def run_of(self, model: LoggedModel) -> Run:
        return self._client.get_run(model.source_run_id)

    def maker(self, node: Node) -> Run | None:
        """The run that made a node; None where none was tracked."""
        if is_model(node.stage):
            query = f"tags.`{STAGE}` = '{node.stage}' and tags.`{DIGEST}` = '{node.digest}'"
            made = [model for model in self._models(query) if model.source_run_id]
            return self.run_of(made[0]) if made else None
        runs = self._runs(
            f"tags.`{STAGE}` = '{node.stage}' and tags.`{DIGEST}` = '{node.digest}' and {_FINISHED}"
        )
        return runs[0] if runs else None

    def inputs(self, run: Run) -> Iterator[tuple[str, Node]]:
        """Roles and nodes of a run's inputs, in the order of its manifest's roles."""
        whole = self._client.get_run(run.info.run_id)  # a search leaves model inputs out
        models = [
            self._client.get_logged_model(entry.model_id) for entry in whole.inputs.model_inputs
        ]
        by_id = {f"{m.tags[STAGE]}:{m.tags[DIGEST]}": m for m in models}
        data = [entry.dataset for entry in whole.inputs.dataset_inputs]
        for tag, value in whole.data.tags.items():
            if not tag.startswith(INPUT):
                continue
            stage, _, digest = value.partition(":")
            role = tag.removeprefix(INPUT)
            if value in by_id:
                yield role, _outside_or_gone(stage, digest, dict(by_id[value].tags))
            for entry in data:
                if entry.name == stage and digest.startswith(entry.digest):
                    path = json.loads(entry.source)["uri"]
                    yield role, _outside_or_gone(stage, digest, {"grace.path": path})

    def manifest(self, run: Run) -> Manifest:
        """The manifest that a stage's run holds."""
        if run.info.run_id not in self._manifests:
            address = f"runs:/{run.info.run_id}/{MANIFEST}"
            try:
                text = mlflow.artifacts.load_text(address)
            except (MlflowException, OSError) as error:
                raise GraceError(
                    f"{address} cannot be read ({error}); the artifact store of "
                    f"{_address()} must be reachable from here"
                ) from error
            self._manifests[run.info.run_id] = Manifest.model_validate_json(text)
        return self._manifests[run.info.run_id]

    def node(self, run: Run) -> Node:
        """The node of what a run made, as MLflow knows it."""
        tags = run.data.tags
        published = {
            role: Place(location=tags[f"{PUBLISHED}.{role}"], revision=tags[tag])
            for tag in tags
            if (role := tag.removeprefix(f"{PUBLISHED_REVISION}.")) != tag
        }
        return manifest_node(self.manifest(run), run.data.tags["grace.path"], published)

    def _models(self, query: str) -> list[LoggedModel]:
        return list(_pages(self._client.search_logged_models, self._experiments, query))

    def _runs(self, query: str) -> list[Run]:
        return list(_pages(self._client.search_runs, self._experiments, query))


def _address() -> str:
    """Of the tracking server, without a password."""
    return shown_address(mlflow.get_tracking_uri())


def _pages(search: Any, experiments: Iterable[str], query: str) -> Iterator[Any]:
    token = None
    while True:
        page = search(list(experiments), filter_string=query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _outside_or_gone(stage: str, digest: str, tags: dict[str, str]) -> Node:
    outside = stage in OUTSIDE
    path = tags["grace.path"]
    return Node(
        stage=stage,
        digest=digest,
        name=outside_name(stage, path) if outside else stage,
        present=outside,
        path=path,
        revision=tags.get("hf.revision"),
    )
