"""The model zoo as the MLflow server knows it: every released model with its recorded metrics."""

from __future__ import annotations

from mlflow.entities import LoggedModel

from grace_core.errors import GraceError
from grace_core.evaluation.benchmarks import BENCHMARKS
from grace_core.publish.zoo import Zoo, ZooModel, zoo_of
from operations.mlflow_lineage import lineage_in_mlflow
from operations.mlflow_names import DIGEST, PUBLISHED, STAGE
from operations.mlflow_records import Records


def zoo_in_mlflow() -> Zoo:
    """All releases of all experiments, each content once.

    Raises GraceError where the server does not answer or has none.
    """
    server = Records()
    models = {model.tags[DIGEST]: model for model in server.released()}
    if not models:
        raise GraceError("MLflow has no released model; run the pipeline with tracking first")
    return zoo_of((_model(server, model) for model in models.values()), "the MLflow registry")


def _model(server: Records, model: LoggedModel) -> ZooModel:
    manifest = server.manifest(server.run_of(model))
    config = manifest.run_config
    precision = model.tags[STAGE].removeprefix("release-")
    digest = model.tags[DIGEST]
    lineage = lineage_in_mlflow(digest)
    asked = config["evaluation"]["benchmarks"]  # earlier versions recorded names alone
    names = [entry["name"] if isinstance(entry, dict) else entry for entry in asked]
    scores: dict[str, float | None] = dict.fromkeys(names)
    scores |= {
        metric.key: metric.value for metric in model.metrics or [] if metric.key in BENCHMARKS
    }
    return ZooModel(
        name=lineage.node(lineage.models[0]).name,
        precision=precision,
        form="safetensors" if precision == "bf16" else "compressed-tensors",
        backbone=config["publish"]["base_model"],
        group_size=None if precision == "bf16" else config["quantize"]["group_size"],
        size=int(manifest.metrics["bytes"]),
        scores=scores,
        digest=digest,
        released=manifest.created,
        where=model.tags.get(PUBLISHED),
        lineage=lineage,
    )
