"""Stages `evaluate-*`: one row of the results table each."""

from __future__ import annotations

import json
import shutil
from typing import Any

from grace_core.artifacts import Artifact, ArtifactWriter, fingerprint
from grace_core.config.tree import GraceConfig
from grace_core.data.prepare import HELD_OUT
from grace_core.evaluation.benchmarks import find_benchmark
from grace_core.evaluation.held_out import held_out_loss
from grace_core.evaluation.score import score
from grace_core.models.loading import CheckpointFolder, locate_checkpoint, read_checkpoint
from grace_core.models.visual_inputs import VisualInputs
from grace_core.stages.answering import Answering, AskingJob, budgets, visual_inputs
from grace_core.stages.benchmarks import prepare_benchmarks
from grace_core.stages.data import prepare_data
from grace_core.stages.once import (
    StageContext,
    checkpoint_parent,
    once,
    progress,
    stage_folder,
)


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
        parent = checkpoint_parent(folder)
    benchmarks = prepare_benchmarks(config, context)
    parents = {"model": parent, "benchmarks": benchmarks.as_parent()}
    data: Artifact | None = None
    if config.data.held_out_share > 0:
        data = prepare_data(config, context)
        parents["held_out"] = data.as_parent()
    # Which questions are asked, and how they are worded, is known by the benchmarks' content.
    section = {
        "benchmarks": list(config.evaluation.names),
        "budgets": {name: budgets(config, name) for name in config.evaluation.names},
        "engine": config.evaluation.engine,
        "pixels": [config.evaluation.min_pixels, config.evaluation.max_pixels],
    }
    artifact = stage_folder(config, stage, fingerprint(stage, section, parents))
    job = AskingJob(
        stage=stage,
        config=config,
        model=folder.path,
        benchmarks=benchmarks.path,
        work=config.run_dir / "work" / artifact.name,
    )

    def make(writer: ArtifactWriter) -> None:
        _evaluate(job, label, folder, benchmarks, data, writer, context)

    made = once(config, context, stage, section, parents, make)
    shutil.rmtree(job.work, ignore_errors=True)
    return made


def _evaluate(
    job: AskingJob,
    label: str,
    folder: CheckpointFolder,
    benchmarks: Artifact,
    data: Artifact | None,
    writer: ArtifactWriter,
    context: StageContext,
) -> None:
    chosen = job.items()
    (writer.path / "predictions").mkdir()
    held_out = 0 if data is None else int(data.manifest.metrics["held_out"])
    total = held_out + sum(len(items) for items in chosen.values())
    done: dict[str, int] = {}

    def report(name: str, count: int) -> None:
        done[name] = count
        values = {name: float(count), "done": float(sum(done.values())), "total": float(total)}
        context.on_event(progress(job.stage, sum(done.values()), values))

    answering = Answering(job, folder, chosen, report)
    results = {}
    for name, predictions in answering.predictions().items():
        source = benchmarks.manifest.facts[name]
        result = score(
            find_benchmark(name),
            [item.gold for item in chosen[name]],
            predictions,
            part=source["part"],
            declared=source["declared"],
            budgets=budgets(job.config, name),
            pictures={
                item.id: item.question.pictures[0].key
                for item in chosen[name]
                if item.question.pictures
            },
        )
        results[name] = result.to_dict() | {"source": source}
        if result.accuracy is not None:
            writer.metrics[name] = result.accuracy
        writer.metrics[f"{name}/parse_failures"] = float(result.parse_failures)
        writer.metrics[f"{name}/answered_percent"] = 100.0 * result.answered / result.total
        with (writer.path / "predictions" / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(item.to_dict()) + "\n" for item in result.items)
    summary: dict[str, Any] = {
        "label": label,
        "benchmarks": results,
        "pixels": visual_inputs(job.config, folder).pixel_limits,
        "model_bytes": sum(file.stat().st_size for file in folder.path.glob("*.safetensors")),
    }
    if data is not None:
        settings = job.config.data
        limited = VisualInputs(
            folder, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels
        )
        loss = held_out_loss(
            answering.model,
            folder.family,
            data.path / HELD_OUT,
            limited,
            on_progress=lambda count, _: report(HELD_OUT, count),
        )
        summary["held_out_loss"] = loss
        if loss is not None:
            writer.metrics["held_out_loss"] = loss
    (writer.path / "results.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
