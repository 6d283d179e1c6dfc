"""Stages `release-*`: the forms that users load, proven equal to what was trained."""

from __future__ import annotations

from pathlib import Path

from grace_core.artifacts import Artifact, ArtifactWriter
from grace_core.config.tree import GraceConfig
from grace_core.export.awq import AWQ
from grace_core.export.compressed import COMPRESSED
from grace_core.export.exactness import check_release
from grace_core.export.formats import PackedForm
from grace_core.export.release import AWQ_FOLDER, MODEL_FOLDER, export_bf16, export_packed
from grace_core.quantization.checkpoint import is_quantized
from grace_core.stages.answering import evaluation_device
from grace_core.stages.once import StageContext, once


def release(config: GraceConfig, model: Artifact, context: StageContext) -> Artifact:
    """Stages `release-*`: the forms that users load, proven equal to what was trained.

    The artifact holds a folder a form; `release_folders` lists them.
    """
    stage = f"release-{model.manifest.stage}"
    forms: dict[str, PackedForm] = {MODEL_FOLDER: COMPRESSED}
    section = {}
    if model.manifest.stage == "w4" and config.quantize.awq:
        forms[AWQ_FOLDER] = AWQ
        section = {"awq": True}

    def make(writer: ArtifactWriter) -> None:
        source = model.path / "model"
        for folder, form in forms.items():
            destination = writer.path / folder
            if is_quantized(source):
                export_packed(source, destination, form)
            else:
                export_bf16(source, destination)
            report = check_release(source, destination, form=form, device=evaluation_device(config))
            prefix = "" if folder == MODEL_FOLDER else f"{folder}/"
            writer.metrics[f"{prefix}bytes"] = float(_size(destination))
            writer.facts[f"{prefix}exactness"] = vars(report)

    return once(config, context, stage, section, {"model": model.as_parent()}, make)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
