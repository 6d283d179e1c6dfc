"""Stages `evaluate-*`: one row of the results table each."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch

from grace_core.artifacts import Artifact, ArtifactWriter
from grace_core.config.model import GraceConfig
from grace_core.data.prepare import HELD_OUT
from grace_core.errors import GraceError
from grace_core.evaluation.benchmarks import find_benchmark
from grace_core.evaluation.generate import generate_answers
from grace_core.evaluation.held_out import held_out_loss
from grace_core.evaluation.loading.prepared import read_items
from grace_core.evaluation.score import score
from grace_core.models.loading import (
    CheckpointFolder,
    load_model,
    load_tokenizer,
    locate_checkpoint,
    read_checkpoint,
)
from grace_core.models.visual_inputs import VisualInputs
from grace_core.stages.benchmarks import prepare_benchmarks
from grace_core.stages.data import prepare_data
from grace_core.stages.once import StageContext, checkpoint_parent, once, progress


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
        "max_new_tokens": config.evaluation.max_new_tokens,
    }

    def make(writer: ArtifactWriter) -> None:
        _evaluate(config, label, folder, benchmarks, data, writer, context)

    return once(config, context, stage, section, parents, make)


def evaluation_device(config: GraceConfig) -> torch.device:
    """Where this process computes: the configured device, or a GPU when there is one.

    With a scheduler the configured device is that of its nodes, where training alone runs.
    """
    here = config.launch.backend.kind == "local"
    if here and config.launch.device == "cuda" and not torch.cuda.is_available():
        raise GraceError("launch.device is cuda, but torch sees no GPU; set it to cpu or auto")
    if config.launch.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


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
    chosen = {name: read_items(benchmarks.path / name) for name in settings.names}
    held_out = 0 if data is None else int(data.manifest.metrics["held_out"])
    total = held_out + sum(len(items) for items in chosen.values())
    before = 0  # questions of the benchmarks that are done

    def report(name: str, done: int, _of: int) -> None:
        values = {name: float(done), "done": float(before + done), "total": float(total)}
        context.on_event(progress(f"evaluate-{label}", before + done, values))

    for name, items in chosen.items():
        predictions = generate_answers(
            model,
            tokenizer,
            visual,
            [item.question for item in items],
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            on_progress=partial(report, name),
        )
        before += len(items)
        result = score(find_benchmark(name), [item.gold for item in items], predictions)
        results[name] = result.to_dict()
        if result.accuracy is not None:
            writer.metrics[name] = result.accuracy
        writer.metrics[f"{name}/parse_failures"] = float(result.parse_failures)
        writer.metrics[f"{name}/answered_percent"] = 100.0 * result.answered / result.total
        with (writer.path / "predictions" / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(item.to_dict()) + "\n" for item in result.items)
    summary: dict[str, Any] = {"label": label, "benchmarks": results}
    if data is not None:
        del model
        packed = load_model(folder, device=device, attention="packed")
        limited = VisualInputs(
            folder, min_pixels=config.data.min_pixels, max_pixels=config.data.max_pixels
        )
        loss = held_out_loss(
            packed,
            folder.family,
            data.path / HELD_OUT,
            limited,
            on_progress=partial(report, HELD_OUT),
        )
        summary["held_out_loss"] = loss
        if loss is not None:
            writer.metrics["held_out_loss"] = loss
    (writer.path / "results.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
