"""The stages of the pipeline, each a function from configuration and artifacts to an artifact.

A stage first looks whether its artifact exists (same configuration section, same parents, same
package version) and returns it at once. Otherwise it works, and the artifact's directory gets its
name only when everything in it is whole. Prefect tasks and the command line call the same
functions; nothing here knows either.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grace_core.artifacts import (
    Artifact,
    ArtifactWriter,
    Parent,
    digest_folder,
    find_artifact,
    fingerprint,
    new_artifact,
)
from grace_core.config.load import require_environment
from grace_core.config.model import (
    CheckpointSource,
    GraceConfig,
    Precision,
    Quantization,
    ShareGPT4VData,
    ToyData,
    TrainingStage,
)
from grace_core.data.prepare import HELD_OUT, TRAIN, PreparationReport, prepare
from grace_core.data.sharegpt4v import read_records
from grace_core.errors import GraceError
from grace_core.evaluation.benchmarks import load_benchmark
from grace_core.evaluation.generate import generate_answers
from grace_core.evaluation.held_out import held_out_loss
from grace_core.evaluation.score import score
from grace_core.events import Event, EventReader, truncate_after
from grace_core.export.compressed import export_bf16, export_compressed
from grace_core.export.exactness import check_release
from grace_core.export.gate_batches import gate_batches
from grace_core.launch import run_process_group, torchrun_command
from grace_core.models.loading import (
    CheckpointFolder,
    check_pair,
    load_image_processor,
    load_model,
    load_tokenizer,
    locate_checkpoint,
    read_checkpoint,
)
from grace_core.models.visual_inputs import VisualInputs
from grace_core.publish.release_set import publish_releases
from grace_core.quantization.checkpoint import is_quantized
from grace_core.toy.world import write_benchmark, write_training_set
from grace_core.training.job import TrainingJob
from grace_core.training.saved import Layout, latest_checkpoint, sha256_of

BENCHMARK_SEED = 1
"""The toy benchmark is the same for every run, whatever the run's own seed."""


def _ignore(_event: Event) -> None:
    """Events go nowhere."""


@dataclass(frozen=True)
class StageContext:
    """Where a stage reports to while it runs."""

    on_event: Callable[[Event], None] = _ignore


def stage_folder(config: GraceConfig, stage: str, key: str) -> Path:
    """Directory of the artifact that `stage` makes under the fingerprint `key`."""
    return config.run_dir / "artifacts" / f"{stage}-{key[:12]}"


def generate_world(config: GraceConfig, context: StageContext) -> Artifact:
    """Stage `world`: generated pictures and conversations in ShareGPT4V's schema."""
    source = config.data.source
    assert isinstance(source, ToyData), "only toy data are generated"
    section = {**source.model_dump(mode="json"), "seed": config.seed}

    def make(writer: ArtifactWriter) -> None:
        write_training_set(
            writer.path,
            count=source.records,
            seed=config.seed,
            wrong_answer_share=source.wrong_answer_share,
        )

    return _once(config, "world", section, {}, make)


def generate_benchmarks(config: GraceConfig, context: StageContext) -> Artifact:
    """Stage `benchmarks`: the held-out toy benchmark, the same for every run."""
    section = {"seed": BENCHMARK_SEED}

    def make(writer: ArtifactWriter) -> None:
        write_benchmark(writer.path, seed=BENCHMARK_SEED)

    return _once(config, "benchmarks", section, {}, make)


def prepare_data(config: GraceConfig, context: StageContext) -> Artifact:
    """Stage `data`: conversations and pictures as tokenized samples, bad records in quarantine."""
    student = locate_checkpoint(config.models.student)
    check_pair(locate_checkpoint(config.models.teacher), student)
    data = config.data
    parents = {"tokenizer": _tokenizer_parent(student)}
    if isinstance(data.source, ShareGPT4VData):
        root, files = _sharegpt4v_files(data.source)
        parents["annotations"] = _annotations_parent(files)
        limit = data.source.limit
    else:
        world = generate_world(config, context)
        root, files, limit = world.path, [world.path / "train.json"], None
        parents["world"] = world.as_parent()
    section = {**data.model_dump(mode="json"), "seed": config.seed}

    def make(writer: ArtifactWriter) -> None:
        visual = VisualInputs(student, min_pixels=data.min_pixels, max_pixels=data.max_pixels)

        def report(counts: PreparationReport) -> None:
            context.on_event(_event("data", counts.records, _counts(counts)))

        counts = prepare(
            (record for record in read_records(files) if limit is None or record.index < limit),
            root=root,
            tokenizer=load_tokenizer(student.path),
            image_token_id=student.image_token_id,
            picture_tokens=visual.grid_and_tokens,
            max_tokens=data.max_tokens,
            max_decoded_pixels=data.max_decoded_pixels,
            held_out_share=data.held_out_share,
            seed=config.seed,
            out=writer.path,
            on_progress=report,
        )
        writer.metrics |= _counts(counts)
        writer.facts["quarantined"] = counts.reasons

    return _once(config, "data", section, parents, make)


def fit_teacher(config: GraceConfig, data: Artifact, context: StageContext) -> Artifact:
    """Stage `teacher`: the teacher is fitted to the data with cross-entropy alone."""
    assert config.teacher_fit is not None, "the configuration fits no teacher"
    start = locate_checkpoint(config.models.teacher)
    parents = {"start": _checkpoint_parent(start), "data": data.as_parent()}
    return _train(config, "teacher", config.teacher_fit, start, None, data, parents, context)


def distill(
    config: GraceConfig, data: Artifact, teacher: Artifact | None, context: StageContext
) -> Artifact:
    """Stage `bf16`: the student learns from the teacher in BF16.

    teacher: the fitted teacher, or None for the checkpoint that the configuration names.
    """
    start = locate_checkpoint(config.models.student)
    parents = {"student": _checkpoint_parent(start), "data": data.as_parent()}
    folder = None
    if config.distill.objective.needs_teacher:
        folder, parents["teacher"] = _teacher(config, teacher)
    return _train(config, "bf16", config.distill, start, folder, data, parents, context)


def quantize(
    config: GraceConfig,
    precision: Precision,
    data: Artifact,
    teacher: Artifact | None,
    bf16: Artifact,
    context: StageContext,
) -> Artifact:
    """Stages `w8` and `w4`: the BF16 student is trained on with its weights quantized."""
    start = read_checkpoint(bf16.path / "model")
    parents = {"student": bf16.as_parent(), "data": data.as_parent()}
    folder = None
    if config.quantize.objective.needs_teacher:
        folder, parents["teacher"] = _teacher(config, teacher)
    return _train(
        config, precision, config.quantize, start, folder, data, parents, context, precision
    )


def release(config: GraceConfig, model: Artifact, context: StageContext) -> Artifact:
    """Stages `release-*`: the form that users load, proven equal to what was trained."""
    stage = f"release-{model.manifest.stage}"

    def make(writer: ArtifactWriter) -> None:
        source, destination = model.path / "model", writer.path / "model"
        (export_compressed if is_quantized(source) else export_bf16)(source, destination)
        folder = read_checkpoint(source)
        report = check_release(
            source,
            destination,
            gate_batches(load_tokenizer(source), VisualInputs(folder)),
            device=evaluation_device(config),
        )
        size = sum(file.stat().st_size for file in destination.rglob("*") if file.is_file())
        writer.metrics["bytes"] = float(size)
        writer.facts["exactness"] = vars(report)

    return _once(config, stage, {}, {"model": model.as_parent()}, make)


def evaluate(
    config: GraceConfig, label: str, model: Artifact | None, context: StageContext
) -> Artifact:
    """Stages `evaluate-*`: one row of the results table, on the files as they lie on disk.

    label: teacher, baseline, bf16, w8 or w4; model: a release (or the fitted teacher), or None for
    the checkpoint that the configuration names.
    """
    stage = f"evaluate-{label}"
    if model is not None:
        folder, parent = read_checkpoint(model.path / "model"), model.as_parent()
    else:
        sources = {"teacher": config.models.teacher, "baseline": config.models.student}
        folder = locate_checkpoint(sources[label])
        parent = _checkpoint_parent(folder)
    benchmarks = generate_benchmarks(config, context)
    parents = {"model": parent, "benchmarks": benchmarks.as_parent()}
    data: Artifact | None = None
    if config.data.held_out_share > 0:
        data = prepare_data(config, context)
        parents["held_out"] = data.as_parent()
    section = config.evaluation.model_dump(mode="json", exclude={"batch_size"})

    def make(writer: ArtifactWriter) -> None:
        _evaluate(config, label, folder, benchmarks, data, writer, context)

    return _once(config, stage, section, parents, make)


def publish(
    config: GraceConfig,
    releases: Mapping[str, Artifact],
    evaluations: Mapping[str, Artifact],
    context: StageContext,
) -> Artifact:
    """Stage `publish`: the results table, and the releases with their cards at the destination.

    Both mappings are by label. Where publishing is switched off, the table is all there is.
    """
    parents = {f"release-{label}": item.as_parent() for label, item in releases.items()}
    parents |= {f"evaluate-{label}": item.as_parent() for label, item in evaluations.items()}
    section = config.publish.model_dump(mode="json")

    def make(writer: ArtifactWriter) -> None:
        publish_releases(config, releases, evaluations, writer.path)

    found = _once(config, "publish", section, parents, make)
    destinations = json.loads((found.path / "releases.json").read_text(encoding="utf-8"))
    lost = [place for place in destinations.values() if _is_missing(place["location"])]
    if lost:
        shutil.rmtree(found.path)
        found = _once(config, "publish", section, parents, make)
    return found


def evaluation_device(config: GraceConfig) -> torch.device:
    """Where this process computes: the configured device, or a GPU when there is one."""
    if config.launch.device == "cuda" and not torch.cuda.is_available():
        raise GraceError("launch.device is cuda, but torch sees no GPU; set it to cpu or auto")
    if config.launch.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def _once(
    config: GraceConfig,
    stage: str,
    section: Mapping[str, Any],
    parents: Mapping[str, Parent],
    make: Callable[[ArtifactWriter], None],
) -> Artifact:
    """The stage's artifact: found, or made."""
    folder = stage_folder(config, stage, fingerprint(stage, section, parents))
    found = find_artifact(folder)
    if found is not None:
        return found
    with new_artifact(folder, stage, section, parents) as writer:
        make(writer)
    made = find_artifact(folder)
    assert made is not None
    return made


def _train(
    config: GraceConfig,
    stage: str,
    section: TrainingStage,
    student: CheckpointFolder,
    teacher: CheckpointFolder | None,
    data: Artifact,
    parents: Mapping[str, Parent],
    context: StageContext,
    precision: Precision | None = None,
) -> Artifact:
    settings = {
        "training": section.training.model_dump(mode="json"),
        "objective": section.objective.model_dump(mode="json"),
        "seed": config.seed,
        "pixels": [config.data.min_pixels, config.data.max_pixels],
    }
    if isinstance(section, Quantization):
        settings |= {"precision": precision, "group_size": section.group_size}
    key = fingerprint(stage, settings, parents)
    job = TrainingJob(
        stage=stage,
        seed=config.seed,
        training=section.training,
        objective=section.objective,
        student=student.path,
        teacher=None if teacher is None else teacher.path,
        data=data.path / TRAIN,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        precision=precision,
        group_size=config.quantize.group_size,
        device=config.launch.device,
        grace_seconds=config.launch.grace_seconds,
        work=config.run_dir / "work" / f"{stage}-{key[:12]}",
    )

    def make(writer: ArtifactWriter) -> None:
        if not job.result.is_dir():
            _run_job(config, job, context)
        _link_tree(job.result, writer.path / "model")

    made = _once(config, stage, settings, parents, make)
    for leftover in (job.result, job.checkpoints):
        shutil.rmtree(leftover, ignore_errors=True)  # metrics and logs stay
    return made


def _run_job(config: GraceConfig, job: TrainingJob, context: StageContext) -> None:
    """Run a training job as a process group, passing its events on."""
    launch = config.launch
    job.work.mkdir(parents=True, exist_ok=True)
    file = job.work / "job.json"
    file.write_text(job.model_dump_json(indent=1), encoding="utf-8")
    logs = job.work / "logs"
    layout = Layout(launch.processes, job.training.zero_stage)
    saved = latest_checkpoint(job.checkpoints, layout)
    truncate_after(job.metrics, 0 if saved is None else saved.step)
    events = EventReader(job.metrics)

    def forward() -> None:
        for event in events.poll():
            context.on_event(event)

    run_process_group(
        torchrun_command(
            "grace_core.training.worker",
            [str(file)],
            processes=launch.processes,
            log_folder=logs,
        ),
        stage=job.stage,
        env={
            **{name: value for name, value in os.environ.items() if name != "HF_TOKEN"},
            "OMP_NUM_THREADS": str(launch.threads_per_process),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        },
        log_folder=logs,
        grace_seconds=launch.grace_seconds,
        timeout_seconds=None if launch.timeout_hours is None else 3600 * launch.timeout_hours,
        on_poll=forward,
    )
    if not job.result.is_dir():
        raise GraceError(
            f"stage {job.stage} was stopped before its last step; run again to continue from its "
            f"last checkpoint in {job.checkpoints}"
        )


def _evaluate(
    config: GraceConfig,
    label: str,
    folder: CheckpointFolder,
    benchmarks: Artifact,
    data: Artifact | None,
    writer: ArtifactWriter,
    context: StageContext,
) -> None:
    settings = config.evaluation
    device = evaluation_device(config)
    model = load_model(folder, device=device)
    tokenizer = load_tokenizer(folder.path)
    visual = VisualInputs(folder)
    (writer.path / "predictions").mkdir()
    results = {}
    for name in settings.benchmarks:
        benchmark = load_benchmark(benchmarks.path / name).first(settings.items)

        def report(done: int, total: int, name: str = name) -> None:
            values = {f"{name}/done": float(done), f"{name}/total": float(total)}
            context.on_event(_event(f"evaluate-{label}", done, values))

        predictions = generate_answers(
            model,
            tokenizer,
            visual,
            benchmark.items,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            on_progress=report,
        )
        result = score(benchmark, predictions)
        results[name] = result.to_dict()
        if result.accuracy is not None:
            writer.metrics[name] = result.accuracy
        writer.metrics[f"{name}/parse_failures"] = float(result.parse_failures)
        writer.metrics[f"{name}/answered_percent"] = 100.0 * result.answered / result.total
        with (writer.path / "predictions" / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(vars(item)) + "\n" for item in predictions)
    summary: dict[str, Any] = {"label": label, "benchmarks": results}
    if data is not None:
        del model
        packed = load_model(folder, device=device, attention="packed")
        limited = VisualInputs(
            folder, min_pixels=config.data.min_pixels, max_pixels=config.data.max_pixels
        )
        loss = held_out_loss(packed, folder.family, data.path / HELD_OUT, limited)
        summary["held_out_loss"] = loss
        if loss is not None:
            writer.metrics["held_out_loss"] = loss
    (writer.path / "results.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _teacher(config: GraceConfig, fitted: Artifact | None) -> tuple[CheckpointFolder, Parent]:
    if fitted is not None:
        return read_checkpoint(fitted.path / "model"), fitted.as_parent()
    folder = locate_checkpoint(config.models.teacher)
    return folder, _checkpoint_parent(folder)


def _checkpoint_parent(folder: CheckpointFolder) -> Parent:
    return Parent(
        kind="checkpoint",
        path=str(folder.path),
        digest=digest_folder(folder.path),
        revision=folder.revision,
    )


def _tokenizer_parent(folder: CheckpointFolder) -> Parent:
    """What of a checkpoint decides how records become tokens: its small files, not its weights."""
    tokenizer, processor = load_tokenizer(folder.path), load_image_processor(folder.path)
    facts = {
        "vocabulary": tokenizer.get_vocab(),
        "template": tokenizer.get_chat_template(),
        "processor": json.loads(processor.to_json_string()),
        "image_token_id": folder.image_token_id,
        "family": folder.family.model_type,
    }
    return Parent(
        kind="tokenizer",
        path=str(folder.path),
        digest=fingerprint("tokenizer", facts, {}),
        revision=folder.revision,
    )


def _sharegpt4v_files(source: ShareGPT4VData) -> tuple[Path, list[Path]]:
    require_environment(source.root, "data.source.root")
    root = Path(source.root).expanduser()
    files = [root / name for name in source.annotations]
    missing = [str(path) for path in (root, *files) if not path.exists()]
    if missing:
        raise GraceError(
            "data.source: not found: " + ", ".join(missing) + "; set data.source.root (or "
            "GRACE_DATA_ROOT) to the folder that holds the annotation files and pictures"
        )
    return root, files


def _annotations_parent(files: list[Path]) -> Parent:
    digests = {str(number): sha256_of(file) for number, file in enumerate(files)}
    return Parent(
        kind="annotations",
        path=", ".join(str(file) for file in files),
        digest=fingerprint("annotations", digests, {}),
    )


def _counts(counts: PreparationReport) -> dict[str, float]:
    return {name: float(value) for name, value in vars(counts).items() if isinstance(value, int)}


def _event(stage: str, step: int, values: Mapping[str, float]) -> Event:
    return Event(time.time(), stage, step, "progress", values)


def _link_tree(source: Path, destination: Path) -> None:
    """The same files under another name, so that nothing is lost if this is interrupted."""
    destination.mkdir()
    for file in source.iterdir():
        assert file.is_file(), "a trained checkpoint is flat"
        os.link(file, destination / file.name)


def _is_missing(location: str) -> bool:
    return not location.startswith("http") and not Path(location).is_dir()


__all__ = [
    "CheckpointSource",
    "StageContext",
    "distill",
    "evaluate",
    "fit_teacher",
    "generate_benchmarks",
    "generate_world",
    "prepare_data",
    "publish",
    "quantize",
    "release",
]
