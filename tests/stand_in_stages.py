"""Stages that leave real artifacts within milliseconds, for tests of what surrounds them.

Fingerprints, parents and roles are those of `grace_core.stages`; only the work is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import pytest

from grace_core import stages
from grace_core.artifacts import Artifact, Parent, find_artifact, fingerprint, new_artifact
from grace_core.config import GraceConfig
from grace_core.errors import GraceError
from grace_core.events import Event, EventWriter
from grace_core.publish.approval import Approval
from grace_core.publish.release_set import FROM_ENVIRONMENT, HubAccess
from grace_core.stages import StageContext
from grace_core.stages.reporting import gate_verdict
from tests.recorded_evaluations import recorded_files

STEPS = 3


class StandIns:
    """One method a stage; `made` lists the stages that had to work, in order."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.fail_at: str | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, stage in self.functions().items():
            monkeypatch.setattr(stages, name, stage)

    def functions(self) -> dict[str, Any]:
        """What stands in, by the names in `grace_core.stages`."""
        names = (
            *("prepare_benchmarks", "generate_world", "prepare_data"),
            *("fit_teacher", "record_teacher"),
            *("distill", "quantize"),
            *("release", "evaluate", "report"),
            *("publish", "find_publication"),
        )
        return {name: getattr(self, name) for name in names}

    def prepare_benchmarks(self, config: GraceConfig, context: StageContext) -> Artifact:
        return self._once(config, context, "benchmarks", {}, {})

    def generate_world(self, config: GraceConfig, context: StageContext) -> Artifact:
        section = config.data.source.model_dump(mode="json")
        return self._once(config, context, "world", section, {})

    def prepare_data(self, config: GraceConfig, context: StageContext) -> Artifact:
        parents = {"world": self.generate_world(config, context).as_parent()}
        section = config.data.model_dump(mode="json")
        return self._once(config, context, "data", section, parents, metrics={"records": 5.0})

    def fit_teacher(self, config: GraceConfig, data: Artifact, context: StageContext) -> Artifact:
        assert config.teacher_fit is not None
        parents = {"start": checkpoint(config.models.teacher.path), "data": data.as_parent()}
        section = config.teacher_fit.model_dump(mode="json")
        return self._once(config, context, "teacher", section, parents, steps=STEPS)

    def record_teacher(
        self, config: GraceConfig, data: Artifact, teacher: Artifact | None, context: StageContext
    ) -> Artifact:
        assert config.teacher_outputs is not None
        parents = {"teacher": _teacher(config, teacher), "data": data.as_parent()}
        section = config.teacher_outputs.model_dump(mode="json")
        return self._once(config, context, "teacher-outputs", section, parents)

    def distill(
        self, config: GraceConfig, data: Artifact, teacher: Artifact | None, context: StageContext
    ) -> Artifact:
        parents = {
            "student": checkpoint(config.models.student.path),
            "data": data.as_parent(),
            "teacher": _teacher(config, teacher),
        }
        section = config.distill.model_dump(mode="json")
        return self._once(config, context, "bf16", section, parents, steps=STEPS)

    def quantize(
        self,
        config: GraceConfig,
        precision: str,
        data: Artifact,
        teacher: Artifact | None,
        bf16: Artifact,
        context: StageContext,
    ) -> Artifact:
        parents = {
            "student": bf16.as_parent(),
            "data": data.as_parent(),
            "teacher": _teacher(config, teacher),
        }
        section = config.quantize.model_dump(mode="json", exclude={"variants"})
        return self._once(config, context, precision, section, parents, steps=STEPS)

    def release(self, config: GraceConfig, model: Artifact, context: StageContext) -> Artifact:
        stage = f"release-{model.manifest.stage}"
        size = {"bytes": 7000.0}
        return self._once(config, context, stage, {}, {"model": model.as_parent()}, metrics=size)

    def evaluate(
        self, config: GraceConfig, label: str, model: Artifact | None, context: StageContext
    ) -> Artifact:
        sources = {"teacher": config.models.teacher, "baseline": config.models.student}
        parent = model.as_parent() if model else checkpoint(sources[label].path)
        benchmarks = self.prepare_benchmarks(config, context)
        return self._once(
            config,
            context,
            f"evaluate-{label}",
            config.evaluation.model_dump(mode="json"),
            {"model": parent, "benchmarks": benchmarks.as_parent()},
            metrics={"toy-choice": 75.0},
            files=recorded_files(label, {"toy-choice": [True, label != "baseline", True, False]}),
        )

    def report(
        self, config: GraceConfig, evaluations: Mapping[str, Artifact], context: StageContext
    ) -> Artifact:
        parents = {f"evaluate-{label}": item.as_parent() for label, item in evaluations.items()}
        estimates = {label: {"average": {"value": 75.0}} for label in evaluations}
        comparison = {"estimates": estimates, "differences": [], "retention": []}
        models = [{"model": label, "label": label, "scores": {}} for label in evaluations]
        made = json.dumps({"models": models, "comparison": comparison})
        files = {"report.json": made, "report.md": "# Report\n", "index.html": "<p>Report</p>\n"}
        section = config.evaluation.gate.model_dump(mode="json")
        facts = {"gate": gate_verdict(config, evaluations).model_dump(mode="json")}
        return self._once(config, context, "report", section, parents, files=files, facts=facts)

    def publish(
        self,
        config: GraceConfig,
        releases: Mapping[str, Artifact],
        evaluations: Mapping[str, Artifact],
        context: StageContext,
        approval: Approval | None = None,
        access: HubAccess = FROM_ENVIRONMENT,
    ) -> Artifact:
        section, parents = publishing_inputs(config, releases, evaluations)
        rows = {label: {**e.manifest.metrics, "average": 75.0} for label, e in evaluations.items()}
        results = {"rows": rows, "releases": {}, "seconds": {}}
        places = {
            label: {"location": str(config.run_dir / "releases" / label), "revision": item.digest}
            for label, item in releases.items()
        }
        files = {"results.json": json.dumps(results), "table.md": "| Model |\n|---|\n"}
        files["releases.json"] = json.dumps(places)
        facts = {} if approval is None else {"approval": approval.model_dump()}
        return self._once(config, context, "publish", section, parents, files=files, facts=facts)

    def find_publication(
        self,
        config: GraceConfig,
        releases: Mapping[str, Artifact],
        evaluations: Mapping[str, Artifact],
    ) -> Artifact | None:
        key = fingerprint("publish", *publishing_inputs(config, releases, evaluations))
        return find_artifact(config.run_dir / "artifacts" / f"publish-{key[:12]}")

    def _once(
        self,
        config: GraceConfig,
        context: StageContext,
        stage: str,
        section: Mapping[str, Any],
        parents: Mapping[str, Parent],
        *,
        steps: int = 0,
        metrics: Mapping[str, float] | None = None,
        files: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Artifact:
        key = fingerprint(stage, section, parents)
        folder = config.run_dir / "artifacts" / f"{stage}-{key[:12]}"
        found = find_artifact(folder)
        if found is not None:
            return found
        if context.finished_only:
            raise GraceError(f"stage {stage} is not done")
        self.made.append(stage)
        events = EventWriter(config.run_dir / "work" / folder.name / "metrics.jsonl")
        whole = config.model_dump(mode="json")
        with new_artifact(folder, stage, section, parents, whole) as writer, events:
            for step in range(1, steps + 1):
                event = Event(time.time(), stage, step, "train", {"loss": 1.0 / step})
                events.write(event)
                context.on_event(event)
            if stage == self.fail_at:
                raise ValueError(f"{stage} went wrong")
            for name, text in ({"content": key} | dict(files or {})).items():
                (writer.path / name).parent.mkdir(exist_ok=True)
                (writer.path / name).write_text(text, encoding="utf-8")
            writer.metrics.update(metrics or {})
            writer.facts.update(facts or {})
        made = find_artifact(folder)
        assert made is not None
        return made


def publishing_inputs(
    config: GraceConfig, releases: Mapping[str, Artifact], evaluations: Mapping[str, Artifact]
) -> tuple[dict[str, Any], dict[str, Parent]]:
    parents = {f"release-{label}": item.as_parent() for label, item in releases.items()}
    parents |= {f"evaluate-{label}": item.as_parent() for label, item in evaluations.items()}
    return config.publish.model_dump(mode="json", exclude={"approval"}), parents


def checkpoint(path: str) -> Parent:
    """A checkpoint from outside."""
    return Parent(
        kind="checkpoint", path=path, digest=fingerprint("checkpoint", {"path": path}, {})
    )


def _teacher(config: GraceConfig, fitted: Artifact | None) -> Parent:
    return fitted.as_parent() if fitted else checkpoint(config.models.teacher.path)
