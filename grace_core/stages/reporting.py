"""Stage `report`: the evaluated models side by side; and the gate before publishing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from grace_core.artifacts import Artifact, ArtifactWriter
from grace_core.config.tree import GraceConfig
from grace_core.errors import GraceError
from grace_core.evaluation.gate import GateVerdict, judge
from grace_core.evaluation.items import Item
from grace_core.evaluation.loading.prepared import read_items
from grace_core.evaluation.report.comparison import compare
from grace_core.evaluation.report.document import make_report
from grace_core.evaluation.report.files import write_report
from grace_core.evaluation.report.recorded import RecordedModel, find_recorded
from grace_core.stages.once import StageContext, once


def report(
    config: GraceConfig, evaluations: Mapping[str, Artifact], context: StageContext
) -> Artifact:
    """Stage `report`: the evaluations (by label) as a page, Markdown, JSON and plots.

    The verdict of the regression gate is in it, and does not stop anything here.
    """
    section = {
        "title": config.publish.name,
        "seed": config.seed,
        "gate": config.evaluation.gate.model_dump(mode="json"),
    }
    parents = {f"evaluate-{label}": item.as_parent() for label, item in evaluations.items()}

    def make(writer: ArtifactWriter) -> None:
        models = find_recorded([item.path for item in evaluations.values()])
        comparison = compare(models, seed=config.seed)
        verdict = judge(config.evaluation.gate, models, comparison)
        made = make_report(
            models,
            title=config.publish.name,
            seed=config.seed,
            find_items=find_items,
            comparison=comparison,
            gate=verdict,
        )
        write_report(made, writer.path)
        writer.facts["gate"] = verdict.model_dump(mode="json")
        writer.metrics["gate_checks"] = float(len(verdict.checks))
        writer.metrics["gate_shortfalls"] = float(len(verdict.shortfalls))
        for kept in comparison.retention:
            label = next(model.label for model in models if model.key == kept.model)
            writer.metrics[f"retention/{label}"] = kept.value

    return once(config, context, "report", section, parents, make)


def gate_verdict(config: GraceConfig, evaluations: Mapping[str, Artifact]) -> GateVerdict:
    """What the regression gate says of these evaluations (by label); raises nothing of its own."""
    models = find_recorded([item.path for item in evaluations.values()])
    return judge(config.evaluation.gate, models, compare(models, seed=config.seed))


def find_items(model: RecordedModel, benchmark: str, ids: Collection[str]) -> dict[str, Item]:
    """The items of an evaluation as they were asked, by id.

    Raises GraceError where the benchmark is no longer there.
    """
    parent = None if model.manifest is None else model.manifest.parents.get("benchmarks")
    if parent is None:
        raise GraceError(f"{model.folder} does not say where its benchmarks lie")
    beside = model.folder.parent / Path(parent.path).name  # also where the run's folder was moved
    folder = beside if beside.is_dir() else Path(parent.path)
    return {item.id: item for item in read_items(folder / benchmark) if item.id in ids}
