"""What the model card of a release is made from: its artifacts and the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from grace_core.artifacts import Artifact
from grace_core.config.names import repository_name
from grace_core.config.training import BITS, TrainingStage
from grace_core.config.tree import GraceConfig
from grace_core.evaluation.benchmarks import find_benchmark
from grace_core.evaluation.report.recorded import RecordedModel, ScoreRecord, SourceRecord
from grace_core.evaluation.table import TITLES, ResultsTable
from grace_core.export.card_facts import (
    BenchmarkFacts,
    Form,
    Precision,
    Quantization,
    Release,
    Results,
    ZooEntry,
)
from grace_core.export.release import release_folders
from grace_core.lineage.collect import lineage_of
from grace_core.lineage.graph import Lineage
from grace_core.lineage.published import published_form
from grace_core.publish.content import CARD, PICTURE, RELEASE_MANIFEST

_DESCRIPTIONS: dict[str, str] = {
    "bf16": "Full-precision student; the W8 and W4 students start from it.",
    "w8": "INT8 quantization-aware training with learnt scales.",
    "w4": "INT4 quantization-aware training with learnt scales.",
    "w4-AWQ": "The W4 model's codes and scales for AWQ's runtimes.",
}


def release_facts(
    config: GraceConfig,
    label: str,
    suffix: str,
    releases: Mapping[str, Artifact],
    evaluation: Artifact,
) -> Release:
    """Everything the card of one form of a release says, except its scores.

    suffix: of the form, as `release_folders` names it; releases: all of the run, by label.
    """
    precision, artifact = _precision(label), releases[label]
    settings = config.publish
    section: TrainingStage = config.distill if label == "bf16" else config.quantize
    folder = release_folders(artifact.path)[suffix]
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    forms: dict[str, Form] = {"": "compressed-tensors", "-AWQ": "awq"}
    return Release(
        repository=repository_name(config, label) + suffix,
        precision=precision,
        form="safetensors" if label == "bf16" else forms[suffix],
        base_model=repository_name(config, "bf16")
        if label != "bf16" and "bf16" in config.students
        else settings.base_model,
        backbone=settings.base_model,
        teacher=settings.teacher_model,
        dataset=settings.dataset,
        dataset_licence=settings.dataset_licence,
        licence=settings.licence,
        zoo=[*_own_zoo(config, releases), *_related(config)],
        training=_settings(section),
        files=[*files, CARD, RELEASE_MANIFEST, PICTURE],
        parameters=_parameters(folder, artifact.manifest.facts["exactness"]["codes"]),
        size=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        lineage=_lineage(config, artifact, evaluation),
        quantization=None
        if precision == "bf16"
        else Quantization(
            bits=8 if BITS[precision] == 8 else 4,
            group_size=config.quantize.group_size,
            layers=artifact.manifest.facts["exactness"]["layers"],
        ),
    )


def results_of(model: RecordedModel, table: ResultsTable, date: str) -> Results:
    """What was measured of a release, as its card says it."""
    row = next(row for row in table.rows if row.label == model.label)
    return Results(
        scores=row.scores,
        table=table.to_markdown(),
        summary=_summary(table),
        benchmarks={name: _benchmark_facts(name, score) for name, score in model.scores.items()},
        date=date,
        pixels=model.pixels,
    )


def _benchmark_facts(name: str, score: ScoreRecord) -> BenchmarkFacts:
    """As it was recorded; of what was not recorded, nothing is claimed."""
    declared = find_benchmark(name)
    asked = score.source or SourceRecord()
    metric = score.headline.metric if score.headline else ""
    return BenchmarkFacts(
        title=declared.title,
        dataset=asked.repository,
        revision=asked.revision,
        config=asked.config,
        split=asked.split,
        declared=asked.declared,
        part=score.part,
        prompt=asked.prompt,
        metric=declared.metric_titles.get(metric, "accuracy"),
    )


_OF_PACKED_LAYERS = (
    *("weight_packed", "weight_scale", "weight_shape"),  # compressed-tensors
    *("qweight", "qzeros", "scales"),  # AWQ
)


def _parameters(folder: Path, codes: int) -> int:
    """Of a release with so many codes in packed layers."""
    count = codes
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # it is no mapping
                if not name.endswith(_OF_PACKED_LAYERS):
                    count += math.prod(tensors.get_slice(name).get_shape())
    return count


def _summary(table: ResultsTable) -> str:
    """The averages in a few words: against the baseline, the teacher and the BF16 student."""
    rows = {row.label: row for row in table.rows}
    sentences = []
    bf16 = rows.get("bf16")
    if bf16 is not None and bf16.average is not None:
        gain = table.gain(bf16)
        if gain is not None:
            sentences.append(f"{TITLES['bf16']} is {gain:+.1f} points from the baseline's average")
        teacher = rows["teacher"].average if "teacher" in rows else None
        if teacher is not None:
            sentences.append(f"{bf16.average - teacher:+.1f} from the teacher's")
    text = f"{' and '.join(sentences)}." if sentences else ""
    for label in ("w8", "w4"):
        kept = table.kept(rows[label]) if label in rows else None
        if kept is not None:
            text += f" {TITLES[label]} keeps {kept:.1f} % of the BF16 average."
    return text.strip()


def _precision(label: str) -> Precision:
    assert label in ("bf16", "w8", "w4"), label
    return label  # type: ignore[return-value]  # narrowed by the assertion above


def _own_zoo(config: GraceConfig, releases: Mapping[str, Artifact]) -> list[ZooEntry]:
    return [
        ZooEntry(
            repository=repository_name(config, label) + suffix,
            backbone=config.publish.base_model,
            precision=_precision(label),
            group_size=None if label == "bf16" else config.quantize.group_size,
            description=_DESCRIPTIONS[label + suffix],
        )
        for label, artifact in releases.items()
        for suffix in release_folders(artifact.path)
    ]


def _related(config: GraceConfig) -> list[ZooEntry]:
    return [
        ZooEntry(
            repository=model.repository,
            backbone=model.backbone,
            precision=model.precision,
            group_size=model.group_size,
            description=model.description,
        )
        for model in config.publish.related
    ]


def _settings(section: TrainingStage) -> dict[str, str | int | float]:
    training, objective = section.training, section.objective
    length = f"{training.steps} steps" if training.steps else f"{training.epochs:g} epochs"
    settings: dict[str, str | int | float] = {
        "Length": length,
        "Rows a step": f"{training.rows_per_step} of up to {training.row_tokens} tokens",
        "Learning rate": training.learning_rate,
        "Distillation": objective.distillation.kind,
        "Relational weight": objective.relational.omega if objective.relational.enabled else "off",
        "Beta": f"{objective.controller.kind}, from {objective.controller.beta_init}",
        "Parallelism": f"DeepSpeed ZeRO-{training.zero_stage}, bf16",
    }
    return settings


def _lineage(config: GraceConfig, release: Artifact, evaluation: Artifact) -> Lineage:
    """What goes out with a release of where it came from, named as the card names things."""
    lineage = lineage_of([release], [release, evaluation])
    names = {}
    for edge in lineage.edges:
        parent = lineage.node(edge.parent)
        if parent.stage in ("checkpoint", "tokenizer"):
            of_teacher = edge.role in ("teacher", "start")
            names[parent.digest] = (
                config.publish.teacher_model if of_teacher else config.publish.base_model
            )
        elif parent.stage == "annotations":
            names[parent.digest] = config.publish.dataset
    return published_form(lineage, names)
