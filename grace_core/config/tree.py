"""The configuration tree of a run.

Sections stand in the files beside this one; every default is written once, there. A stage receives
its own sections and never the whole tree.

What one value alone must satisfy stands at its field; what several values must satisfy together
is in `rules`, and holds for every `GraceConfig`. Descriptions are quoted in messages, so they say
the unit. Relative paths are taken from the working directory, which is the project root for `make`
and for the deployments.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from grace_core.config.data import Data
from grace_core.config.evaluation import Evaluation
from grace_core.config.launch import Launch
from grace_core.config.models import Models
from grace_core.config.publish import Publish
from grace_core.config.rules import broken_rules
from grace_core.config.section import Int, Section
from grace_core.config.training import Quantization, TeacherFit, TeacherOutputs, TrainingStage

RULES_BROKEN = "rules_broken"
"""Type of the error that `GraceConfig` raises for values that do not fit together."""


class Tracking(Section):
    """MLflow. Runs of one experiment stand side by side."""

    experiment: str = "grace"
    registered_model: str | None = Field(
        None, description="name in the model registry; None registers nothing"
    )


class GraceConfig(Section):
    """The whole run."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]*$",
        description="name of the run, of lower-case letters, digits, dots, underscores and hyphens",
    )
    run_dir: Path = Field(description="folder of everything the run leaves")
    seed: Int = Field(0, ge=0, lt=2**32, description="of data, order and initial values")
    models: Models
    data: Data
    teacher_fit: TeacherFit | None = None
    teacher_outputs: TeacherOutputs | None = None
    distill: TrainingStage
    quantize: Quantization
    launch: Launch = Launch()
    evaluation: Evaluation = Evaluation()
    publish: Publish
    tracking: Tracking = Tracking()

    @property
    def records_teacher(self) -> bool:
        """Whether trainings learn from recorded outputs of the teacher."""
        learners = (self.distill, self.quantize)
        needed = any(stage.objective.needs_teacher for stage in learners)
        return self.teacher_outputs is not None and needed

    @property
    def students(self) -> tuple[str, ...]:
        """Labels of the models that a run trains and releases."""
        return (*(() if self.quantize.start else ("bf16",)), *self.quantize.variants)

    @field_validator("run_dir")
    @classmethod
    def _home_is_meant(cls, run_dir: Path) -> Path:
        if run_dir == Path():
            raise ValueError("the working directory itself; name a folder such as runs/first")
        return run_dir.expanduser()

    @model_validator(mode="after")
    def _values_fit_together(self) -> GraceConfig:
        problems = broken_rules(self)
        if problems:
            raise PydanticCustomError(RULES_BROKEN, "{text}", {"text": "; ".join(problems)})
        return self
