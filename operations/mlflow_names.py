"""Names under which lineage is recorded in MLflow: written by the tasks, read back here."""

from __future__ import annotations

STAGE = "grace.stage"
DIGEST = "grace.digest"
INPUT = "grace.input."
"""+ role: `kind:digest` of an input of a run."""
PUBLISHED = "grace.published"
PUBLISHED_REVISION = "grace.published_revision"
"""Of a released model, where it went last; with `.<role>` of the run that published it."""
DATASET_DIGITS = 32
"""Of a content digest in an MLflow data set, which takes 36 characters."""

_TRAINED = ("teacher", "bf16", "w8", "w4")


def is_model(stage: str) -> bool:
    """Whether what a stage made, or a `checkpoint` from outside, is a model to MLflow."""
    return stage == "checkpoint" or stage in _TRAINED or stage.startswith("release-")
