"""The stages in their order, each asked for at most once: how a command finds its inputs.

Asking for a stage asks for those before it; a finished one answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from grace_core import stages
from grace_core.artifacts import Artifact
from grace_core.config.training import Precision
from grace_core.config.tree import GraceConfig
from grace_core.evaluation.gate import GateVerdict
from grace_core.events import Event
from grace_core.publish.approval import Approval
from grace_core.publish.preview import Preview, preview
from grace_core.publish.release_set import FROM_ENVIRONMENT, HubAccess, contents_of
from grace_core.stages import StageContext


class Observer(Protocol):
    """Is told what happens, while it happens."""

    def started(self, stage: str) -> None:
        """A stage is looked for, and run unless it is done."""

    def ended(self, stage: str, artifact: Artifact) -> None:
        """It is there."""

    def on_event(self, event: Event) -> None:
        """The running stage measured something."""


class Chain:
    """The artifacts of one configuration, made when they are asked for."""

    def __init__(
        self, config: GraceConfig, observer: Observer, *, finished_only: bool = False
    ) -> None:
        """finished_only: a stage that is not done is an error."""
        self.config = config
        self._observer = observer
        self._context = StageContext(observer.on_event, finished_only)
        self._found: dict[str, Artifact] = {}

    def data(self) -> Artifact:
        if self.config.data.source.kind == "toy":
            self._once("world", lambda: stages.generate_world(self.config, self._context))
        return self._once("data", lambda: stages.prepare_data(self.config, self._context))

    def benchmarks(self) -> Artifact:
        return self._once(
            "benchmarks", lambda: stages.prepare_benchmarks(self.config, self._context)
        )

    def teacher(self) -> Artifact:
        """The fitted teacher, where the configuration has section `teacher_fit`."""
        data = self.data()
        return self._once("teacher", lambda: stages.fit_teacher(self.config, data, self._context))

    def teacher_outputs(self) -> Artifact:
        data, teacher = self.data(), self._fitted_teacher()
        return self._once(
            "teacher-outputs",
            lambda: stages.record_teacher(self.config, data, teacher, self._context),
        )

    def bf16(self) -> Artifact:
        data, teacher = self.data(), self._teaching()
        return self._once("bf16", lambda: stages.distill(self.config, data, teacher, self._context))

    def quantized(self, precision: Precision) -> Artifact:
        data, teacher, bf16 = self.data(), self._teaching(), self._start()
        return self._once(
            precision,
            lambda: stages.quantize(self.config, precision, data, teacher, bf16, self._context),
        )

    def students(self) -> dict[str, Artifact]:
        """By label: bf16, unless a quantized checkpoint is gone on from, and the precisions."""
        bf16 = {"bf16": self.bf16()} if "bf16" in self.config.students else {}
        return bf16 | {name: self.quantized(name) for name in self.config.quantize.variants}

    def releases(self) -> dict[str, Artifact]:
        """By label, as `students`."""
        return {label: self._release(label, model) for label, model in self.students().items()}

    def evaluations(self) -> dict[str, Artifact]:
        """By label of the results table's row.

        The benchmarks are asked for first, so that what is wrong with them costs no training.
        """
        self.benchmarks()
        releases = self.releases()
        rows = {"teacher": self._fitted_teacher(), "baseline": None, **releases}
        return {label: self._evaluation(label, model) for label, model in rows.items()}

    def report(self) -> Artifact:
        """The evaluations side by side."""
        evaluations = self.evaluations()
        return self._once("report", lambda: stages.report(self.config, evaluations, self._context))

    def publication(
        self, approval: Approval | None = None, access: HubAccess = FROM_ENVIRONMENT
    ) -> Artifact:
        evaluations, releases = self.evaluations(), self.releases()
        self.report()
        return self._once(
            "publish",
            lambda: stages.publish(
                self.config, releases, evaluations, self._context, approval, access
            ),
        )

    def preview(self, access: HubAccess) -> Preview:
        """What the publication of the finished releases would do."""
        contents = contents_of(self.config, self.releases(), self.evaluations())
        verdict = GateVerdict.model_validate(self.report().manifest.facts["gate"])
        return preview(self.config, contents, access, verdict)

    def _start(self) -> Artifact | None:
        """What quantized students start from; None: the checkpoint that `quantize.start` names."""
        return self.bf16() if "bf16" in self.config.students else None

    def _fitted_teacher(self) -> Artifact | None:
        return None if self.config.teacher_fit is None else self.teacher()

    def _teaching(self) -> Artifact | None:
        """What students learn from: recorded outputs, a fitted teacher, or None for the given."""
        return self.teacher_outputs() if self.config.records_teacher else self._fitted_teacher()

    def _release(self, label: str, model: Artifact) -> Artifact:
        return self._once(
            f"release-{label}", lambda: stages.release(self.config, model, self._context)
        )

    def _evaluation(self, label: str, model: Artifact | None) -> Artifact:
        return self._once(
            f"evaluate-{label}", lambda: stages.evaluate(self.config, label, model, self._context)
        )

    def _once(self, stage: str, make: Callable[[], Artifact]) -> Artifact:
        if stage not in self._found:
            self._observer.started(stage)
            self._found[stage] = make()
            self._observer.ended(stage, self._found[stage])
        return self._found[stage]
