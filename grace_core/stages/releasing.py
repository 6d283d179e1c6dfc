"""Stages `release-*`: the form that users load, proven equal to what was trained."""

from __future__ import annotations

from grace_core.artifacts import Artifact, ArtifactWriter
from grace_core.config.model import GraceConfig
from grace_core.export.compressed import export_bf16, export_compressed
from grace_core.export.exactness import check_release
from grace_core.export.gate_batches import gate_batches
from grace_core.models.loading import load_tokenizer, read_checkpoint
from grace_core.models.visual_inputs import VisualInputs
from grace_core.quantization.checkpoint import is_quantized
from grace_core.stages.evaluation import evaluation_device
from grace_core.stages.once import StageContext, once


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

    return once(config, context, stage, {}, {"model": model.as_parent()}, make)
