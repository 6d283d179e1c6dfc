"""Each stage as a flow of its own, to be deployed, scheduled and repeated alone.

A stage finds its inputs by asking the stages before it, which answer at once when they are done
and run when they are not.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flows.pipeline import (
    Models,
    fitted_teacher,
    released_models,
    report_of,
    scores,
    teaching,
    trained_models,
    training_data,
)
from grace_core.config import load_config
from grace_core.config.training import Precision
from tasks.approval import decide, rejected
from tasks.distill_student import distill_student
from tasks.guard import guarded_flow
from tasks.prepare_benchmarks import prepare_benchmarks
from tasks.publish_models import publish_models, show_results
from tasks.tracked import StageRef, finished_stages_only, tracked_flow
from tasks.write_report import regression_gate

DEFAULT = "configs/toy.yaml"


@guarded_flow("grace-data")
def data(config: str = DEFAULT, overrides: list[str] | None = None) -> StageRef:
    """Prepare the training data.

    Args:
        config: Configuration file, relative to the project root or absolute.
        overrides: Settings that replace the file's, each as dotted.key=value, as in seed=3.
    """
    settings = load_config(config, overrides or [])
    with tracked_flow(settings, "data") as run:
        return training_data(settings, run)


@guarded_flow("grace-distill")
def distill(config: str = DEFAULT, overrides: list[str] | None = None) -> StageRef:
    """Distil the BF16 student.

    Args:
        config: Configuration file, relative to the project root or absolute.
        overrides: Settings that replace the file's, each as dotted.key=value, as in seed=3.
    """
    settings = load_config(config, overrides or [])
    with tracked_flow(settings, "distill") as run:
        prepared = training_data(settings, run)
        teacher = fitted_teacher(settings, run, prepared)
        taught_by = teaching(settings, run, prepared, teacher)
        return distill_student(settings, run, prepared, taught_by)


@guarded_flow("grace-quantize")
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
    with tracked_flow(settings, "quantize") as run:
        return trained_models(settings, run)


@guarded_flow("grace-release")
def release(config: str = DEFAULT, overrides: list[str] | None = None) -> Models:
    """Write the models in the form that users load, and prove it exact.

    Args:
        config: Configuration file, relative to the project root or absolute.
        overrides: Settings that replace the file's, each as dotted.key=value, as in seed=3.
    """
    settings = load_config(config, overrides or [])
    with tracked_flow(settings, "release") as run:
        return released_models(settings, run, trained_models(settings, run))


@guarded_flow("grace-evaluate")
def evaluate(config: str = DEFAULT, overrides: list[str] | None = None) -> Models:
    """Score teacher, baseline and the releases.

    Args:
        config: Configuration file, relative to the project root or absolute.
        overrides: Settings that replace the file's, each as dotted.key=value, as in seed=3.
    """
    settings = load_config(config, overrides or [])
    with tracked_flow(settings, "evaluate") as run:
        prepare_benchmarks(settings, run)
        models = trained_models(settings, run)
        releases = released_models(settings, run, models)
        evaluations = scores(settings, run, models.get("teacher"), releases)
        report_of(settings, run, evaluations)
        return evaluations


@guarded_flow("grace-publish")
def publish(
    config: str = DEFAULT,
    overrides: list[str] | None = None,
    ask: bool = True,
    days: Annotated[float, Field(gt=0)] = 7.0,
) -> StageRef:
    """Send finished releases to their destination, with their results, once a person agrees.

    Nothing is trained here: a stage that is not done is an error.

    Args:
        config: Configuration file, relative to the project root or absolute.
        overrides: Settings that replace the file's, each as dotted.key=value, as in seed=3.
        ask: Wait for a person, who sees the results and a form; off, it publishes at once.
        days: How long to wait for that person; then the run fails and nothing is published.
    """
    settings = load_config(config, overrides or [])
    with tracked_flow(settings, "publish") as run:
        with finished_stages_only():
            prepare_benchmarks(settings, run)
            models = trained_models(settings, run)
            releases = released_models(settings, run, models)
            evaluations = scores(settings, run, models.get("teacher"), releases)
        report = report_of(settings, run, evaluations)
        regression_gate(run, report, holds=settings.publish.enabled)
        agreed, approval = decide(settings, run, releases, evaluations, ask=ask, days=days)
        if not agreed:
            return rejected(approval)
        result = publish_models(settings, run, releases, evaluations, approval)
        show_results(settings, run, result)
        return result
