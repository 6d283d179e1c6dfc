"""Each stage as a flow of its own, to be deployed, scheduled and repeated alone.

A stage finds its inputs by asking the stages before it, which answer at once when they are done
and run when they are not.
"""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.pipeline import (
    ConfigPath,
    Models,
    Overrides,
    fitted_teacher,
    published,
    released_models,
    scores,
    trained_models,
    training_data,
)
from grace_core.config import load_config
from grace_core.config.model import Precision
from tasks.distill_student import distill_student
from tasks.tracked import StageRef, tracked_flow

DEFAULT = "configs/toy.yaml"


@flow(name="grace-data", persist_result=True, result_serializer="json")
def data(config: ConfigPath = DEFAULT, overrides: Overrides = None) -> StageRef:
    """Prepare the training data."""
    settings = load_config(config, overrides or [])
    with tracked_flow(settings) as run:
        return training_data(settings, run)


@flow(name="grace-distill", persist_result=True, result_serializer="json")
def distill(config: ConfigPath = DEFAULT, overrides: Overrides = None) -> StageRef:
    """Distil the BF16 student."""
    settings = load_config(config, overrides or [])
    with tracked_flow(settings) as run:
        prepared = training_data(settings, run)
        teacher = fitted_teacher(settings, run, prepared)
        return distill_student(settings, run, prepared, teacher)


@flow(name="grace-quantize", persist_result=True, result_serializer="json")
def quantize(
    config: ConfigPath = DEFAULT,
    overrides: Overrides = None,
    variants: Annotated[
        list[Precision] | None,
        Field(description="Which precisions to train; empty means those of the configuration."),
    ] = None,
) -> Models:
    """Train the quantized students."""
    switches = [f"quantize.variants=[{','.join(variants)}]"] if variants else []
    settings = load_config(config, [*(overrides or []), *switches])
    with tracked_flow(settings) as run:
        return trained_models(settings, run)


@flow(name="grace-release", persist_result=True, result_serializer="json")
def release(config: ConfigPath = DEFAULT, overrides: Overrides = None) -> Models:
    """Write the models in the form that users load, and prove it exact."""
    settings = load_config(config, overrides or [])
    with tracked_flow(settings) as run:
        return released_models(settings, run, trained_models(settings, run))


@flow(name="grace-evaluate", persist_result=True, result_serializer="json")
def evaluate(config: ConfigPath = DEFAULT, overrides: Overrides = None) -> Models:
    """Score teacher, baseline and the releases."""
    settings = load_config(config, overrides or [])
    with tracked_flow(settings) as run:
        models = trained_models(settings, run)
        releases = released_models(settings, run, models)
        return scores(settings, run, models.get("teacher"), releases)


@flow(name="grace-publish", persist_result=True, result_serializer="json")
def publish(config: ConfigPath = DEFAULT, overrides: Overrides = None) -> StageRef:
    """Send the releases to their destination, with their results."""
    settings = load_config(config, overrides or [])
    with tracked_flow(settings) as run:
        return published(settings, run)
