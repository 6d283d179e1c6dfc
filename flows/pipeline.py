"""The whole chain: data, teacher, BF16 student, quantized students, releases, scores, publication.

Tasks are called one after the other in the main thread: only there does a cancellation reach a
running training. Prefect takes the parameters' descriptions in the UI's form from the docstrings.
"""

from __future__ import annotations

from grace_core.config import GraceConfig, load_config
from tasks.approval import approval_needed, request_publication, require_publisher
from tasks.distill_student import distill_student
from tasks.fit_teacher import fit_teacher
from tasks.generate_world import generate_world
from tasks.guard import guarded_flow
from tasks.new_inputs import look_at_inputs, nothing_new, remember_inputs
from tasks.prepare_benchmarks import prepare_benchmarks
from tasks.prepare_data import prepare_data
from tasks.publish_models import publish_models, show_results
from tasks.quantize_student import quantize_student
from tasks.record_teacher import record_teacher
from tasks.release_model import release_model
from tasks.run_benchmarks import run_benchmarks
from tasks.tracked import StageRef, tracked_flow
from tasks.write_report import regression_gate, show_report, write_report

Models = dict[str, StageRef]


@guarded_flow("grace")
def grace(
    config: str = "configs/toy.yaml",
    overrides: list[str] | None = None,
    publish: bool = True,
    only_if_new: bool = False,
) -> StageRef:
    """Distil and quantize a vision-language model, and show what it cost and what it kept.

    Args:
        config: Configuration file, relative to the project root or absolute.
        overrides: Settings that replace the file's, each as dotted.key=value, as in seed=3.
        publish: Send the releases to their destination; scores come anyway.
        only_if_new: Work only if data or teacher changed since the last such run that completed.
    """
    given, unpublished = overrides or [], "publish.enabled=false"
    settings = load_config(config, given if publish else [*given, unpublished])
    inputs = look_at_inputs(settings) if only_if_new else None
    if inputs is not None and not inputs.is_new:
        return nothing_new(inputs)
    asks = approval_needed(settings)
    if asks:
        require_publisher(settings)
        settings = load_config(config, [*given, unpublished])
    with tracked_flow(settings) as run:
        result = published(settings, run, holds=settings.publish.enabled or asks)
        if asks:
            request_publication(run, config, given)
    if inputs is not None:
        remember_inputs(settings, inputs)
    return result


def training_data(settings: GraceConfig, run: str) -> StageRef:
    if settings.data.source.kind == "toy":
        generate_world(settings, run)
    return prepare_data(settings, run)


def fitted_teacher(settings: GraceConfig, run: str, data: StageRef) -> StageRef | None:
    """None: the teacher is taken as it is."""
    return fit_teacher(settings, run, data) if settings.teacher_fit else None


def teaching(
    settings: GraceConfig, run: str, data: StageRef, teacher: StageRef | None
) -> StageRef | None:
    """What students learn from: the teacher's recorded outputs, or the teacher itself."""
    return record_teacher(settings, run, data, teacher) if settings.records_teacher else teacher


def trained_models(settings: GraceConfig, run: str) -> Models:
    """By label: teacher where it was fitted, the BF16 student, and the configured variants."""
    data = training_data(settings, run)
    teacher = fitted_teacher(settings, run, data)
    taught_by = teaching(settings, run, data, teacher)
    students: Models = {}
    if "bf16" in settings.students:
        students["bf16"] = distill_student(settings, run, data, taught_by)
    bf16 = students.get("bf16")
    for precision in settings.quantize.variants:
        students[precision] = quantize_student(settings, run, precision, data, taught_by, bf16)
    return students if teacher is None else {"teacher": teacher, **students}


def released_models(settings: GraceConfig, run: str, models: Models) -> Models:
    students = {label: model for label, model in models.items() if label != "teacher"}
    return {label: release_model(settings, run, model) for label, model in students.items()}


def scores(settings: GraceConfig, run: str, teacher: StageRef | None, releases: Models) -> Models:
    """One evaluation a row of the results table; the baseline is the student before training."""
    rows: dict[str, StageRef | None] = {"teacher": teacher, "baseline": None, **releases}
    return {label: run_benchmarks(settings, run, label, model) for label, model in rows.items()}


def report_of(settings: GraceConfig, run: str, evaluations: Models) -> StageRef:
    report = write_report(settings, run, evaluations)
    show_report(settings, run, report)
    return report


def published(settings: GraceConfig, run: str, *, holds: bool) -> StageRef:
    """holds: whether the regression gate ends the run where a model falls short."""
    prepare_benchmarks(settings, run)
    models = trained_models(settings, run)
    releases = released_models(settings, run, models)
    evaluations = scores(settings, run, models.get("teacher"), releases)
    report = report_of(settings, run, evaluations)
    regression_gate(run, report, holds=holds)
    result = publish_models(settings, run, releases, evaluations)
    show_results(settings, run, result)
    return result
