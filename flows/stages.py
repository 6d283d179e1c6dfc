"""Each stage as a flow of its own, to be deployed, scheduled and repeated alone.

A stage finds its inputs by asking the stages before it, which answer at once when they are done
and run when they are not.
"""

from __future__ import annotations

from prefect import flow

from flows.pipeline import (
    Models,
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
def data(config: str = DEFAULT, overrides: list[str] | None = None) -> StageRef:
    """Prepare the training data.

    Args:
        config: Configuration file, relative to the project root or absolute.
        overrides: Settings that replace the file's, each as dotted.key=value, as in seed=3.
    """
    settings = load_config(config, overrides or [])
    with tracked_flow(settings) as run:
        return training_data(settings, run)


@flow(name="grace-distill", persist_result=True, result_serializer="json")
def distill(config: str = DEFAULT, overrides: list[str] | None = None) -> StageRef:
    """Distil the BF16 student.

    Args:
        config: Configuration file, relative to the project root or absolute.
        overrides: Settings that replace the file's, each as dotted.key=value, as in seed=3.
    """
    settings = load_config(config, overrides or [])
    with tracked_flow(settings) as run:
        prepared = training_data(settings, run)
        teacher = fitted_teacher(settings, run, prepared)
        return distill_student(settings, run, prepared, teacher)


@flow(name="grace-quantize", persist_result=True, result_serializer="json")
def quantize(
    config: str = DEFAULT,
    overrides: list[str] | None = None,
    variants: list[Precision] | None = None,
) -> Models:
    """Train the quantized students.

    Args:
        config: Configuration file, relative to the project root or absolute.
        overrides: Settings that replace the file's, each as dotted.key=value, as in seed=3.
        variants: Which precisions to train; empty means those of the configuration.
    """
    switches = [f"quantize.variants=[{','.join(variants)}]"] if variants else []
    settings = load_config(config, [*(overrides or []), *switches])
    with tracked_flow(settings) as run:
        return trained_models(settings, run)


@flow(name="grace-release", persist_result=True, result_serializer="json")
def release(config: str = DEFAULT, overrides: list[str] | None = None) -> Models:
    """Write the models in the form that users load, and prove it exact.

    Args:
        config: Configuration file, relative to the project root or absolute.
        overrides: Settings that replace the file's, each as dotted.key=value, as in seed=3.
    """
    settings = load_config(config, overrides or [])
    with tracked_flow(settings) as run:
        return released_models(settings, run, trained_models(settings, run))


@flow(name="grace-evaluate", persist_result=True, result_serializer="json")
def evaluate(config: str = DEFAULT, overrides: list[str] | None = None) -> Models:
    """Score teacher, baseline and the releases.

    Args:
        config: Configuration file, relative to the project root or absolute.
        overrides: Settings that replace the file's, each as dotted.key=value, as in seed=3.
    """
    settings = load_config(config, overrides or [])
    with tracked_flow(settings) as run:
        models = trained_models(settings, run)
        releases = released_models(settings, run, models)
        return scores(settings, run, models.get("teacher"), releases)


@flow(name="grace-publish", persist_result=True, result_serializer="json")
def publish(config: str = DEFAULT, overrides: list[str] | None = None) -> StageRef:
    """Send the releases to their destination, with their results.

    Args:
        config: Configuration file, relative to the project root or absolute.
        overrides: Settings that replace the file's, each as dotted.key=value, as in seed=3.
    """
    settings = load_config(config, overrides or [])
    with tracked_flow(settings) as run:
        return published(settings, run)
